"""The best multipliers: the point of the cone ``{Σ λ_i ∂m_i : λ ≥ 0}`` that is nearest to W.

By Euler's identity ``⟨W, ∂m_i⟩ = K m_i``, so

    ‖W − Σ λ_i ∂m_i‖² = ‖W‖² − 2K Σ λ_i m_i + λᵀGλ

needs the Gram matrix G and the margins only. That form loses half the digits near a KKT point; the
residual reported there is the norm of the vector ``W − Σ λ_i ∂m_i`` itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from marginflow.kkt import _nnls
from marginflow.kkt._gram import Engine
from marginflow.kkt._problem import Problem, Rows

# Below this relative residual its square is computed too coarsely from the Gram matrix.
_EXPLICIT_BELOW = 1e-2
# Below this one the multipliers are worth improving with the residual vector.
_REFINE_BELOW = 1e-5
_REFINEMENTS = 4
# Rounds of new pieces, the residual at which none can help, and the cosine that counts as acute.
_GENERATIONS = 300
_NOTHING = 1e-13
_ACUTE = 1e-9


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest point of a cone.

    Attributes:
        scaled: the multipliers in units of ``‖W‖/‖∂m_i‖``, (r,).
        multipliers: λ_i ≥ 0 with ``W ≈ Σ λ_i ∂m_i(W)``, (r,).
        residual: ``‖W − Σ λ_i ∂m_i‖ / ‖W‖``, in [0, 1].
        violation: the largest violated optimality condition, as a cosine: ``⟨∂m_i, W − Σ λ_j ∂m_j⟩``
            over ``‖∂m_i‖ ‖W‖``, its positive part where λ_i = 0.
    """

    scaled: Tensor
    multipliers: Tensor
    residual: float
    violation: float


class Cone:
    """The cone of the margin gradients of ``rows``.

    Args:
        problem: the network.
        rows: the margins, in ascending order of their examples' margins.
        engine: for their Gram matrix.
        memory: bytes for the data of single examples.
    """

    def __init__(self, problem: Problem, rows: Rows, engine: Engine, memory: int) -> None:
        self.problem, self.rows, self.engine, self.memory = problem, rows, engine, memory
        self.weights = problem.weights
        self.norm = float(torch.linalg.vector_norm(self.weights))
        gram = engine.gram(rows, memory)
        self.lengths = torch.diagonal(gram).sqrt()
        gram /= self.lengths.unsqueeze(0)
        gram /= self.lengths.unsqueeze(1)
        gram.fill_diagonal_(1.0)
        self.gram = gram
        # cos(W, ∂m_i)
        self.target = problem.order * rows.values.cpu() / (self.norm * self.lengths)

    def examples(self, r: int) -> int:
        """The number of examples behind the first ``r`` rows."""
        return len(torch.unique(self.rows.examples[:r]))

    def nearest(self, r: int, start: Tensor | None = None, *, exact: bool = False) -> Nearest:
        """The nearest point with multipliers on the first ``r`` rows.

        Args:
            r: number of rows ≥ 1.
            start: scaled multipliers of a smaller cone.
            exact: form the residual vector however large it is.
        """
        gram, target = self.gram[:r, :r], self.target[:r]
        if start is not None:
            start = torch.cat([start, start.new_zeros(r - len(start))])
        found = _nnls.solve(gram, target, start)
        scaled, violation = found.multipliers, found.violation
        square = 1.0 - float(scaled @ (2 * target - gram @ scaled))
        residual = math.sqrt(max(0.0, square))
        if exact or residual < _EXPLICIT_BELOW:
            vector, residual = self._residual(scaled)
            if residual < _REFINE_BELOW:
                scaled, vector, residual = self._refined(scaled, vector, residual)
            if exact:
                violation = self._violation(scaled, vector)
        multipliers = scaled * self.norm / self.lengths[:r]
        return Nearest(scaled, multipliers, min(residual, 1.0), violation)

    def completed(self, r: int, start: Tensor | None = None, *, exact: bool = False) -> Nearest:
        """:meth:`nearest`, with as many pieces of examples with many kinks as it takes.

        Column generation: while a piece has an acute angle with ``W − Σ λ_i ∂m_i``, the steepest one
        of each example becomes a row behind the first ``r``, which the point's multipliers include.

        Args:
            r: number of rows ≥ 1.
            start: scaled multipliers of a smaller cone.
            exact: form the residual vector however large it is.
        """
        found = self.nearest(r, start, exact=exact)
        for _ in range(_GENERATIONS):
            rows = self.rows.take(slice(0, r))
            crowded = rows.take(self.problem.crowded(rows))
            if len(crowded) == 0 or found.residual <= _NOTHING:
                break
            vector, residual = self._residual(found.scaled)
            new = self.problem.steeper(crowded.take(_families(crowded)), vector)
            new = new.take(_unknown(new, crowded))
            if len(new):
                lengths = torch.diagonal(self.engine.across(new, new, self.memory)).sqrt()
                slack = self.problem.slopes(new, vector) / (lengths * self.norm)
                new = new.take((slack > _ACUTE * residual).to(new.labels.device))
            if len(new) == 0:
                break
            self._insert(new, r)
            start = torch.cat([found.scaled, found.scaled.new_zeros(len(new))])
            r += len(new)
            found = self.nearest(r, start, exact=exact)
        return found

    def _insert(self, new: Rows, place: int) -> None:
        """Give the cone further rows, behind the first ``place``."""
        known, more = len(self.rows), len(new)
        across = self.engine.across(new, self.rows, self.memory)
        own = self.engine.across(new, new, self.memory)
        lengths = torch.diagonal(own).sqrt()
        gram = torch.empty((known + more, known + more), dtype=torch.float64)
        gram[:known, :known] = self.gram
        gram[known:, :known] = across / lengths.unsqueeze(1) / self.lengths.unsqueeze(0)
        gram[:known, known:] = gram[known:, :known].T
        gram[known:, known:] = own / lengths.unsqueeze(1) / lengths.unsqueeze(0)
        gram.fill_diagonal_(1.0)
        added = torch.arange(known, known + more)
        order = torch.cat([torch.arange(place), added, torch.arange(place, known)])
        self.gram = gram[order.unsqueeze(1), order]
        self.rows = Rows.joined([self.rows, new]).take(order.to(new.labels.device))
        self.lengths = torch.cat([self.lengths, lengths])[order]
        self.target = self.problem.order * self.rows.values.cpu() / (self.norm * self.lengths)

    def with_direction(self, direction: Tensor, start: Tensor) -> float:
        """The relative residual with a further generator of the cone: any ``Σ w_i ∂m_i``, w ≥ 0.

        The direction may lean on examples that have no row.
        """
        size = torch.linalg.vector_norm(direction)
        direction = direction / size
        r = len(self.rows)
        gram = torch.empty((r + 1, r + 1), dtype=torch.float64)
        gram[:r, :r] = self.gram
        gram[r, :r] = gram[:r, r] = self.problem.slopes(self.rows, direction) / self.lengths
        gram[r, r] = 1.0
        along = float(direction @ self.weights) / self.norm
        target = torch.cat([self.target, self.target.new_tensor([along])])
        found = _nnls.solve(gram, target, torch.cat([start, start.new_zeros(1)])).multipliers
        multipliers = found[:r] * self.norm / self.lengths
        vector = self.weights - self.problem.combination(self.rows, multipliers)
        vector -= float(found[r]) * self.norm * direction
        return min(1.0, float(torch.linalg.vector_norm(vector)) / self.norm)

    def _residual(self, scaled: Tensor) -> tuple[Tensor, float]:
        """``W − Σ λ_i ∂m_i`` by one backward pass, and its relative norm."""
        r = len(scaled)
        multipliers = scaled * self.norm / self.lengths[:r]
        rows = self.rows.take(slice(0, r))
        vector = self.weights - self.problem.combination(rows, multipliers)
        return vector, float(torch.linalg.vector_norm(vector)) / self.norm

    def _refined(
        self, scaled: Tensor, vector: Tensor, residual: float
    ) -> tuple[Tensor, Tensor, float]:
        """Iterative refinement of the positive multipliers with the residual vector's own slopes."""
        held = torch.nonzero(scaled > 0).squeeze(1)
        rows = self.rows.take(held.to(self.weights.device))
        factor, info = torch.linalg.cholesky_ex(self.gram[held][:, held])
        for _ in range(_REFINEMENTS):
            if int(info):
                break
            slack = self.problem.slopes(rows, vector) / (self.lengths[held] * self.norm)
            better = scaled.clone()
            better[held] += torch.cholesky_solve(slack.unsqueeze(1), factor).squeeze(1)
            if bool((better < 0).any()):
                break
            improved, smaller = self._residual(better)
            if smaller >= residual:
                break
            enough = smaller > residual / 2
            scaled, vector, residual = better, improved, smaller
            if enough:
                break
        return scaled, vector, residual

    def _violation(self, scaled: Tensor, vector: Tensor) -> float:
        """From the residual vector and the network: nothing here has seen the Gram matrix."""
        r = len(scaled)
        slack = self.problem.slopes(self.rows.take(slice(0, r)), vector)
        slack = slack / (self.lengths[:r] * self.norm)
        held = scaled > 0
        worst = float(slack[held].abs().max()) if bool(held.any()) else 0.0
        return max(0.0, worst, float(slack.max()))


def _family(rows: Rows) -> Tensor:
    """What the pieces that differ in their sides alone have in common, (r, …)."""
    which = torch.stack([rows.examples, rows.rivals], dim=1).double()
    return torch.cat([which, rows.perturbed.flatten(1)], dim=1)


def _families(rows: Rows) -> Tensor:
    """The index of one row of each family."""
    _, group = torch.unique(_family(rows), dim=0, return_inverse=True)
    first = torch.zeros(int(group.max()) + 1, dtype=torch.int64, device=group.device)
    first[group.flip(0)] = torch.arange(len(rows) - 1, -1, -1, device=group.device)
    return first


def _unknown(new: Rows, known: Rows) -> Tensor:
    """Which of the new rows are none of the known ones, (r,) bool."""
    keys = [torch.cat([_family(rows), rows.sides.flatten(1)], dim=1) for rows in (known, new)]
    _, group = torch.unique(torch.cat(keys), dim=0, return_inverse=True)
    return ~torch.isin(group[len(known) :], group[: len(known)])
