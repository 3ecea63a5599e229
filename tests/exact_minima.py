"""The true adversarial margin of tiny networks, by mathematical programs: nothing of the library.

A network is a list of steps on vectors: ``(W, b)`` for ``h ↦ Wh + b``, ``"relu"``, or a list of index
groups for a max-pool. In ℓ∞ the minimum is a mixed-integer program (HiGHS), in ℓ2 the smallest of one
cone program per activation pattern (Clarabel). Solvers are exact to about 1e-7 only; so the minimiser is
put back into the ball and the network evaluated there: that is a margin which is really attained.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Step = Any


def evaluate(steps: Sequence[Step], z: Array) -> Array:
    """The outputs at z."""
    for step in steps:
        if isinstance(step, tuple):
            z = step[0] @ z + step[1]
        elif step == "relu":
            z = np.maximum(z, 0)
        else:
            z = np.array([z[list(group)].max() for group in step])
    return z


def in_linf(
    steps: Sequence[Step],
    x: Array,
    c: Array,
    eps: float,
    bounds: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """``min c·f(z)`` over the box: the solver's value, and one that is attained."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    low, high = x - eps, x + eps
    if bounds is not None:
        low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
    lows, highs, whole = [low], [high], [np.zeros(len(x))]
    rows: list[tuple[dict[int, float], float, float]] = []

    def add(low: Array, high: Array, integer: bool = False) -> list[int]:
        start = sum(map(len, lows))
        lows.append(low)
        highs.append(high)
        whole.append(np.full(len(low), float(integer)))
        return list(range(start, start + len(low)))

    now, lo, hi = list(range(len(x))), low, high
    for step in steps:
        if isinstance(step, tuple):
            W, b = step
            center, radius = W @ (lo + hi) / 2 + b, np.abs(W) @ (hi - lo) / 2 + 1e-9
            lo, hi = center - radius, center + radius
            new = add(lo, hi)
            for j, row in enumerate(W):
                terms = {now[k]: -float(v) for k, v in enumerate(row)}
                rows.append(({**terms, new[j]: 1.0}, b[j], b[j]))
        elif step == "relu":
            new = add(np.maximum(lo, 0), np.maximum(hi, 0))
            kink = add(np.zeros(len(lo)), np.ones(len(lo)), integer=True)
            for a, h, t, least, most in zip(now, new, kink, lo, hi, strict=True):
                rows.append(({h: 1.0, a: -1.0}, 0.0, np.inf))
                if least < 0:  # h ≤ a − least (1 − t) and h ≤ most · t
                    rows.append(({h: 1.0, a: -1.0, t: -least}, -np.inf, -least))
                    rows.append(({h: 1.0, t: -max(most, 0.0)}, -np.inf, 0.0))
                else:
                    rows.append(({h: 1.0, a: -1.0}, 0.0, 0.0))
            lo, hi = np.maximum(lo, 0), np.maximum(hi, 0)
        else:
            spread = max(hi) - min(lo)
            least = np.array([lo[list(g)].max() for g in step])
            most = np.array([hi[list(g)].max() for g in step])
            new = add(least, most)
            for h, group in zip(new, step, strict=True):
                chosen = add(np.zeros(len(group)), np.ones(len(group)), integer=True)
                rows.append((dict.fromkeys(chosen, 1.0), 1.0, 1.0))
                for k, t in zip(group, chosen, strict=True):
                    rows.append(({h: 1.0, now[k]: -1.0}, 0.0, np.inf))
                    rows.append(({h: 1.0, now[k]: -1.0, t: spread}, -np.inf, spread))
            lo, hi = least, most
        now = new
    count = sum(map(len, lows))
    entries = [(i, k, v) for i, (row, _, _) in enumerate(rows) for k, v in row.items()]
    i, k, v = (list(column) for column in zip(*entries, strict=True))
    matrix = csr_matrix((v, (i, k)), shape=(len(rows), count))
    cost = np.zeros(count)
    cost[now] = c
    found = milp(
        cost,
        constraints=LinearConstraint(matrix, [row[1] for row in rows], [row[2] for row in rows]),
        bounds=Bounds(np.concatenate(lows), np.concatenate(highs)),
        integrality=np.concatenate(whole),
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0, found.message
    z = np.clip(found.x[: len(x)], low, high)
    return float(found.fun), float(c @ evaluate(steps, z))


def in_l2(steps: Sequence[Step], x: Array, c: Array, eps: float) -> tuple[float, float]:
    """``min c·f(z)`` over the ball, for one hidden layer: as :func:`in_linf`."""
    import cvxpy as cp

    (W, b), relu, (V, d) = steps
    assert relu == "relu"
    best, attained = np.inf, np.inf
    for pattern in itertools.product((0.0, 1.0), repeat=len(b)):
        on = np.array(pattern)
        z = cp.Variable(len(x))
        hidden = W @ z + b
        weights = (c @ V) * on
        problem = cp.Problem(
            cp.Minimize(weights @ hidden + c @ d),
            [cp.norm(z - x) <= eps, cp.multiply(2 * on - 1, hidden) >= 0],
        )
        problem.solve(solver="CLARABEL")
        if problem.status not in ("optimal", "optimal_inaccurate"):
            continue
        best = min(best, float(problem.value))
        step = z.value - x
        point = x + step * min(1.0, eps / max(float(np.linalg.norm(step)), 1e-300))
        attained = min(attained, float(c @ evaluate(steps, point)))
    return best, attained


def specifications(y: int, outputs: int) -> list[Array]:
    """The c with ``c·f`` the margins of label y: one output, or f[y] − f[j] of several."""
    if outputs == 1:
        return [np.array([float(y)])]
    unit = np.eye(outputs)
    return [unit[y] - unit[j] for j in range(outputs) if j != y]
