"""The active-set method of Lawson & Hanson (1974) with a factor that follows each exchange.

For ``minimise ½ λᵀGλ − cᵀλ, λ ≥ 0``: one index enters at a time, that of the steepest descent, and those
that reach 0 leave. The objective falls at every step and only sets of independent columns are met: a
column that depends on those in use has a zero gradient there. So it ends whatever the matrix.

Each exchange costs ``O(r k)`` for k positive multipliers. Kept is a square matrix J with ``JJᵀ`` the
inverse of G on the passive indices P, as in Goldfarb & Idnani (1983), though not triangular:

- entering q with ``w = Jᵀ G_Pq`` and ``s = G_qq − ‖w‖²``: a new column ``(−Jw, 1)/√s``;
- leaving: a reflection of the columns that turns the index's row into ``(0, …, 0, ν)``; row and
  last column go.

A step is ``JJᵀ(c − Gλ)`` from the point itself, so each one also refines what the last one rounded.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


class ActiveSet:
    """A feasible point on its passive indices, and the factor there.

    Args:
        gram: G, (r, r), positive semidefinite, of unit diagonal.
        target: c, (r,).
        dependent: the share s of a unit column that is new beside those in use, below which it counts
            as dependent.

    Attributes:
        exchanges: how many indices entered or left.
    """

    def __init__(self, gram: Array, target: Array, dependent: float) -> None:
        self.gram, self.target, self.dependent = gram, target, dependent
        self.exchanges = 0
        self.size = 0
        self._allocate(min(64, len(target)))
        self._slack = target.copy()

    @property
    def point(self) -> Array:
        """λ, (r,)."""
        found = np.zeros_like(self.target)
        found[self._index[: self.size]] = self._values[: self.size]
        return found

    def begin(self, point: Array) -> None:
        """Go on from a feasible point, of which the most independent positive indices are kept."""
        from scipy.linalg.lapack import dpstrf, dtrtri

        index = np.nonzero(point > 0)[0]
        if len(index) == 0:
            self.size = 0
            self._look()
            return
        block = self.gram[np.ix_(index, index)]
        upper, order, rank, _ = dpstrf(block, tol=4 * self.dependent, lower=0)
        index = index[order[:rank].astype(np.int64) - 1]
        self._reserve(rank)
        self.size = rank
        self._index[:rank], self._values[:rank] = index, point[index]
        self._factor[:rank, :rank], _ = dtrtri(upper[:rank, :rank], lower=0)
        self._factor[:rank, :rank] = np.triu(self._factor[:rank, :rank])
        self._rows[:rank] = self.gram[index]
        self._look()

    def run(self, work: float) -> bool:
        """Exchange indices until the minimiser is reached or this much work is done.

        Args:
            work: multiply-adds, about.

        Returns:
            whether the minimiser is reached.
        """
        blocked = np.zeros(len(self.target), dtype=bool)
        self._descend()
        # The objective falls, so no passive set returns; the count guards against rounding.
        for _ in range(10 * len(self.target) + 100):
            slack = np.where(blocked, -np.inf, self._slack)
            slack[self._index[: self.size]] = -np.inf
            entering = int(slack.argmax())
            if slack[entering] <= tolerance(self._values[: self.size]):
                return True
            work -= self.size * (len(self.target) + 4 * self.size)
            if work < 0:
                return False
            if self._enter(entering) and self._descend() > 0:
                blocked[:] = False
            else:
                # Dependent on those in use, up to rounding: it cannot lower the objective.
                blocked[entering] = True
        return True

    def _enter(self, index: int) -> bool:
        """Add an index with the value 0; False where its column is dependent."""
        k = self.size
        factor = self._factor[:k, :k]
        w = self.gram[index][self._index[:k]] @ factor
        new = 1.0 - float(w @ w)
        if new <= self.dependent:
            return False
        self._reserve(k + 1)
        factor = self._factor[:k, :k]
        root = np.sqrt(new)
        self._factor[:k, k] = factor @ w / -root
        self._factor[k, :k] = 0.0
        self._factor[k, k] = 1.0 / root
        self._index[k], self._values[k], self._rows[k] = index, 0.0, self.gram[index]
        self.size += 1
        self.exchanges += 1
        return True

    def _leave(self, place: int) -> None:
        """Remove the passive index at a place; the last one takes it."""
        last = self.size - 1
        for kept in (self._index, self._values, self._rows):
            kept[place] = kept[last]
        factor = self._factor[: last + 1, : last + 1]
        row = factor[place].copy()
        factor[place] = factor[last]
        # The reflection along row − ν e_last, without cancellation.
        size = float(np.sqrt(row @ row))
        normal = row
        normal[last] += np.copysign(size, row[last])
        scale = 2.0 / float(normal @ normal)
        kept = factor[:last]
        kept -= np.outer(kept @ normal * scale, normal)
        self.size = last
        self.exchanges += 1

    def _descend(self) -> float:
        """To the minimiser on the passive indices, dropping those that reach 0 on the way.

        Returns:
            by how much the objective fell; 0 where that was less than rounding.
        """
        fallen = 0.0
        slack = self._slack[self._index[: self.size]]
        while self.size:
            k = self.size
            factor, values = self._factor[:k, :k], self._values[:k]
            step = factor @ (slack @ factor)
            leaving = np.nonzero(values + step <= 0)[0]
            # The entering index, at 0, only grows: no share is 0/0, but for a step of exactly 0.
            falls = np.where(step[leaving] < 0, -step[leaving], np.inf)
            shares = values[leaving] / falls
            share = min(1.0, float(shares.min(initial=1.0)))
            fallen += (share - share**2 / 2) * float(slack @ step)
            np.maximum(values + share * step, 0.0, out=values)
            if not len(leaving):
                break
            # The rest of the way: G times the step is the slack.
            slack *= 1 - share
            for place in leaving[shares <= share][::-1]:
                self._leave(int(place))
                slack[place] = slack[self.size]
                slack = slack[: self.size]
        self._look()
        objective = (
            float((self._slack + self.target)[self._index[: self.size]] @ self._values[: self.size])
            / 2
        )
        return fallen if fallen > _EPS * objective else 0.0

    def _look(self) -> None:
        """``c − Gλ`` anew."""
        self._slack = self.target - self._values[: self.size] @ self._rows[: self.size]

    def _reserve(self, room: int) -> None:
        """Make room for this many passive indices."""
        if room <= len(self._index):
            return
        room = min(max(room, 2 * len(self._index)), len(self.target))
        k = self.size
        index, values, factor, rows = self._index, self._values, self._factor, self._rows
        self._allocate(room)
        self._index[:k], self._values[:k] = index[:k], values[:k]
        self._factor[:k, :k], self._rows[:k] = factor[:k, :k], rows[:k]

    def _allocate(self, room: int) -> None:
        self._index = np.zeros(room, dtype=np.int64)
        self._values = np.zeros(room)
        self._factor = np.zeros((room, room))
        # The rows of G on the passive indices, side by side: a product with them is what a step costs.
        self._rows = np.zeros((room, len(self.target)))


def tolerance(values: Array) -> float:
    """The rounding of ``c − Gλ``."""
    return 32 * _EPS * max(1.0, float(values.sum()))
