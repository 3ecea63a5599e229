"""The local solution of the max-margin problem, for networks of up to some thousand weights.

Sequential quadratic programming on ``½‖W‖²`` with the exact Hessian of the Lagrangian. Each quadratic
program is a least-distance problem, which scipy's ``nnls`` solves (Lawson & Hanson 1974, chapter
23). A step is accepted by what is asked for: the normalised margin ``m_min/‖W‖^K``, with δ(W) and
all activations formed anew, so the way goes up only and cannot turn in a circle. The model of a step
holds each ReLU-like unit on its side of the kink, and lets it cross where its multiplier says that this
lowers ‖W‖. A semismooth Newton method ends the search.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from marginflow.kkt._gram import Call, LayerEngine
from marginflow.kkt._kinks import Units
from marginflow.kkt._problem import Problem, Rows, flat

Array = npt.NDArray[np.float64]

REACHED = 1e-8
"""The relative residual of a point that counts as found."""

_NEWTON_STEPS = 12
# Constraints below this (margins below 1 + this) are in the model of the first step; later ones take
# as many as the steps, which get shorter, may reach.
_BAND = 0.5
_LEAST_BAND = 1e-3
_REACH = 20.0
# How often units may cross in the model of one step.
_CROSSINGS = 8
# A constraint of this size, relative to 1 or to the layer's units, counts as active.
_ACTIVE = 1e-6
_SINGULAR = 1e-11
_IDLE = 3
_FINE = 1e-5
# The least curvature, relative to that of ½‖W‖², which is 1.
_CURVATURE = 0.1
# Steps below this share of ‖W‖ are worth an attempt to end the search.
_NEAR = 0.03
_EVERY = 4
_SHARE = 1e-3
_HALVINGS = 12
_LEAPS = 5
_NULLS = 3
_SAME = 1e-9
_CHUNK = 128


@dataclass(frozen=True, eq=False)
class _Met:
    """One evaluation: the pieces, the units, the calls of the layers."""

    pieces: Tensor
    units: Units
    calls: dict[nn.Module, list[Call]]


@dataclass(frozen=True, eq=False)
class _Model:
    """The solution of one quadratic program.

    Attributes:
        point: W at its minimum.
        multipliers: of all constraints, the pieces first.
        rows: the pieces.
        valid: those of them that are margins near W.
        sides: of the units, (points, units), None without units.
    """

    point: Array
    multipliers: Tensor
    rows: Rows
    valid: Tensor
    sides: Tensor | None


@dataclass(frozen=True, eq=False)
class _End:
    """Where Newton's method ended.

    Attributes:
        point: W.
        defect: how far it is from optimal and feasible, in units of ‖W‖ and 1.
        settled: whether no unit wants to cross.
    """

    point: Array
    defect: float
    settled: bool


class Search:
    """Ascent of the normalised margin by quadratic programs.

    Constraint c ≥ 0 number r is ``p_r(W) − 1`` for a piece p of a margin; after these come the
    units ``±u(W)`` of every point (an input of the network), one after the other.

    Where δ(W) is made of signs, it is constant between its jumps. The pieces are then the margins
    at the perturbations met so far: a margin is the smallest of them where nothing jumps.

    Attributes:
        rounds: quadratic programs solved so far.
    """

    def __init__(self, problem: Problem, rows: Rows, max_iterations: int) -> None:
        self.problem, self.max_iterations, self.rounds = problem, max_iterations, 0
        # The pieces that are margins near W; where δ(W) jumps, those met elsewhere are not.
        self.valid = torch.ones(0, dtype=torch.bool)
        inputs = rows.clean if problem.through else rows.perturbed
        # Duplicated examples would share their multipliers in any proportion: one of them will do.
        self.base = rows.take(_once(rows, inputs))
        self.sides: Tensor | None = None
        self._before = 0
        engine = LayerEngine.fit(problem, self.base, 2**28)
        dense = engine is not None and all(isinstance(m, nn.Linear) for m in engine.layers)
        self.engine = engine if dense else None
        self._take(self.base)

    def run(self, w: Array) -> Array:
        """The local solution, or the best point on the way to it."""
        w, height = self._scaled(w)
        best, highest = w, height
        mu: Tensor | None = None
        band, since, leaps, nulls = _BAND, _EVERY, 0, 0
        for _ in range(self.max_iterations):
            self._meet(w)
            if mu is not None and self.problem.signs and self.problem.jumps:
                mu = self._prune(mu)
            known = len(self.rows)
            model = self._model(w, band, mu)
            found = None if model is None else self._search(w, height, model)
            if found is None:
                # The curvature may mislead far from a solution; that of ½‖W‖² alone does not.
                model = self._model(w, _BAND, None) or model
                found = None if model is None else self._search(w, height, model)
            if model is None:
                break
            step = float(np.linalg.norm(model.point - w) / np.linalg.norm(w))
            since += 1
            if found is None or (step < _NEAR and since >= _EVERY):
                since = 0
                rows = self.rows
                self._take(model.rows)
                end = self._polish(w, model)
                self._take(rows)
                point, reached = self._scaled(end.point)
                attained = abs(reached + math.log(float(np.linalg.norm(end.point)))) <= _SAME
                solved = end.settled and attained and end.defect <= REACHED
                # At a jump of δ(W) the way up ends; a solution beside it may lie lower.
                if solved and (found is None or reached >= height - _SAME):
                    return point
                if reached > (height + _SAME if found is None else found[1]):
                    found = point, reached
            if found is None:
                nulls += 1
                if len(self.rows) > known and (nulls <= _NULLS or not self.problem.jumps):
                    continue  # the perturbations met on the way make the next model a better one
                found = self._leap(model)
                leaps += 1
                if found is None or leaps > _LEAPS:
                    break
            nulls = 0
            w, height = found
            if height > highest:
                best, highest = w, height
            mu, self._before = model.multipliers, len(model.rows)
            band = min(_BAND, max(_LEAST_BAND, _REACH * step))
        return best

    def _leap(self, model: _Model) -> tuple[Array, float] | None:
        """Over a jump of δ(W) that the way up ends at, to the model's minimum; it may lie lower."""
        if not self.problem.jumps:
            return None
        point, height = self._scaled(model.point)
        return None if math.isinf(height) else (point, height)

    # --- the true margins

    def _scaled(self, w: Array) -> tuple[Array, float]:
        """W with smallest margin 1, and ``ln(m_min/‖W‖^K)/K``; −∞ where a margin is not positive."""
        self.problem.put(torch.from_numpy(w))
        rows = self._formed() if self.problem.signs else self.rows
        with torch.set_grad_enabled(self.problem.through):
            m = float(self.problem.margins(rows).detach().min())
        if not 0 < m < math.inf:
            return w, -math.inf
        w = w / m ** (1 / self.problem.order)
        return w, -math.log(float(np.linalg.norm(w)))

    def _formed(self) -> Rows:
        """The examples at δ(W)."""
        rows = self.base
        return replace(rows, perturbed=self.problem.perturbed(rows))

    def _meet(self, w: Array) -> None:
        """Add the perturbations at W to those met."""
        if not self.problem.signs:
            return
        self.problem.put(torch.from_numpy(w))
        rows = Rows.joined([self.rows, self._formed()])
        self._take(rows.take(_once(rows, rows.perturbed)))

    def _prune(self, mu: Tensor) -> Tensor:
        """Forget the perturbations that, δ(W) having jumped, are none of the attack; their multipliers go."""
        with torch.no_grad():
            held = self.problem.margins(self.rows) >= 1 - _SAME
        pieces = torch.zeros(len(self.rows), dtype=torch.float64)
        pieces[: self._before] = mu[: self._before]
        self._take(self.rows.take(held))
        self._before = len(self.rows)
        return pieces[held]

    def _take(self, rows: Rows) -> None:
        self.rows = rows
        # Rows of several rivals share the units of their point.
        inputs = rows.clean if self.problem.through else rows.perturbed
        keys = torch.cat([inputs.flatten(1), rows.labels.double().unsqueeze(1)], dim=1)
        self.first, self.point = _distinct(keys)

    def _search(self, w: Array, height: float, model: _Model) -> tuple[Array, float] | None:
        """The longest halved step towards the model's minimum that raises the margin enough."""
        gain = math.log(float(np.linalg.norm(w)) / float(np.linalg.norm(model.point)))
        share = 1.0
        for _ in range(_HALVINGS):
            trial = w + share * (model.point - w)
            point, reached = self._scaled(trial)
            if reached > height + _SHARE * share * max(gain, 0.0) and reached > height + 1e-14:
                return point, reached
            self._meet(trial)
            share /= 2
        return None

    # --- the model of a step

    def _natural(self) -> Tensor | None:
        """The sides that the units of the points are on, (points, units)."""
        if not self.problem.has_units:
            return None
        rows = self.rows.take(self.first)
        with self.problem.kinks.observed() as met:
            self.problem.margins(rows)
        return met.u.detach() > 0 if met.before else None

    def _model(self, w: Array, band: float, mu: Tensor | None) -> _Model | None:
        """The quadratic program at W, with the units crossing that want to.

        Args:
            w: W, of smallest margin 1.
            band: of the constraints that enter.
            mu: multipliers in the Hessian of the Lagrangian; None takes that of ``½‖W‖²``.
        """
        self.problem.put(torch.from_numpy(w))
        self.sides = self._natural()
        point = torch.from_numpy(w)
        root: Tensor | None = None
        self.valid = torch.ones(len(self.rows), dtype=torch.bool)
        if self.problem.signs:
            with torch.no_grad():
                self.valid = self.problem.margins(self.rows) >= 1 - _SAME
        if mu is not None:
            mu = self._padded(mu)
            held = torch.nonzero(mu).squeeze(1)
            root = _root(torch.eye(len(w), dtype=torch.float64) - self._hessian(held, mu[held]))
        found: _Model | None = None
        seen: set[bytes] = set()
        for _ in range(_CROSSINGS):
            met = self._evaluate()
            c = self._constraints(met).detach()
            near = torch.nonzero(self._near(c, band)).squeeze(1)
            jacobian = self._jacobian(met, near)
            solved = _least_distance(point, jacobian, c[near], root)
            self.rounds += 1
            if solved is None:
                break
            multipliers = torch.zeros_like(c)
            multipliers[near] = solved[1]
            found = _Model(solved[0].numpy(), multipliers, self.rows, self.valid, self.sides)
            if self.sides is None:
                break
            crossing = self._crossing(met, multipliers)
            seen.add(self.sides.numpy().tobytes())
            sides = self.sides ^ crossing
            if not bool(crossing.any()) or sides.numpy().tobytes() in seen:
                break
            self.sides = sides
        if found is not None:
            self.sides = found.sides
        return found

    def _padded(self, mu: Tensor) -> Tensor:
        """Multipliers for all constraints: those of pieces and units met since are 0."""
        units = 0 if self.sides is None else self.sides.numel()
        found = torch.zeros(len(self.rows) + units, dtype=torch.float64)
        if len(mu) == len(found):
            return mu
        known = self._before
        found[:known] = mu[:known]
        return found

    def _evaluate(self) -> _Met:
        """The pieces and the units at W, with the sides held, for autograd to differentiate."""
        with ExitStack() as stack:
            calls = stack.enter_context(self.engine.recorded()) if self.engine else {}
            units = Units()
            if self.sides is not None:
                sides = self.sides[self.point]
                units = stack.enter_context(self.problem.kinks.observed(sides))
            return _Met(self.problem.margins(self.rows), units, calls)

    def _constraints(self, met: _Met) -> Tensor:
        """All c, with their graph."""
        if self.sides is None:
            return met.pieces - 1
        signs = torch.where(self.sides, 1.0, -1.0).double()
        return torch.cat([met.pieces - 1, (signs * met.units.u[self.first]).reshape(-1)])

    def _near(self, c: Tensor, band: float) -> Tensor:
        """The margins near 1, and the units near 0 of their points."""
        r = len(self.rows)
        near = c <= band * self._scale(c)
        if self.problem.signs:
            near[:r] &= self.valid
        points = torch.zeros(len(self.first), dtype=torch.bool)
        points[self.point[near[:r]]] = True
        units = 0 if self.sides is None else self.sides.shape[1]
        near[r:] &= points.unsqueeze(1).expand(-1, units).reshape(-1)
        return near

    def _scale(self, c: Tensor) -> Tensor:
        """What each constraint is measured in: 1, and for a unit the largest one of its point."""
        scale = torch.ones_like(c)
        if self.sides is not None:
            units = c[len(self.rows) :].view(self.sides.shape)
            largest = units.abs().amax(dim=1, keepdim=True).expand_as(units)
            scale[len(self.rows) :] = largest.reshape(-1)
        return scale

    def _crossing(self, met: _Met, multipliers: Tensor) -> Tensor:
        """Which units lower ‖W‖ by crossing their kink, (points, units).

        A unit held at u = 0 with multiplier ν is where it belongs if its margin's multipliers λ allow
        ``ν ≤ Σ λ_r max(0, −∂p_r/∂σ)(1 − slope)``: then some slope between the two sides makes
        W stationary. Otherwise the gain of crossing outweighs what the margins lose.
        """
        if self.sides is None:
            raise RuntimeError("there are no units")
        r = len(self.rows)
        signals = torch.autograd.grad(
            met.pieces.sum(), met.units.after, retain_graph=True, materialize_grads=True
        )
        loss = torch.cat(
            [(-b).clamp(min=0) * (1 - s) for b, s in zip(signals, met.units.slopes, strict=True)],
            dim=1,
        )
        allowed = torch.zeros(self.sides.shape, dtype=torch.float64)
        allowed.index_add_(0, self.point, multipliers[:r].unsqueeze(1) * loss)
        found = multipliers[r:].view(self.sides.shape)
        scale = _ACTIVE * max(float(allowed.max()), float(found.max()))
        return found - allowed > scale

    # --- derivatives

    def _jacobian(self, met: _Met, chosen: Tensor) -> Tensor:
        """``∂c/∂W`` of the chosen constraints, (number, weights)."""
        if len(chosen) == 0:
            return torch.zeros((0, len(self.problem.weights)), dtype=torch.float64)
        if self.engine is not None:
            return self._layer_jacobian(met, chosen, self.engine)
        c = self._constraints(met)[chosen]
        rows = torch.autograd.grad(
            c,
            self.problem.parameters,
            torch.eye(len(chosen), dtype=c.dtype),
            retain_graph=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        return torch.cat([g.reshape(len(chosen), -1) for g in rows], dim=1)

    def _layer_jacobian(self, met: _Met, chosen: Tensor, engine: LayerEngine) -> Tensor:
        """The same by ``b_i a_iᵀ``: a backward pass for the margins and for each unit, not for each row."""
        r = len(self.rows)
        heads = [met.pieces.sum()]
        row, head = chosen.clone(), torch.zeros_like(chosen)
        signs = torch.ones(len(chosen), dtype=torch.float64)
        if self.sides is not None:
            heads += list(met.units.u.sum(dim=0))
            unit = chosen >= r
            count = self.sides.shape[1]
            row[unit] = self.first[(chosen[unit] - r) // count]
            head[unit] = 1 + (chosen[unit] - r) % count
            signs[unit] = torch.where(self.sides.reshape(-1)[chosen[unit] - r], 1.0, -1.0).double()
        calls = {module: met.calls[module][0] for module in engine.layers}
        signals = torch.autograd.grad(
            torch.stack(heads),
            [call.output for call in calls.values()],
            torch.eye(len(heads), dtype=torch.float64),
            retain_graph=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        found: dict[int, Tensor] = {}
        for (module, call), signal in zip(calls.items(), signals, strict=True):
            b = signal[head, row] * signs.unsqueeze(1)
            (a,) = call.args
            if isinstance(a, Tensor):
                found[id(module.weight)] = (b.unsqueeze(2) * a.detach()[row].unsqueeze(1)).flatten(
                    1
                )
            found[id(module.bias)] = b
        return torch.cat([found[id(p)] for p in self.problem.parameters], dim=1)

    def _hessian(self, active: Tensor, mu: Tensor) -> Tensor:
        """``Σ μ_k ∂²c_k/∂W²``, one backward pass a weight."""
        c = self._constraints(self._evaluate())[active]
        parameters = self.problem.parameters
        gradient = torch.autograd.grad(
            (mu * c).sum(), parameters, create_graph=True, materialize_grads=True
        )
        slopes = flat(list(gradient))
        n = len(slopes)
        found = torch.zeros((n, n), dtype=torch.float64)
        if slopes.requires_grad:
            for start in range(0, n, _CHUNK):
                part = slopes[start : start + _CHUNK]
                second = torch.autograd.grad(
                    part,
                    parameters,
                    torch.eye(len(part), dtype=torch.float64),
                    retain_graph=True,
                    is_grads_batched=True,
                    materialize_grads=True,
                )
                found[start : start + _CHUNK] = torch.cat(
                    [g.reshape(len(part), -1) for g in second], dim=1
                )
        return (found + found.T) / 2

    # --- the end of the search

    def _polish(self, w: Array, model: _Model) -> _End:
        """Newton's method on ``W = Σ μ_k ∂c_k, c_k = 0`` for the active constraints.

        Active next are those with ``μ_k > c_k``: a semismooth Newton method, which finds the active
        set while it converges. Rotations of a layer leave margins and norms alone, so the system may
        be singular: its least-squares solution of least norm is taken.

        Returns:
            the best point met.
        """
        from scipy.linalg import lstsq

        self.sides, self.valid = model.sides, model.valid
        point, mu = torch.from_numpy(w), model.multipliers
        n = len(w)
        best, least, settled, idle = w, np.inf, False, 0
        active = torch.nonzero(mu > 0).squeeze(1)
        for _ in range(_NEWTON_STEPS):
            self.problem.put(point)
            met = self._evaluate()
            c = self._constraints(met).detach()
            jacobian = self._jacobian(met, active)
            held, s = mu[active], len(active)
            system = torch.zeros((n + s, n + s), dtype=torch.float64)
            system[:n, :n] = torch.eye(n, dtype=torch.float64) - self._hessian(active, held)
            system[:n, n:] = -jacobian.T
            system[n:, :n] = jacobian
            defect = torch.cat([point - jacobian.T @ held, c[active]])
            # The singular values are what is exact, and several times as slow.
            driver = "gelsd" if least <= _FINE else "gelsy"
            # scipy's, not torch's: MKL's rounding hangs on where its workspace lies, and where the
            # system is singular that decides between solutions.
            solved, *_ = lstsq(system.numpy(), -defect.numpy(), _SINGULAR, lapack_driver=driver)
            step = torch.from_numpy(solved)
            point = point + step[:n]
            mu = torch.zeros_like(c)
            mu[active] = held + step[n:]
            if not bool(torch.isfinite(point).all()):
                break
            self.problem.put(point)
            met = self._evaluate()
            c = self._constraints(met).detach()
            size = self._defect(point, c, active, mu[active], self._jacobian(met, active))
            if size < least:
                best, least = point.numpy(), size
                settled = self.sides is None or not bool(self._crossing(met, mu).any())
                idle = 0
            else:
                idle += 1
            if idle and (least <= REACHED or idle >= _IDLE):
                break
            active = torch.nonzero(self._counted(c) & (mu > c / self._scale(c))).squeeze(1)
        return _End(best, least, settled)

    def _counted(self, c: Tensor) -> Tensor:
        """Which constraints there are: all but the pieces that are not margins near W."""
        return torch.cat([self.valid, torch.ones(len(c) - len(self.valid), dtype=torch.bool)])

    def _defect(
        self, point: Tensor, c: Tensor, active: Tensor, mu: Tensor, jacobian: Tensor
    ) -> float:
        """The largest of stationarity, complementarity, feasibility and the multipliers' signs."""
        c = c / self._scale(c)
        size = torch.linalg.vector_norm(point)
        worst = (-c[self._counted(c)]).amax()
        parts = [torch.linalg.vector_norm(point - jacobian.T @ mu) / size, worst]
        if len(active):
            parts += [c[active].abs().amax(), -mu.amin() / mu.abs().amax()]
        return max(float(part) for part in parts)

    def advice(self, residual: float) -> str:
        """What to do about a residual that is too large."""
        found = f"r = {residual:.1e} at the point found"
        attack = self.problem.attack
        if attack is not None and not attack.exact and attack.eps > 0:
            return (
                f"{found}: δ(W) may jump where a ReLU or a sign changes sides, and the search end at "
                "such a place; use squared ReLU or a finite set, or try another start"
            )
        return f"{found}: start nearer to a KKT point by training longer, or raise max_iterations"


def _root(hessian: Tensor) -> Tensor:
    """``H^{-1/2}`` of the Hessian made positive."""
    values, vectors = torch.linalg.eigh(hessian)
    values = values.abs().clamp(min=_CURVATURE)
    root: Tensor = (vectors / values.sqrt()) @ vectors.T
    return root


def _least_distance(
    w: Tensor, jacobian: Tensor, c: Tensor, root: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """``argmin_v ½‖v‖²`` to second order at W, subject to ``c + J(v − W) ≥ 0``, and its multipliers.

    With ``R = H^{-1/2}``, ``v = W − R²W + R t``: the t of least norm with ``At ≥ b``. None where
    no v is feasible, and where no constraint moves with v: the model knows nothing then.
    """
    from scipy.optimize import nnls

    a = jacobian if root is None else jacobian @ root
    shift = w if root is None else root @ (root @ w)
    b = jacobian @ shift - c
    lengths = torch.linalg.vector_norm(a, dim=1)
    held = lengths > 0
    if not bool(held.any()):  # scipy's nnls ends the process on a matrix without columns
        return None
    a = a[held] / lengths[held].unsqueeze(1)
    unit = torch.linalg.vector_norm(w)
    b = b[held] / (lengths[held] * unit)
    system = np.vstack([a.numpy().T, b.numpy()[None]])
    last = np.zeros(len(system))
    last[-1] = 1.0
    try:
        u, distance = nnls(system, last, maxiter=30 * max(system.shape))
    except RuntimeError:  # too many iterations
        return None
    slack = 1.0 - float(b.numpy() @ u)
    if distance <= 1e-10 or slack <= 0:
        return None
    shares = torch.from_numpy(u) * (unit / slack)
    t = a.T @ shares
    point = w - shift + (t if root is None else root @ t)
    multipliers = torch.zeros_like(c)
    multipliers[held] = shares / lengths[held]
    return point, multipliers


def _once(rows: Rows, inputs: Tensor) -> Tensor:
    """The first of each kind of row: input, label and rival."""
    keys = torch.stack([rows.labels.double(), rows.rivals.double()], dim=1)
    first, _ = _distinct(torch.cat([inputs.flatten(1), keys], dim=1))
    return first.sort().values


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The first index of each distinct row, and which of them each row equals."""
    _, group = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(keys), dtype=torch.int64)
    first.scatter_reduce_(0, group, torch.arange(len(keys)), reduce="amin")
    return first, group
