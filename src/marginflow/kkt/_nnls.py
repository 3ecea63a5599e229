"""Non-negative least squares from a Gram matrix.

    minimise ½ λᵀGλ − cᵀλ  subject to  λ ≥ 0,

for up to thousands of multipliers. An active-set method comes first: it is at its best where few
multipliers are positive, and nothing can stop it. Where many are, block principal pivoting (Júdice & Pires
1994; Kim & Park 2011) goes on from its point, exchanges many indices at a time and ends after a handful of
Cholesky factorisations. Where that cycles instead, as it does on matrices that are ill conditioned or
singular (duplicated examples, more examples than weights), the active-set method ends the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from marginflow.kkt._active import ActiveSet, Array, tolerance

# Below this share of a unit column that is new beside those in use, it counts as dependent.
_DEPENDENT = 1e-13
# Block steps that do not bring fewer infeasible indices than ever, before it counts as cycling.
_PATIENCE = 3
# Multiply-adds for single exchanges before blocks are tried: ``_WORK r³``, about r/5 exchanges from
# nothing. Beyond _LARGE the factor is out of the cache and an exchange costs more than its operations.
_WORK = 0.02
_LEAST_WORK = 1e8
_LARGE = 3000


@dataclass(frozen=True, eq=False)
class Solution:
    """A minimiser and how well its optimality conditions hold.

    Attributes:
        multipliers: λ ≥ 0, (r,).
        violation: ``max(max_j (c − Gλ)_j, max_{λ_i > 0} |c − Gλ|_i)``, 0 at the minimiser.
        exchanges: single indices that entered or left.
        factorizations: of the block steps.
    """

    multipliers: Tensor
    violation: float
    exchanges: int
    factorizations: int


def solve(gram: Tensor, target: Tensor, start: Tensor | None = None) -> Solution:
    """``argmin_{λ ≥ 0} ½ λᵀGλ − cᵀλ``.

    Args:
        gram: G, (r, r), symmetric, positive semidefinite, of unit diagonal.
        target: c, (r,), in the range of G.
        start: multipliers of a similar problem, ≥ 0; the way begins there.
    """
    if len(target) == 0:
        return Solution(target.clone(), 0.0, 0, 0)
    active = ActiveSet(gram.numpy(), target.numpy(), _DEPENDENT)
    if start is not None:
        active.begin(start.numpy())
    found: Tensor | None = None
    factorizations = 0
    r = len(target)
    if active.run(max(_LEAST_WORK, _WORK * r**2 * min(r, _LARGE))):
        found = _tensor(active.point)
    else:
        blocks = _Blocks(gram, target, _tensor(active.point))
        found = blocks.pivot()
        factorizations = blocks.factorizations
        if found is None:
            if blocks.improved:
                active.begin(blocks.best.numpy())
            active.run(math.inf)
            found = _tensor(active.point)
    slack = target - gram @ found
    held = found > 0
    violation = max(0.0, float(slack.max()), float(slack[held].abs().max()) if held.any() else 0.0)
    return Solution(found, violation, active.exchanges, factorizations)


def _tensor(point: Array) -> Tensor:
    """A copy in torch's own memory: the last bits of a product hang on how its factors are aligned."""
    return torch.from_numpy(point).clone()


class _Blocks:
    """Block principal pivoting on one problem.

    Args:
        gram, target: G and c.
        point: the feasible point to begin at.

    Attributes:
        best: the best feasible point met.
        improved: whether that is another than the first one.
        factorizations: how many it took.
    """

    def __init__(self, gram: Tensor, target: Tensor, point: Tensor) -> None:
        self.gram, self.target = gram, target
        self.factorizations = 0
        self.best, self.improved = point, False
        self._least = self._objective(point)

    def pivot(self) -> Tensor | None:
        """Exchange all indices that are infeasible, for as long as there are fewer of them.

        Returns:
            the minimiser, or None where it was not reached.
        """
        passive = (self.best > 0) | (
            self.target - self.gram @ self.best > self._tolerance(self.best)
        )
        fewest, patience = len(self.target) + 1, _PATIENCE
        while patience:
            found = self._on(passive)
            if found is None:
                # The dependent ones stay at 0, where their gradient is 0 too.
                passive = self._independent(passive)
                found = self._on(passive)
            if found is None:
                return None
            slack = self.target - self.gram @ found
            tolerance = self._tolerance(found)
            wrong = torch.where(passive, found < 0, slack > tolerance)
            number = int(wrong.sum())
            if number == 0:
                return found if bool((slack <= tolerance).all()) else None
            self._remember(found)
            if number < fewest:
                fewest, patience = number, _PATIENCE
            else:
                patience -= 1
            passive = passive ^ wrong
        return None

    def _on(self, passive: Tensor) -> Tensor | None:
        """The minimiser on the passive indices, 0 elsewhere; None where they are dependent."""
        self.factorizations += 1
        index = torch.nonzero(passive).squeeze(1)
        found = torch.zeros_like(self.target)
        if len(index) == 0:
            return found
        block = self.gram[index][:, index]
        factor, info = torch.linalg.cholesky_ex(block)
        if int(info) or bool((torch.diagonal(factor) ** 2 <= _DEPENDENT).any()):
            return None
        c = self.target[index].unsqueeze(1)
        values = torch.cholesky_solve(c, factor)
        # One step of refinement: the digits that the factorisation lost.
        values += torch.cholesky_solve(c - block @ values, factor)
        found[index] = values.squeeze(1)
        return found

    def _independent(self, passive: Tensor) -> Tensor:
        """A largest independent subset, by Cholesky with pivots."""
        from scipy.linalg.lapack import dpstrf

        self.factorizations += 1
        index = torch.nonzero(passive).squeeze(1)
        block = self.gram[index][:, index].numpy()
        # Somewhat above what _on refuses: the two factorisations round differently.
        _, order, rank, _ = dpstrf(block, tol=4 * _DEPENDENT, lower=1)
        subset = torch.zeros_like(passive)
        subset[index[torch.from_numpy(order[:rank].astype("int64") - 1)]] = True
        return subset

    def _remember(self, found: Tensor) -> None:
        """Keep the best feasible point met, for the method that takes over."""
        clipped = found.clamp(min=0)
        objective = self._objective(clipped)
        if objective < self._least:
            self.best, self.improved, self._least = clipped, True, objective

    def _objective(self, found: Tensor) -> float:
        return float(found @ (self.gram @ found) / 2 - self.target @ found)

    def _tolerance(self, found: Tensor) -> float:
        """The rounding of ``c − Gλ``."""
        return tolerance(found.abs().numpy())
