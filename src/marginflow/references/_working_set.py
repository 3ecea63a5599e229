"""Constraint generation: a solver that sees few examples, checked against all of them.

Of 12 665 MNIST images a few hundred decide the margin. The working set starts with the examples
nearest to the other class along the mean, is solved, and grows by the examples that its solution
violates most, until no example outside is worse off than the worst inside. It never shrinks, so
the loop ends, at the latest with all examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from marginflow.references._inputs import Array, Indices

BATCH = 100
_SLACK = 1e-12


def grow(
    z: Array, solve: Callable[[Array], Array], start: Indices | None = None
) -> tuple[Indices, Array]:
    """The final working set (sorted indices into z) and the direction that ``solve`` gave on it.

    Args:
        z: signed examples, shape (n, d).
        solve: from the rows of a working set to a direction u of shape (d,) that makes the least
            ``<u, z_i>`` of these rows large; zeros mean *not separable* and end the loop.
        start: indices to begin with instead.
    """
    if start is None:
        start = np.argsort(z @ z.mean(axis=0), kind="stable")[:BATCH]
    chosen = np.unique(start)
    while True:
        direction = solve(z[chosen])
        margins = z @ direction
        floor = float(margins[chosen].min())
        floor -= _SLACK * abs(floor)
        worst = np.argsort(margins, kind="stable")[:BATCH]
        worst = worst[margins[worst] < floor]
        new = np.setdiff1d(worst, chosen)
        if not direction.any() or new.size == 0:
            return chosen, direction
        chosen = np.union1d(chosen, new)
