"""Explicit normalised steps, for fields that jump and for networks too large for a Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from marginflow.flow._field import Field, FieldValue, Vector
from marginflow.flow._state import Goal, Layers, OnStep, State, Tally, is_separated

_LARGEST = 0.1  # of ‖W‖ in one step
_GROWTH = 1.5
_SAFETY = 0.9
_SHORT = 200.0  # times tol: a step so short that the change of v on it, > 1 %, is a jump's
_BUNDLE = 24
_DESCENT = 0.5  # of the first-order decrease of ln L, for a combination to be accepted
_SHRINKS = 60
_EXACT = 1e-9
_LEAST = 1e-3  # of the tolerance: a shorter step is not tried to make ℓ/ρ rise


Fall = Callable[[tuple[Vector, FieldValue], tuple[Vector, FieldValue]], float]


@dataclass(frozen=True, eq=False)
class _Trial:
    """A step that was tried: where it leads, and what it would do to the clock."""

    w: Vector
    value: FieldValue
    ds: float
    parts: tuple[tuple[float, Vector, Vector], ...]
    """(λ_j, W_j, v(W_j)): the step is ``ds Σ λ_j v(W_j)``, Σ λ_j = 1."""
    heun: bool = False


class Steps:
    """Steps of relative length η: ``ds = η‖W‖/‖v‖``.

    Where ln L is continuous (``descent``) they are Heun's, ``W ← W + ds (v₁ + v₂)/2``, of second
    order where v is smooth; η follows the embedded Euler step, ``‖v₂ − v₁‖ ds/2 ≤ tol ‖W‖``. A step
    that meets a jump of v is taken along the shortest convex combination of the velocities found
    nearby instead: Filippov's choice for a gradient field, the steepest descent of a function with
    kinks, accepted only if ln L falls by half of what that promises.

    Along such a flow ℓ/ρ never falls (Theorem 4). A step on which it does is too long, and is taken
    again; only one that cannot be shortened so as to rise is let pass (and counted).

    Where ln L itself jumps there is nothing to descend, and Filippov's combination is not
    determined. The steps are Euler's then, ``W ← W + ds v``, with the same bound on the change of
    v from step to step. Across a jump it shrinks like η only, so η settles near tol and
    the path zigzags within tol of the surface: a sliding solution to first order.

    Args:
        field: the vector field.
        tolerance: tol, relative to ‖W‖.
        tally: where combinations and rejected steps are counted.
        descent: whether ln L is continuous, and so decreases along the flow across jumps of v.
        fell: by how much ``ln(ℓ/ρ)`` falls from one point to another, 0 where it is not defined.
        layers: of the network, for Lemma 11's corrections; None does without.
        fixed: a constant η, without any control (to measure the order).
    """

    def __init__(
        self,
        field: Field,
        tolerance: float,
        tally: Tally,
        *,
        descent: bool,
        fell: Fall = lambda before, after: 0.0,
        layers: Layers | None = None,
        fixed: float | None = None,
    ) -> None:
        self.fell = fell
        self.layers = layers
        self.field = field
        self.tolerance = tolerance
        self.tally = tally
        self.descent = descent
        self.fixed = fixed

    def advance(
        self,
        state: State,
        goals: Sequence[Goal],
        on_step: OnStep,
        give_up: Callable[[State], bool],
    ) -> State:
        """Step until a goal is reached or ``give_up`` says so."""
        bundle: list[tuple[Vector, Vector]] = []
        while not give_up(state):
            here = self.field(state.w)
            eta = self.fixed or min(state.step_size, _LARGEST)
            take = self._heun if self.descent else self._euler
            trial, following = take(state.w, here, eta, bundle)
            after = self._after(state, here, trial, following)
            if self._gap(after, goals) >= 0:
                after, trial = self._hit(state, here, trial, goals, following)
            self._correct(state.w, trial)
            on_step(after, trial.value)
            state = after
            if self._gap(state, goals) >= 0:
                break
        return state

    def _correct(self, w: Vector, trial: _Trial) -> None:
        """Add the part of ``‖W_k‖²`` that the step adds beyond ``2 ds Σ λ_j ⟨W_j, v(W_j)⟩``.

        What is left grows in all layers like c_k, exactly: Lemma 11 with finite steps. For Euler's step
        the part is ``ds²‖v_k‖²``, as for gradient descent.
        """
        if self.layers is None:
            return
        excess = self.layers.squares(trial.w - w)
        for share, point, velocity in trial.parts:
            if point is not w:
                excess = excess - 2 * trial.ds * share * self.layers.inner(point - w, velocity)
        old = self.tally.corrections or [0.0] * len(excess)
        self.tally.corrections = [a + float(b) for a, b in zip(old, excess, strict=True)]

    def _euler(
        self, w: Vector, here: FieldValue, eta: float, bundle: list[tuple[Vector, Vector]]
    ) -> tuple[_Trial, float]:
        """An accepted Euler step, one evaluation each, and the η to try next."""
        norm, v = float(np.linalg.norm(w)), here.velocity
        speed = float(np.linalg.norm(v))
        for last in range(_SHRINKS):
            ds = eta * norm / speed
            goal = w + ds * v
            value = self.field(goal)
            found = _Trial(goal, value, ds, ((1.0, w, v),))
            error = 0.5 * eta * float(np.linalg.norm(value.velocity - v)) / speed
            if self.fixed is not None:
                return found, eta
            # Twice tol is let pass: in sliding every other step would else be taken again.
            if error <= 2 * self.tolerance or last == _SHRINKS - 1:
                break
            self.tally.rejected += 1
            eta *= min(max(_SAFETY * math.sqrt(self.tolerance / error), 0.2), 0.7)
        grow = _SAFETY * math.sqrt(self.tolerance / error) if error > 0 else _GROWTH
        return found, min(eta * min(max(grow, 0.5), _GROWTH), _LARGEST)

    def _heun(
        self, w: Vector, here: FieldValue, eta: float, bundle: list[tuple[Vector, Vector]]
    ) -> tuple[_Trial, float]:
        """An accepted step of Heun's or along a combination, and the η to try next."""
        norm, v = float(np.linalg.norm(w)), here.velocity
        speed = float(np.linalg.norm(v))
        least = _LEAST * self.tolerance
        for _ in range(_SHRINKS):
            ds = eta * norm / speed
            ahead = self.field.velocity(w + ds * v)
            halves = ((0.5, w, v), (0.5, w + ds * v, ahead))
            change = float(np.linalg.norm(ahead - v)) / speed
            error = 0.5 * eta * change
            if self.fixed is not None or error <= self.tolerance:
                goal = w + 0.5 * ds * (v + ahead)
                value = self.field(goal)
                if self.fixed is not None:
                    return _Trial(goal, value, ds, halves, heun=True), eta
                if eta <= least or self.fell((w, here), (goal, value)) <= 0:
                    grow = _SAFETY * math.sqrt(self.tolerance / error) if error > 0 else _GROWTH
                    bundle.clear()
                    following = min(eta * min(max(grow, 0.3), _GROWTH), _LARGEST)
                    return _Trial(goal, value, ds, halves, heun=True), following
                self.tally.rejected += 1
                eta *= 0.5
                continue
            # So short a step that a smooth field would hardly have changed on it.
            if eta <= _SHORT * self.tolerance:
                found = self._combined(w, here, eta, bundle, (w + ds * v, ahead))
                if found is not None and (
                    eta <= least or self.fell((w, here), (found.w, found.value)) <= 0
                ):
                    self.tally.combined += 1
                    return found, min(eta * _GROWTH, _LARGEST)
            self.tally.rejected += 1
            eta *= min(max(_SAFETY * math.sqrt(self.tolerance / error), 0.2), 0.7)
        goal = w + 0.5 * ds * (v + ahead)
        return _Trial(goal, self.field(goal), ds, halves, heun=True), eta

    def _combined(
        self,
        w: Vector,
        here: FieldValue,
        eta: float,
        bundle: list[tuple[Vector, Vector]],
        found: tuple[Vector, Vector],
    ) -> _Trial | None:
        """A step along the shortest convex combination of velocities nearby, if ln L descends."""
        norm = float(np.linalg.norm(w))
        bundle[:] = [b for b in bundle if np.linalg.norm(b[0] - w) <= 4 * eta * norm][-_BUNDLE:]
        bundle.append(found)
        for _ in range(8):
            points = [(w, here.velocity), *bundle]
            weights, direction = _shortest([v for _, v in points])
            speed = float(np.linalg.norm(direction))
            if speed == 0:
                return None
            ds = min(eta * norm / speed, 4 * eta * norm / float(np.linalg.norm(here.velocity)))
            goal = w + ds * direction
            value = self.field(goal)
            gain = here.log_loss - value.log_loss
            if gain >= _DESCENT * ds * speed**2:
                parts = tuple((a, *point) for a, point in zip(weights, points, strict=True))
                return _Trial(goal, value, ds, parts)
            bundle.append((goal, value.velocity))
        return None

    def _after(self, old: State, here: FieldValue, trial: _Trial, size: float) -> State:
        """The state after ``trial``, with ``ln L`` linear in s on the way for the clock."""
        rise = here.log_loss - trial.value.log_loss
        log_ds = math.log(trial.ds) if trial.ds > 0 else -math.inf
        log_tl = math.nan  # of a point where the flow has diverged, which on_step is told of
        if not math.isnan(rise):
            log_tl = float(np.logaddexp(old.log_tl - rise, log_ds + _log_mean(rise)))
        separated = old.separated or is_separated(self.field, trial.value)
        return State(trial.w, log_tl, trial.value.log_loss, size, separated, old.method)

    def _hit(
        self,
        state: State,
        here: FieldValue,
        last: _Trial,
        goals: Sequence[Goal],
        following: float,
    ) -> tuple[State, _Trial]:
        """The last step made shorter, so that it ends where the goal is reached."""
        from scipy.optimize import brentq

        def at(share: float) -> tuple[State, _Trial]:
            if share == 1:
                trial = last
            elif last.heun:
                ds, v = share * last.ds, here.velocity
                ahead = state.w + ds * v
                velocity = self.field.velocity(ahead)
                w = state.w + 0.5 * ds * (v + velocity)
                halves = ((0.5, state.w, v), (0.5, ahead, velocity))
                trial = _Trial(w, self.field(w), ds, halves, heun=True)
            else:
                w = state.w + share * (last.w - state.w)
                trial = _Trial(w, self.field(w), share * last.ds, last.parts)
            return self._after(state, here, trial, following), trial

        first = self._gap(state, goals)
        known = abs(state.log_time) if math.isfinite(state.log_time) else 1.0
        # Aimed a little beyond: the goal shall be reached, not almost.
        aim = 0.5 * _EXACT * max(1.0, known)

        def distance(share: float) -> float:
            return (self._gap(at(share)[0], goals) if share > 0 else max(first, -1e300)) - aim

        if not distance(1.0) > 0 > distance(0.0):
            return at(1.0)
        # Of a start with margins like −1e7 almost all of ln t is in the first 1e-7 of a step.
        share = float(brentq(distance, 0.0, 1.0, xtol=1e-300, rtol=1e-12, maxiter=2000))
        found = at(share)
        return found if self._gap(found[0], goals) >= 0 else at(1.0)

    def _gap(self, state: State, goals: Sequence[Goal]) -> float:
        return max(goal(state.w, state.log_time, state.log_loss) for goal in goals)


def _log_mean(rise: float) -> float:
    """``ln((1 − e^{−r})/r)``, 0 for r = 0; for r ≪ 0 without its exponential."""
    if rise < -700:
        return -rise - math.log(-rise)
    return math.log(-math.expm1(-rise) / rise) if rise != 0 else 0.0


def _shortest(velocities: Sequence[Vector]) -> tuple[list[float], Vector]:
    """The shortest element of the convex hull and its weights, by non-negative least squares.

    ``min ‖V λ‖² + (Σ λ − 1)²`` over λ ≥ 0 points the same way (Lawson & Hanson, chapter 23).
    """
    from scipy.optimize import nnls

    columns = np.stack(velocities, axis=1)
    scaled = columns / np.linalg.norm(columns, axis=0).max()
    factor: Vector = np.linalg.qr(scaled)[1]
    rows: Vector = np.vstack([factor, np.ones((1, factor.shape[1]))])
    weights, _ = nnls(rows, np.append(np.zeros(len(factor)), 1.0))
    weights = weights / weights.sum()
    shortest: Vector = columns @ weights
    return weights.tolist(), shortest
