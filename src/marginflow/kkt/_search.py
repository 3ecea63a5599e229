"""The local solution of the max-margin problem, for networks of up to some thousand weights.

scipy's SLSQP goes most of the way; a semismooth Newton method ends it. On dense ReLU networks the sides of
the units are held meanwhile, which makes the problem smooth, and revised in between.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from marginflow.kkt import _nnls
from marginflow.kkt._gram import Call, LayerEngine
from marginflow.kkt._kinks import Units
from marginflow.kkt._problem import Problem, Rows, flat

Array = npt.NDArray[np.float64]

REACHED = 1e-8
"""The relative residual of a point that counts as found."""

_IDLE = 4
_FINISHES = 3
_NEWTON_STEPS = 12
# Constraints below this (margins below 1 + this) are in a local problem from its start.
_BAND = 0.5
_VIOLATED = 1e-8
# A constraint of this size, relative to 1 or to the layer's units, counts as active.
_ACTIVE = 1e-6
_SINGULAR = 1e-11
_ATTEMPTS = 2
_PLAIN_STEPS = 10
_SETTLED = 1e-8


@dataclass(frozen=True, eq=False)
class _Met:
    """One evaluation: the weights' bytes, the pieces, the units, the calls of the layers."""

    key: bytes
    pieces: Tensor
    units: Units
    calls: dict[nn.Module, list[Call]]


class Search:
    """Local problems with the activations' sides held, and the crossings between them.

    Constraint c ≥ 0 number r is ``p_r(W) − 1`` for a piece p of a margin; after these come the
    units ``±u(W)`` of every point (an input of the network), one after the other.

    Attributes:
        rounds: local problems solved so far.
    """

    def __init__(self, problem: Problem, rows: Rows, max_iterations: int) -> None:
        self.problem, self.max_iterations, self.rounds = problem, max_iterations, 0
        # Duplicated examples would share their multipliers in any proportion: one of them will do.
        inputs = rows.clean if problem.through else rows.perturbed
        signed = torch.cat([inputs.flatten(1), rows.labels.double().unsqueeze(1)], dim=1)
        once, _ = _distinct(torch.cat([signed, rows.rivals.double().unsqueeze(1)], dim=1))
        self.rows = rows.take(once)
        # Rows of several rivals share the units of their point.
        self.first, self.point = _distinct(inputs[once].flatten(1))
        self.sides: Tensor | None = None
        self._met: _Met | None = None
        engine = LayerEngine.fit(problem, self.rows, 2**28)
        dense = engine is not None and all(isinstance(m, nn.Linear) for m in engine.layers)
        self.engine = engine if dense else None

    def run(self, w: Array) -> Array:
        """The local solution, or the best point on the way to it."""
        units = self._natural(w)
        if units.shape[1]:
            self.sides = units > 0
        best, least = w, np.inf
        for _ in range(_FINISHES):
            w = self._descend(w)
            point, defect = self._polish(w)
            if defect < least:
                best, least = point, defect
            if least <= REACHED:
                break
            w = self._project(w, torch.nonzero(self._near(w)).squeeze(1))
        return best

    def _descend(self, w: Array) -> Array:
        """Local problems and crossings until no unit wants to cross."""
        least, idle = np.inf, 0
        while idle < _IDLE:
            w = self._solve(w)
            self.rounds += 1
            # Crossings that gain nothing could go on in a circle.
            size = float(w @ w)
            idle = 0 if size < (1 - _SETTLED) * least else idle + 1
            least = min(least, size)
            if not self._cross(w):
                break
        return w

    def _natural(self, w: Array) -> Tensor:
        """The pre-activations of the points, (points, units); none where δ is differentiated."""
        self.problem.put(torch.from_numpy(w))
        rows = self.rows.take(self.first)
        if not self.problem.through:
            with torch.no_grad(), self.problem.kinks.observed() as met:
                self.problem.margins(rows)
            if met.before:
                return met.u
        return torch.empty((len(rows), 0), dtype=torch.float64)

    def _evaluate(self, w: Array) -> _Met:
        """The pieces and the units at W, with the sides held, for autograd to differentiate."""
        key = w.tobytes()
        if self._met is None or self._met.key != key:
            self.problem.put(torch.from_numpy(w))
            with ExitStack() as stack:
                calls = stack.enter_context(self.engine.recorded()) if self.engine else {}
                units = Units()
                if self.sides is not None:
                    sides = self.sides[self.point]
                    units = stack.enter_context(self.problem.kinks.observed(sides))
                self._met = _Met(key, self.problem.margins(self.rows), units, calls)
        return self._met

    def _constraints(self, w: Array) -> Tensor:
        """All c, with their graph."""
        met = self._evaluate(w)
        if self.sides is None:
            return met.pieces - 1
        signs = torch.where(self.sides, 1.0, -1.0).double()
        return torch.cat([met.pieces - 1, (signs * met.units.u[self.first]).reshape(-1)])

    def _jacobian(self, w: Array, chosen: Tensor) -> Tensor:
        """``∂c/∂W`` of the chosen constraints, (number, weights)."""
        if len(chosen) == 0:
            return torch.zeros((0, len(w)), dtype=torch.float64)
        if self.engine is not None:
            return self._layer_jacobian(w, chosen, self.engine)
        c = self._constraints(w)[chosen]
        rows = torch.autograd.grad(
            c,
            self.problem.parameters,
            torch.eye(len(chosen), dtype=c.dtype),
            retain_graph=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        return torch.cat([g.reshape(len(chosen), -1) for g in rows], dim=1)

    def _layer_jacobian(self, w: Array, chosen: Tensor, engine: LayerEngine) -> Tensor:
        """The same by ``b_i a_iᵀ``: a backward pass for the margins and for each unit, not for each row."""
        met, r = self._evaluate(w), len(self.rows)
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

    def _solve(self, w: Array) -> Array:
        """One local problem, with the constraints that are near at first and those that prove needed."""
        r = len(self.rows)
        near = self._near(w)
        points = torch.zeros(len(self.first), dtype=torch.bool)
        points[self.point[near[:r]]] = True
        while True:
            found = self._minimise(w, torch.nonzero(near).squeeze(1))
            # The units of the other points were not held: they are where they are.
            if self.sides is not None:
                free = torch.where(points.unsqueeze(1), self.sides, self._natural(found) > 0)
                held, self.sides, self._met = self.sides, free, None
            c = self._constraints(found).detach()
            missed = (c < -_VIOLATED * self._scale(c)) & ~near
            if not bool(missed.any()):
                return found
            near = near | missed
            points[self.point[missed[:r]]] = True
            if self.sides is not None:
                self.sides, self._met = held, None

    def _near(self, w: Array) -> Tensor:
        """The margins near 1, and the units near 0 of their points."""
        c, r = self._constraints(w).detach(), len(self.rows)
        near = c <= _BAND * self._scale(c)
        points = torch.zeros(len(self.first), dtype=torch.bool)
        points[self.point[near[:r]]] = True
        near[r:] &= self._of(points)
        return near

    def _of(self, points: Tensor) -> Tensor:
        """Which unit constraints belong to the points."""
        units = 0 if self.sides is None else self.sides.shape[1]
        return points.unsqueeze(1).expand(-1, units).reshape(-1)

    def _scale(self, c: Tensor) -> Tensor:
        """What each constraint is measured in: 1, and for a unit the largest one of its point."""
        scale = torch.ones_like(c)
        if self.sides is not None:
            units = c[len(self.rows) :].view(self.sides.shape)
            largest = units.abs().amax(dim=1, keepdim=True).expand_as(units)
            scale[len(self.rows) :] = largest.reshape(-1)
        return scale

    def _minimise(self, w: Array, chosen: Tensor) -> Array:
        """SLSQP; where it stops early (at vertices with many constraints), some plain steps lead on."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                w = self._project(w, chosen)
            found = minimize(
                lambda v: (v @ v / 2, v),
                w,
                jac=True,
                method="SLSQP",
                constraints=[
                    {
                        "type": "ineq",
                        "fun": lambda v: self._constraints(v).detach()[chosen].numpy(),
                        "jac": lambda v: self._jacobian(v, chosen).numpy(),
                    }
                ],
                options={"maxiter": self.max_iterations, "ftol": 1e-15},
            )
            before, w = float(w @ w), np.asarray(found.x, dtype=np.float64)
            if abs(before - w @ w) <= _SETTLED * before:
                break
            _, mu, jacobian = self._multipliers(w)
            if np.linalg.norm(w - (jacobian.T @ mu).numpy()) <= REACHED * np.linalg.norm(w):
                break
        return w

    def _project(self, w: Array, chosen: Tensor) -> Array:
        """Half-way to the point of least norm that meets the linearised constraints, some times over.

        That is sequential quadratic programming with the Hessian of ``½‖W‖²`` alone: slow in the
        end, but its subproblem is a non-negative least-squares problem, which does not fail.
        """
        for _ in range(_PLAIN_STEPS):
            point = torch.from_numpy(w)
            c = self._constraints(w).detach()[chosen]
            jacobian = self._jacobian(w, chosen)
            lengths = torch.linalg.vector_norm(jacobian, dim=1)
            held = lengths > 0
            rows = jacobian[held] / lengths[held].unsqueeze(1)
            target = rows @ point - c[held] / lengths[held]
            gram = (rows @ rows.T).fill_diagonal_(1.0)
            nearest = rows.T @ _nnls.solve(gram, target).multipliers
            w = ((point + nearest) / 2).numpy()
        return w

    def _multipliers(self, w: Array) -> tuple[Tensor, Tensor, Tensor]:
        """The active constraints, their multipliers and their gradients at a local solution."""
        c = self._constraints(w).detach()
        active = torch.nonzero(c.abs() <= _ACTIVE * self._scale(c)).squeeze(1)
        jacobian = self._jacobian(w, active)
        lengths = torch.linalg.vector_norm(jacobian, dim=1)
        held = lengths > 0
        active, jacobian, lengths = active[held], jacobian[held], lengths[held]
        weights = torch.from_numpy(w)
        size_w = torch.linalg.vector_norm(weights)
        rows = jacobian / lengths.unsqueeze(1)
        gram = (rows @ rows.T).fill_diagonal_(1.0)
        found = _nnls.solve(gram, rows @ weights / size_w).multipliers
        return active, found * size_w / lengths, jacobian

    def _cross(self, w: Array) -> bool:
        """Let the units cross their kink that lower ‖W‖ by it; whether there were any.

        A unit held at u = 0 with multiplier ν is where it belongs if its margin's multipliers λ allow
        ``ν ≤ Σ λ_r max(0, −∂p_r/∂σ)(1 − slope)``: then some slope between the two sides makes
        W stationary. Otherwise the gain of crossing outweighs what the margins lose.
        """
        if self.sides is None:
            return False
        active, multipliers, _ = self._multipliers(w)
        r = len(self.rows)
        of_rows = torch.zeros(r, dtype=torch.float64)
        margins = active < r
        of_rows[active[margins]] = multipliers[margins]
        pieces, units = self._evaluate(w).pieces, self._evaluate(w).units
        signals = torch.autograd.grad(
            pieces.sum(), units.after, retain_graph=True, materialize_grads=True
        )
        loss = torch.cat(
            [(-b).clamp(min=0) * (1 - s) for b, s in zip(signals, units.slopes, strict=True)], dim=1
        )
        allowed = torch.zeros(self.sides.shape, dtype=torch.float64)
        allowed.index_add_(0, self.point, of_rows.unsqueeze(1) * loss)
        found = torch.zeros(self.sides.numel(), dtype=torch.float64)
        found[active[~margins] - r] = multipliers[~margins]
        excess = found.view(self.sides.shape) - allowed
        scale = _ACTIVE * max(float(allowed.max()), float(found.max()))
        crossing = excess > scale
        self.sides, self._met = self.sides ^ crossing, None
        return bool(crossing.any())

    def _polish(self, w: Array) -> tuple[Array, float]:
        """Newton's method on ``W = Σ μ_k ∂c_k, c_k = 0`` for the active constraints.

        Active next are those with ``μ_k > c_k``: a semismooth Newton method, which finds the active
        set while it converges. Rotations of a layer leave margins and norms alone, so the system may
        be singular: its least-squares solution of least norm is taken.

        Returns:
            the point, and how far it is from optimal and feasible, in units of ‖W‖ and 1.
        """
        active, held, jacobian = self._multipliers(w)
        c = self._constraints(w).detach()
        mu = torch.zeros_like(c)
        mu[active] = held
        point, n = torch.from_numpy(w), len(w)
        best, least = w, self._defect(point, active, held, jacobian)
        for _ in range(_NEWTON_STEPS):
            active = torch.nonzero(mu > c / self._scale(c)).squeeze(1)
            held, s = mu[active], len(active)
            jacobian = self._jacobian(point.numpy(), active)
            system = torch.zeros((n + s, n + s), dtype=torch.float64)
            system[:n, :n] = torch.eye(n, dtype=torch.float64) - self._hessian(point, active, held)
            system[:n, n:] = -jacobian.T
            system[n:, :n] = jacobian
            defect = torch.cat([point - jacobian.T @ held, c[active]])
            step = torch.linalg.lstsq(system, -defect, rcond=_SINGULAR, driver="gelsd").solution
            point = point + step[:n]
            mu = torch.zeros_like(c)
            mu[active] = held + step[n:]
            if not bool(torch.isfinite(point).all()):
                break
            c = self._constraints(point.numpy()).detach()
            size = self._defect(point, active, mu[active], self._jacobian(point.numpy(), active))
            if size < least:
                best, least = point.numpy(), size
            elif least <= REACHED:
                break
        return best, least

    def _defect(self, point: Tensor, active: Tensor, mu: Tensor, jacobian: Tensor) -> float:
        """The largest of stationarity, complementarity, feasibility and the multipliers' signs."""
        c = self._constraints(point.numpy()).detach()
        c = c / self._scale(c)
        size = torch.linalg.vector_norm(point)
        parts = [torch.linalg.vector_norm(point - jacobian.T @ mu) / size, (-c).amax()]
        if len(active):
            parts += [c[active].abs().amax(), -mu.amin() / mu.abs().amax()]
        return max(float(part) for part in parts)

    def _hessian(self, point: Tensor, active: Tensor, mu: Tensor) -> Tensor:
        """``Σ μ_k ∂²c_k/∂W²``, one backward pass a weight."""
        c = self._constraints(point.numpy())[active]
        parameters = self.problem.parameters
        gradient = torch.autograd.grad(
            (mu * c).sum(), parameters, create_graph=True, materialize_grads=True
        )
        slopes = flat(list(gradient))
        found = torch.zeros((len(point), len(point)), dtype=torch.float64)
        if slopes.requires_grad:
            for k in range(len(point)):
                second = torch.autograd.grad(
                    slopes[k], parameters, retain_graph=True, materialize_grads=True
                )
                found[k] = flat(list(second))
        self._met = None  # its graph is spent
        return (found + found.T) / 2

    def advice(self, residual: float) -> str:
        """What to do about a residual that is too large."""
        found = f"r = {residual:.1e} at the point found"
        if self.problem.through and self.problem.kinks.modules:
            return (
                f"{found}: δ(W) may jump where a ReLU changes sides, and the search end at such a place; "
                "use squared ReLU or a finite set, or try another start"
            )
        return f"{found}: start nearer to a KKT point by training longer, or raise max_iterations"


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The first index of each distinct row, and which of them each row equals."""
    _, group = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(keys), dtype=torch.int64)
    first.scatter_reduce_(0, group, torch.arange(len(keys)), reduce="amin")
    return first, group
