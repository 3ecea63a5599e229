"""Non-negative least squares from a Gram matrix.

    minimise ½ λᵀGλ − cᵀλ  subject to  λ ≥ 0,

for up to thousands of multipliers. Block principal pivoting (Júdice & Pires 1994; Kim & Park 2011)
exchanges many indices at a time and ends after a handful of Cholesky factorisations; where G is singular
(duplicated examples, more examples than weights) or pivoting cycles, the active-set method of Lawson &
Hanson (1974) takes over from its last point. That one lowers the objective at every step and meets
only sets of independent columns: a column that depends on those in use has a zero gradient there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
# Below this share of a unit column that is new beside those in use, it counts as dependent.
_DEPENDENT = 1e-13
_BLOCK_STEPS = 60


@dataclass(frozen=True, eq=False)
class Solution:
    """A minimiser and how well its optimality conditions hold.

    Attributes:
        multipliers: λ ≥ 0, (r,).
        violation: ``max(max_j (c − Gλ)_j, max_{λ_i > 0} |c − Gλ|_i)``, 0 at the minimiser.
        factorizations: Cholesky factorisations that it took.
    """

    multipliers: Tensor
    violation: float
    factorizations: int


def solve(gram: Tensor, target: Tensor, start: Tensor | None = None) -> Solution:
    """``argmin_{λ ≥ 0} ½ λᵀGλ − cᵀλ``.

    Args:
        gram: G, (r, r), symmetric, positive semidefinite, of unit diagonal.
        target: c, (r,), in the range of G.
        start: multipliers of a similar problem; the indices with a positive one come first.
    """
    if len(target) == 0:
        return Solution(target.clone(), 0.0, 0)
    work = _Work(gram, target)
    warm = start is not None and bool((start > 0).any())
    found = work.pivot_blocks(start > 0 if start is not None and warm else target > 0)
    if found is None:
        found = work.lawson_hanson(work.best)
    slack = target - gram @ found
    held = found > 0
    violation = max(0.0, float(slack.max()), float(slack[held].abs().max()) if held.any() else 0.0)
    return Solution(found, violation, work.factorizations)


class _Work:
    """One problem, the best feasible point met so far, and how much work it took."""

    def __init__(self, gram: Tensor, target: Tensor) -> None:
        self.gram, self.target = gram, target
        self.factorizations = 0
        self.best = torch.zeros_like(target)

    def pivot_blocks(self, passive: Tensor) -> Tensor | None:
        """Exchange all indices that are infeasible, or the last one while that does not help."""
        fewest, patience = len(self.target) + 1, 3
        for _ in range(_BLOCK_STEPS):
            found = self._on(passive)
            if found is None:
                # The dependent ones stay at 0, where their gradient is 0 too.
                found = self._on(self._independent(passive))
            if found is None:
                return None
            slack = self.target - self.gram @ found
            tolerance = self._tolerance(found)
            wrong = torch.where(passive, found < 0, slack > tolerance)
            number = int(wrong.sum())
            if number == 0 and bool((slack <= tolerance).all()):
                return found
            self._remember(found)
            if number == 0:
                return None
            if number < fewest:
                fewest, patience = number, 3
            elif patience:
                patience -= 1
            else:
                last = torch.nonzero(wrong).max()
                wrong = torch.zeros_like(wrong)
                wrong[last] = True
            passive = passive ^ wrong
        return None

    def lawson_hanson(self, point: Tensor) -> Tensor:
        """One index enters at a time, that of the steepest descent; those that turn negative leave.

        Args:
            point: feasible, its positive indices independent.
        """
        point, passive = self._descend(point, point > 0)
        blocked = torch.zeros_like(passive)
        # Each round lowers the objective, so no passive set returns; the count guards against rounding.
        for _ in range(10 * len(self.target) + 100):
            slack = self.target - self.gram @ point
            slack[passive | blocked] = -torch.inf
            entering = int(slack.argmax())
            if float(slack[entering]) <= self._tolerance(point):
                break
            larger = passive.clone()
            larger[entering] = True
            wanted = self._on(larger)
            # Dependent on those in use, up to rounding: it cannot lower the objective.
            useless = wanted is None or float(wanted[entering]) <= 0
            if not useless:
                lower, smaller = self._descend(point, larger)
                useless = self._objective(lower) >= self._objective(point)
            if useless:
                blocked[entering] = True
            else:
                point, passive = lower, smaller
                blocked[:] = False
        return point

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
        self.factorizations += 1
        index = torch.nonzero(passive).squeeze(1)
        block = self.gram[index][:, index].numpy()
        # Somewhat above what _on refuses: the two factorisations round differently.
        _, order, rank, _ = dpstrf(block, tol=4 * _DEPENDENT, lower=1)
        subset = torch.zeros_like(passive)
        subset[index[torch.from_numpy(order[:rank].astype("int64") - 1)]] = True
        return subset

    def _descend(self, point: Tensor, passive: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the minimiser on ``passive``, dropping the indices that reach 0 on the way."""
        while True:
            wanted = self._on(passive)
            if wanted is None:
                return point, point > 0
            leaving = passive & (wanted <= 0)
            if not bool(leaving.any()):
                return wanted, passive
            shares = torch.full_like(point, torch.inf)
            shares[leaving] = point[leaving] / (point[leaving] - wanted[leaving])
            # 0/0: an index that is at 0 and stays there leaves at once.
            shares = torch.nan_to_num(shares, nan=0.0, posinf=torch.inf)
            step = float(shares.min())
            passive = passive & (shares > step)
            point = torch.where(passive, (point + step * (wanted - point)).clamp(min=0), 0.0)

    def _remember(self, found: Tensor) -> None:
        """Keep the best feasible point met, for the method that takes over."""
        clipped = found.clamp(min=0)
        if self._objective(clipped) < self._objective(self.best):
            self.best = clipped

    def _objective(self, found: Tensor) -> float:
        return float(found @ (self.gram @ found) / 2 - self.target @ found)

    def _tolerance(self, found: Tensor) -> float:
        """The rounding of ``c − Gλ``."""
        return 32 * _EPS * max(1.0, float(found.abs().sum()))
