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
from marginflow.kkt._problem import Problem, Rows

# Below this relative residual its square is computed too coarsely from the Gram matrix.
_EXPLICIT_BELOW = 1e-2
# Below this one the multipliers are worth improving with the residual vector.
_REFINE_BELOW = 1e-5
_REFINEMENTS = 4


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
        gram: their Gram matrix, (r, r), on the CPU; it is scaled in place.
    """

    def __init__(self, problem: Problem, rows: Rows, gram: Tensor) -> None:
        self.problem, self.rows = problem, rows
        self.weights = problem.weights
        self.norm = float(torch.linalg.vector_norm(self.weights))
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
