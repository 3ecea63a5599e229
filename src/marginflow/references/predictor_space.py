"""Where diagonal and circular convolutional linear networks go, in the space of predictors.

A homogeneous network under an exact adversary tends to a KKT point of ``min Σ_k ‖W_k‖²`` subject to
adversarial margins >= 1 (Lyu & Zhu 2022, Theorem 5). The margin of a *linear* network depends on its
predictor w alone, ``y_i <w, x_i> − ε‖w‖_q`` with 1/p + 1/q = 1, so only the cost of making w counts.
With L layers, by the inequality of the means in each coordinate or frequency,

    diagonal,       w = w_1 ⊙ ⋯ ⊙ w_L:    min Σ‖w_k‖² = L ‖w‖_{2/L}^{2/L}
    convolutional,  w = w_1 ⋆ ⋯ ⋆ w_L:    min Σ‖w_k‖² = L c ‖ŵ‖_{2/L}^{2/L}   (c depends on d, L)

for full-width circular filters and the unitary DFT ŵ (Gunasekar, Lee, Soudry & Srebro 2018, without
adversary). The limit predictor is therefore stationary for

    minimise ‖w‖_{2/L} or ‖ŵ‖_{2/L}  subject to  y_i <w, x_i> − ε‖w‖_q >= 1 .

L = 1 is the robust SVM, L = 2 an ℓ1 problem: both convex, solved to a certified gap. For L > 2 the
objective is concave in each modulus: there are many stationary points, which one a network meets
depends on its start, and what is returned is *one* of them.

The approach can be slow. For L = 2, where ``w_j = u_j v_j`` grows at the rate of its pull
``|Σ α_i z_i − δ|_j``, a coordinate (or frequency) off the support whose pull is g < 1 times that on
the support still grows as the g-th power of the others, so that the distance of the direction falls
only like ``(ln t)^{−(1 − g)}`` (tested).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marginflow.errors import InputError
from marginflow.references._game import GameSolution, GroupNorm, robust_margin, solve_game
from marginflow.references._inputs import (
    Array,
    Indices,
    budget,
    depth_of,
    exponent,
    signed_examples,
    vector,
)
from marginflow.references.svm import max_margin

_PRUNE = 1e-7
_STATIONARY = 1e-9
_LOOSE = 1e-6
_STEPS = 300
_NOBODY: Indices = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class PredictorLimit:
    """A (locally) cheapest predictor with adversarial margin 1.

    Attributes:
        weights: w, shape (d,), with ``min_i y_i <w, x_i> − ε‖w‖_q = 1``; zeros if infeasible.
        direction: ``w/‖w‖₂``, shape (d,).
        quasi_norm: ``‖w‖_{2/L}`` or ``‖ŵ‖_{2/L}`` (unitary DFT; all d frequencies count).
        margin: ``1/quasi_norm``, the adversarial margin of the unit-cost predictor.
        gap: for L <= 2 the relative primal–dual gap. For L > 2 the same gap of the convex problem
            that linearises the cost at w on w's own support: 0 exactly at first-order points.
        local: whether L > 2, that is whether cheaper predictors may exist.
        active: the coordinates, or the frequencies 0 … d/2, where w does not vanish (1e-7 relative
            to the largest modulus).
        multipliers: α, shape (n,), >= 0, sum 1.
        feasible: whether eps is below ``largest_eps``.
        largest_eps: as for the robust SVM, in the units of x: ``max_{‖u‖_q=1} min_i y_i <u, x_i>``.
        advice: empty if all is well, else what to do.
    """

    weights: Array
    direction: Array
    quasi_norm: float
    margin: float
    gap: float
    local: bool
    active: Indices
    multipliers: Array
    feasible: bool
    largest_eps: float
    advice: str = ""


def diagonal_limit(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    depth: int = 2,
    eps: float = 0.0,
    p: float = 2.0,
    start: npt.ArrayLike | None = None,
) -> PredictorLimit:
    """``argmin ‖w‖_{2/L}`` subject to ``y_i <w, x_i> − ε‖w‖_q >= 1``.

    Args:
        x: shape (n, d).
        y: labels −1 or +1, shape (n,).
        depth: L >= 1.
        eps: radius of the perturbations, in the units of x.
        p: their exponent, in [1, ∞].
        start: for L > 2 only, a predictor of shape (d,) with positive adversarial margins to
            descend from; coordinates at 0 stay at 0. By default the solution for L = 2.

    Raises:
        DataError: bad shapes, labels, NaN or infinity.
        InputError: depth, eps or p out of range, a start for L <= 2 or without positive margins.
        MissingDependencyError: cvxpy or Clarabel is not installed.
    """
    z = signed_examples(x, y)
    d = z.shape[1]
    groups = tuple(np.array([j]) for j in range(d))
    return _limit(x, y, depth_of(depth), budget(eps), exponent(p), start, np.eye(d), groups)


def convolutional_limit(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    depth: int = 2,
    eps: float = 0.0,
    p: float = 2.0,
    start: npt.ArrayLike | None = None,
) -> PredictorLimit:
    """``argmin ‖ŵ‖_{2/L}`` subject to ``y_i <w, x_i> − ε‖w‖_q >= 1``, ŵ the unitary DFT of w.

    Arguments and errors are those of :func:`diagonal_limit`; with ``start``, frequencies at 0 stay
    at 0.

    Args:
        x: shape (n, d).
        y: labels −1 or +1, shape (n,).
        depth: L >= 1.
        eps: radius of the perturbations, in the units of x.
        p: exponent of their norm, in [1, ∞].
        start: for L > 2 only, a predictor of shape (d,) with positive adversarial margins to
            descend from.

    Raises:
        DataError: bad shapes, labels, NaN or infinity.
        InputError: depth, eps or p out of range, a start for L <= 2 or without positive margins.
        MissingDependencyError: cvxpy or Clarabel is not installed.
    """
    basis, groups = real_fourier(signed_examples(x, y).shape[1])
    return _limit(x, y, depth_of(depth), budget(eps), exponent(p), start, basis, groups)


def real_fourier(d: int) -> tuple[Array, tuple[Indices, ...]]:
    """An orthonormal real Fourier basis, shape (d, d), and its rows by frequency 0 … d/2.

    A frequency k with 0 < k < d/2 has two rows, ``√(2/d) cos`` and ``√(2/d) sin``, whose two
    coefficients have modulus ``√2 |ŵ_k|``; k = 0 and k = d/2 have one row each and ``|ŵ_k|``.
    """
    rows: list[Array] = []
    groups: list[Indices] = []
    for k in range(d // 2 + 1):
        angle = 2.0 * np.pi * ((k * np.arange(d)) % d) / d
        if 2 * k in (0, d):
            waves = [np.cos(angle) / math.sqrt(d)]
        else:
            waves = [math.sqrt(2.0 / d) * np.cos(angle), math.sqrt(2.0 / d) * np.sin(angle)]
        groups.append(np.arange(len(rows), len(rows) + len(waves)))
        rows += waves
    return np.array(rows), tuple(groups)


def _limit(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    depth: int,
    eps: float,
    p: float,
    start: npt.ArrayLike | None,
    basis: Array,
    groups: tuple[Indices, ...],
) -> PredictorLimit:
    z = signed_examples(x, y)
    widest = max_margin(x, y, p=p)
    power = 2.0 / depth
    # A group of two rows stands for the frequencies k and −k, each of modulus ‖rows‖/√2.
    sizes = np.array([float(len(rows)) for rows in groups])
    shares = sizes ** (1.0 - power / 2.0)
    norm = GroupNorm(basis, groups, shares)
    if not (widest.separable and eps < widest.margin):
        return PredictorLimit(
            weights=np.zeros(z.shape[1]),
            direction=np.zeros(z.shape[1]),
            quasi_norm=math.inf,
            margin=0.0,
            gap=math.inf,
            local=depth > 2,
            active=_NOBODY,
            multipliers=widest.multipliers,
            feasible=False,
            largest_eps=widest.margin,
            advice=f"feasible only for eps below {widest.margin:g}: reduce it",
        )
    convex = GroupNorm(basis, groups, np.sqrt(sizes))
    if depth == 1:
        convex = GroupNorm(np.eye(z.shape[1]), (np.arange(z.shape[1]),), np.ones(1))
    if start is None:
        found = solve_game(z, eps, p, convex, widest.direction, widest.support)
        if depth > 2:
            begin = _smooth_start(z, eps, p, norm, power, found.weights)
            found = _descend(z, eps, p, norm, power, begin)
    else:
        begin = vector("start", start, z.shape[1])
        if depth <= 2 or robust_margin(z, begin, eps, p) <= 0.0:
            raise InputError(
                "start: expected depth > 2 and a predictor with positive adversarial margins"
            )
        found = _descend(z, eps, p, norm, power, begin)
    w = found.weights
    moduli = norm.moduli(w)
    top = float(moduli.max())
    quasi_norm = top * float(shares @ (moduli / top) ** power) ** (1.0 / power)
    loose = found.gap > _LOOSE
    return PredictorLimit(
        weights=w,
        direction=w / float(np.linalg.norm(w)),
        quasi_norm=quasi_norm,
        margin=1.0 / quasi_norm,
        gap=found.gap,
        local=depth > 2,
        active=np.flatnonzero(moduli > _PRUNE * top),
        multipliers=found.multipliers,
        feasible=True,
        largest_eps=widest.margin,
        advice="the gap is wide: move eps from largest_eps, or give a start" if loose else "",
    )


def _smooth_start(z: Array, eps: float, p: float, norm: GroupNorm, power: float, w: Array) -> Array:
    """A good place to descend from: the cost with its infinite slopes at 0 smoothed, ever less."""
    for smoothing in (1.0, 0.1, 0.01, 1e-3, 1e-4):
        moduli = norm.moduli(w)
        weighted = _linearised(norm, moduli + smoothing * moduli.max(), moduli > 0.0, power)
        w = solve_game(z, eps, p, weighted, _projected(weighted, w), _NOBODY).weights
    return w


def _descend(
    z: Array, eps: float, p: float, norm: GroupNorm, power: float, w: Array
) -> GameSolution:
    """Minimise ``Σ_k κ_k ‖(B w)_k‖^s``, κ = ``norm.costs``, s < 1, from w downhill.

    The cost is concave in the moduli, so minimising its linearisation, a weighted group norm,
    never raises it (Candès, Wakin & Boyd 2008). Moduli that vanish have infinite slope and leave
    the problem. Returns the last iterate beside the dual value of its own linearisation, whose gap
    is 0 exactly at first-order points.
    """
    kept = norm.moduli(w) > 0.0
    for _ in range(_STEPS):
        moduli = norm.moduli(w)
        fewer = kept & (moduli > _PRUNE * moduli.max())
        weighted = _linearised(norm, moduli, fewer, power)
        here = _projected(weighted, w)
        if robust_margin(z, here, eps, p) > 0.0:
            kept = fewer
        else:  # the little that was pruned held the margin up
            weighted = _linearised(norm, moduli, kept, power)
            here = w
        here = here / robust_margin(z, here, eps, p)
        next_one = solve_game(z, eps, p, weighted, here, _NOBODY)
        value = 1.0 / weighted.value(here)
        found = GameSolution(here, value, next_one.dual_value, next_one.multipliers)
        if found.gap <= _STATIONARY:
            break
        w = next_one.weights
    return found


def _projected(norm: GroupNorm, w: Array) -> Array:
    return np.asarray(norm.basis.T @ (norm.basis @ w))


def _linearised(
    norm: GroupNorm, moduli: Array, kept: npt.NDArray[np.bool_], power: float
) -> GroupNorm:
    """The weighted group norm ``Σ κ_k m_k^{s−1} ‖(B w)_k‖`` over the groups kept, largest cost 1."""
    numbers = np.flatnonzero(kept)
    costs = norm.costs[numbers] * (moduli[numbers] / moduli.max()) ** (power - 1.0)
    groups, rows, count = [], [], 0
    for k in numbers:
        rows.append(norm.basis[norm.groups[k]])
        groups.append(np.arange(count, count + len(norm.groups[k])))
        count += len(norm.groups[k])
    return GroupNorm(np.vstack(rows), tuple(groups), costs / costs.max())
