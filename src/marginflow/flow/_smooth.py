"""Flows of smooth fields by scipy's integrators, in s and then in ln‖W‖."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marginflow.flow._chain import LowRank
from marginflow.flow._field import Field, FieldValue, Vector
from marginflow.flow._state import Goal, OnStep, State, is_separated

if TYPE_CHECKING:
    from scipy.integrate import OdeSolver

_STALL = 2500  # evaluations without getting on: smooth fields take some dozens a step
_PROGRESS = 0.02  # what getting on means, in relative change of the weights
_FIRST = 0.01  # of ‖W‖: the first step in the new variable, which it then adapts
_TRIALS = 8
_EXACT = 1e-9  # a goal is hit to that, relative to max(1, |ln t|)


class Stalled(Exception):  # noqa: N818  a message between integrators, not an error
    """The step shrinks without end; the last good state goes along."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state


class Smooth:
    """``(W, tL)`` in the variable s (``dW/ds = v``), and in ln‖W‖ once the data are separated.

    With a = ⟨W, v⟩ and c = ‖W‖²/a (1 in the variable s):
    ``dW/dτ = c v``, ``d(tL)/dτ = c (1 − tL φ′)``, ``φ′ = ⟨∇φ, v⟩``, φ = −ln L.

    ``stiff`` is Radau IIA of order 5 with the exact Jacobian: as ‖W‖ grows the directions relax
    faster and faster (at a rate like ln t), which an implicit method does not notice.
    ``runge-kutta`` is the explicit pair of Dormand and Prince, for networks too large for a
    Jacobian. Both are one-step methods: a restart at every goal costs little, and makes
    each stretch a function of the state at its beginning.

    Args:
        field: the vector field.
        rtol: relative tolerance of a step, for the weights in units of ‖W‖/√N.
    """

    def __init__(self, field: Field, rtol: float) -> None:
        self.field = field
        self.rtol = rtol

    def advance(
        self,
        state: State,
        goals: Sequence[Goal],
        on_step: OnStep,
        give_up: Callable[[State], bool],
    ) -> State:
        """Integrate until a goal is reached or ``give_up`` says so.

        Raises:
            Stalled: the field jumps and the step shrinks without end.
        """
        while True:
            if give_up(state):
                return state
            state, reached = self._stretch(state, goals, on_step, give_up)
            if reached:
                return state

    def _stretch(
        self,
        state: State,
        goals: Sequence[Goal],
        on_step: OnStep,
        give_up: Callable[[State], bool],
    ) -> tuple[State, bool]:
        """To a goal, or to the moment of separation, where the variable changes."""
        by_norm = state.separated
        y = np.append(state.w, math.exp(state.log_tl))  # tL is of the order of 1/‖∇ ln L‖²
        start = 0.0
        solver = self._solver(state, y, start, math.inf, state.step_size)
        mark, passed, spent = state.w, 0.0, self.field.evaluations
        while True:
            before, at = solver.y.copy(), solver.t
            self._step(solver)
            if solver.status == "failed":
                raise Stalled(self._state(before, state, state.step_size))
            value = self.field(solver.y[:-1])
            if self._reached(solver.y, value, goals) >= 0:
                y, size = self._hit(state, before, at, solver, goals)
                there = self.field(y[:-1])
                separated = by_norm or is_separated(self.field, there)
                # Where that is reached in the same step, the other variable needs a step of its own.
                size = size if separated == by_norm else _FIRST
                now = self._state(y, state, size, separated=separated)
                on_step(now, there)
                return now, True
            now = self._state(solver.y, state, float(solver.h_abs))
            on_step(now, value)
            if not by_norm and is_separated(self.field, value):
                return self._state(solver.y, state, _FIRST, separated=True), False
            if give_up(now):
                return now, False
            # Near a jump of the field the step collapses: then another integrator must go on.
            far = np.linalg.norm(solver.y[:-1] - mark) > _PROGRESS * np.linalg.norm(mark)
            # In s the weights may rest for long (at a saddle): then s itself must get on.
            unit = 1.0 if by_norm else np.linalg.norm(now.w) / np.linalg.norm(value.velocity)
            if far or solver.t - passed > _PROGRESS * max(passed, unit):
                mark, passed, spent = solver.y[:-1].copy(), solver.t, self.field.evaluations
            elif self.field.evaluations - spent > _STALL:
                raise Stalled(now)

    def _hit(
        self,
        state: State,
        before: Vector,
        at: float,
        solver: OdeSolver,
        goals: Sequence[Goal],
    ) -> tuple[Vector, float]:
        """The weights where the first goal is reached within the last step, and the next step's size."""
        from scipy.optimize import brentq

        dense = solver.dense_output()

        def distance(r: float) -> float:
            y = dense(r)
            return self._reached(y, self.field(y[:-1]), goals)

        natural = max(float(solver.h_abs), solver.t - at)
        low, gap_low = at, self._reached(before, self.field(before[:-1]), goals)
        place = solver.t
        if gap_low < 0 <= distance(solver.t):
            # From weights of 1e-30 s is counted in 1e90, from 1e30 in 1e-60: a bisection takes its time.
            place = float(
                brentq(distance, at, solver.t, xtol=1e-14 * natural, rtol=1e-13, maxiter=2000)
            )
        y = before
        for _ in range(_TRIALS):
            # Dense output is of lower order than the step: step there again, and correct.
            inner = self._solver(state, before, at, place, place - at)
            while inner.status == "running":
                self._step(inner)
            y = inner.y
            value = self.field(y[:-1])
            gap = self._reached(y, value, goals)
            slack = _EXACT * max(1.0, abs(self._log_time(y, value)))
            if 0 <= gap <= slack or place <= at:
                break
            slope = (gap - gap_low) / (place - low)
            if not slope > 0 or not math.isfinite(slope):
                break
            # Half the slack beyond: the goal shall be reached, not almost.
            place = min(place - (gap - 0.5 * slack) / slope, at + 2 * (solver.t - at))
        return y, natural

    def _solver(
        self, state: State, y: Vector, start: float, stop: float, first: float
    ) -> OdeSolver:
        from scipy.integrate import RK45, Radau

        from marginflow.flow._radau import LowRankRadau  # scipy is only imported where it is used

        norm = float(np.linalg.norm(y[:-1]))
        atol = np.full(len(y), self.rtol * norm / math.sqrt(len(y) - 1))
        # tL begins at 0 and is then at least the first step: relative accuracy from there on.
        atol[-1] = self.rtol * 1e-3 * max(y[-1], first)
        rate, by_norm = self._rate(state.separated), state.separated
        options = {"rtol": self.rtol, "atol": atol, "first_step": min(first, stop - start)}
        if state.method == "stiff" and self.field.has_low_rank:
            return LowRankRadau(rate, start, y, stop, self._low_rank(by_norm), **options)
        if state.method == "stiff":
            return Radau(rate, start, y, stop, jac=self._jacobian(by_norm), **options)
        return RK45(rate, start, y, stop, **options)

    def _step(self, solver: OdeSolver) -> None:
        from scipy.linalg import LinAlgWarning

        before = solver.nlu
        with warnings.catch_warnings():
            # At a saddle 1/h and J may both be 0 beside an entry of 1: the step then fails, and is halved.
            warnings.simplefilter("ignore", LinAlgWarning)
            solver.step()
        self.field.factorizations += solver.nlu - before

    def _rate(self, by_norm: bool) -> Callable[[float, Vector], Vector]:
        conservative = self.field.conservative

        def rate(_: float, y: Vector) -> Vector:
            w, q = y[:-1], y[-1]
            v = self.field.velocity(w)
            slope = v if conservative else self.field.potential_slope(w)
            c = (w @ w) / (w @ v) if by_norm else 1.0
            found = np.empty_like(y)
            np.multiply(v, c, out=found[:-1])
            found[-1] = c * (1 - q * (slope @ v))
            return found

        return rate

    def _jacobian(self, by_norm: bool) -> Callable[[float, Vector], NDArray[np.float64]]:
        def jacobian(_: float, y: Vector) -> NDArray[np.float64]:
            w, q = y[:-1], y[-1]
            v = self.field.velocity(w)
            dv = self.field.jacobian(w)
            if self.field.conservative:
                return _assembled(w, q, v, dv, v, 2 * (v @ dv), by_norm)
            slope = self.field.potential_slope(w)
            by_w = self.field.curvature(w, v) + slope @ dv
            return _assembled(w, q, v, dv, slope, by_w, by_norm)

        return jacobian

    def _low_rank(self, by_norm: bool) -> Callable[[float, Vector], LowRank]:
        def jacobian(_: float, y: Vector) -> LowRank:
            w, q = y[:-1], y[-1]
            found = self.field.low_rank(w)
            basis, dv = found.basis, found.core
            # W and v lie in the basis, so the same formulas hold for their coordinates.
            v = self.field.velocity(w) @ basis
            core = _assembled(w @ basis, q, v, dv, v, 2 * (v @ dv), by_norm)
            wider = np.zeros((len(y), len(core)))
            wider[:-1, :-1] = basis
            wider[-1, -1] = 1.0
            return LowRank(wider, core)

        return jacobian

    def _reached(self, y: Vector, value: FieldValue, goals: Sequence[Goal]) -> float:
        log_time = self._log_time(y, value)
        return max(goal(y[:-1], log_time, value.log_loss) for goal in goals)

    def _log_time(self, y: Vector, value: FieldValue) -> float:
        return (math.log(y[-1]) if y[-1] > 0 else -math.inf) - value.log_loss

    def _state(self, y: Vector, old: State, size: float, separated: bool | None = None) -> State:
        value = self.field(y[:-1])
        return State(
            y[:-1].copy(),
            math.log(y[-1]) if y[-1] > 0 else -math.inf,
            value.log_loss,
            size,
            old.separated if separated is None else separated,
            old.method,
        )


def _assembled(
    w: Vector,
    q: float,
    v: Vector,
    dv: NDArray[np.float64],
    slope: Vector,
    by_w: Vector,
    by_norm: bool,
) -> NDArray[np.float64]:
    """The Jacobian of ``(c v, c (1 − q ρ))`` by (W, q) with ``ρ = ⟨slope, v⟩``, ``by_w = ∂ρ/∂W``."""
    n = len(w)
    rise = float(slope @ v)
    full = np.zeros((n + 1, n + 1))
    c = 1.0
    if by_norm:
        a, square = float(w @ v), float(w @ w)
        c = square / a
        dc = (2 * w * a - square * (v + w @ dv)) / a**2
        np.multiply(v[:, np.newaxis], dc, out=full[:n, :n])
        full[n, :n] = dc * (1 - q * rise)
    full[:n, :n] += c * dv
    full[n, :n] -= c * q * by_w
    full[n, n] = -c * rise
    return full
