"""The maximal margin of linear predictors through the origin, measured in any ℓp distance.

With signed examples ``z_i = y_i x_i`` and 1/p + 1/q = 1,

    γ_m = max_{‖u‖_q <= 1} min_i <u, z_i> = min_{α in the simplex} ‖Σ_i α_i z_i‖_p ,

since ``<u, z_i>/‖u‖_q`` is the signed ℓp distance of x_i to the hyperplane u. p = 2 is the
hard-margin SVM (Lyu & Zhu 2022, Section 3.1: ū and γ_m); p = ∞ is Eq. (143) and bounds the ℓ∞
budget. Both sides are solved apart and evaluated on all examples in plain float64, so the gap
between them certifies the answer whatever the solvers did.

| p | margin (primal) | hull point (dual) |
|---|---|---|
| 2 | minimum-norm solution of ``<w, z_i> = 1`` on the support | non-negative least squares |
| 1, ∞ | linear program (HiGHS) | another linear program |
| else | power cones (cvxpy, Clarabel) | power cones |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog, lsq_linear, nnls

from marginflow.references._cone import cvxpy, norm_bound, solved
from marginflow.references._inputs import (
    Array,
    Indices,
    dual_exponent,
    exponent,
    lp_norm,
    signed_examples,
)
from marginflow.references._working_set import grow

# Relative to the largest ‖z_i‖_p: a margin below this is not told from zero.
_NEGLIGIBLE = 1e-12
_ON_THE_MARGIN = 1e-7
_Bounds = tuple[float | None, float | None]


@dataclass(frozen=True)
class MaxMargin:
    """The max-margin direction and its certificate.

    Attributes:
        p: the distance's exponent; ``direction`` has unit ℓq norm, 1/p + 1/q = 1.
        direction: u, shape (d,); zeros if no separating direction was found.
        margin: ``min_i <u, z_i>`` over all examples, in the units of x; 0.0 for zero u.
        dual_value: ``‖Σ α_i z_i‖_p``, an upper bound on every direction's margin.
        gap: ``(dual_value − margin)/dual_value`` (>= 0 up to rounding); for data without a
            separating direction ``dual_value / max_i ‖z_i‖_p``: small proves that there is none,
            large says that the solvers failed.
        support: indices of the examples on the margin (to 1e-7 relative), sorted.
        multipliers: α, shape (n,), non-negative, sum 1. The SVM's own multipliers, of
            ``min ½‖w‖₂²`` subject to ``<w, z_i> >= 1``, are ``α/γ_m²`` (p = 2).
        separable: whether ``margin`` is positive beyond rounding.
    """

    p: float
    direction: Array
    margin: float
    dual_value: float
    gap: float
    support: Indices
    multipliers: Array
    separable: bool

    @property
    def angle_bound(self) -> float:
        """A proven bound, in radians, on the angle from ``direction`` to the exact direction.

        ``arccos(margin/dual_value)`` for p = 2, since ``u/margin`` is feasible and the exact w is
        the feasible set's projection of 0. For other p the direction need not be unique: π.
        """
        return angle_of_gap(self.gap) if self.p == 2.0 and self.separable else math.pi


def max_margin(x: npt.ArrayLike, y: npt.ArrayLike, *, p: float = 2.0) -> MaxMargin:
    """The maximal ℓp margin ``γ_m = max_{‖u‖_q=1} min_i y_i <u, x_i>`` and its direction.

    Data that no hyperplane through the origin separates is a value (``separable=False``), whose
    multipliers are Gordan's certificate ``Σ α_i z_i ≈ 0``.

    Args:
        x: shape (n, d).
        y: labels −1 or +1, shape (n,).
        p: exponent of the distance's norm, in [1, ∞].

    Raises:
        DataError: bad shapes, labels, NaN or infinity.
        InputError: p below 1 or not a number.
        MissingDependencyError: p is none of 1, 2, ∞ and cvxpy or Clarabel is not installed.
    """
    p = exponent(p)
    q = dual_exponent(p)
    z = signed_examples(x, y)
    n, d = z.shape
    scale = max(lp_norm(row, p) for row in z)
    if scale == 0.0:
        return MaxMargin(p, np.zeros(d), 0.0, 0.0, 0.0, np.arange(n), np.full(n, 1 / n), False)
    used = z.any(axis=0)  # a feature that is always 0 (an MNIST border pixel) has weight 0
    a = z[:, used] / scale

    chosen, raw = grow(a, lambda rows: _direction(rows, p))
    weights = _hull_weights(a[chosen], p)
    candidates = [raw]
    if p == 2.0:
        held = a[chosen[weights > 0.0]]
        candidates.append(np.asarray(np.linalg.lstsq(held, np.ones(len(held)))[0]))
    units = [u / lp_norm(u, q) for u in candidates if u.any()]
    best = max(units, key=lambda u: float((a @ u).min()), default=raw)
    margin = float((a @ best).min())
    dual = lp_norm(weights @ a[chosen], p)

    multipliers = np.zeros(n)
    multipliers[chosen] = weights
    direction = np.zeros(d)
    separable = margin > _NEGLIGIBLE
    if separable:
        direction[used] = best
        support = np.flatnonzero(a @ best <= margin * (1.0 + _ON_THE_MARGIN))
    else:
        margin = 0.0
        support = np.flatnonzero(multipliers)
    return MaxMargin(
        p=p,
        direction=direction,
        margin=margin * scale,
        dual_value=dual * scale,
        gap=(dual - margin) / dual if separable else dual,
        support=support,
        multipliers=multipliers,
        separable=separable,
    )


def angle_of_gap(gap: float) -> float:
    """``arccos(1 − gap)``, accurate for tiny gaps; a gap lost in rounding counts as rounding."""
    return 2.0 * math.asin(math.sqrt(min(max(gap, 4.0 * np.finfo(float).eps), 2.0) / 2.0))


def _direction(rows: Array, p: float) -> Array:
    """A maximiser u of ``min_i <u, z_i>`` over ``‖u‖_q <= 1``, or zeros if that is not positive."""
    if p == 2.0:
        u = _hull_weights(rows, p) @ rows
        u = u / lp_norm(u, 2.0) if lp_norm(u, 2.0) > _NEGLIGIBLE else np.zeros_like(u)
    elif p in (1.0, math.inf):
        u = _linear_direction(rows, p)
    else:
        u = _cone_direction(rows, dual_exponent(p))
    return u if float((rows @ u).min()) > _NEGLIGIBLE else np.zeros_like(u)


def _hull_weights(rows: Array, p: float) -> Array:
    """Weights of the point of least ℓp norm in the convex hull of the rows: >= 0, sum 1."""
    if p == 2.0:
        weights = _least_squares_weights(rows)
    elif p in (1.0, math.inf):
        weights = _linear_weights(rows, p)
    else:
        weights = _cone_weights(rows, p)
    weights = np.maximum(weights, 0.0)
    total = float(weights.sum())
    return weights / total if total > 0.0 else np.full(len(rows), 1.0 / len(rows))


def _least_squares_weights(rows: Array) -> Array:
    """``argmin_{β >= 0} ‖Σ β_i z_i‖² + σ²(Σ β_i − 1)²``: proportional to the hull weights.

    Whatever Σ β is, the remaining problem is the hull's; σ only conditions it (Lawson & Hanson
    1974, chapter 23: least distance programming).
    """
    sigma = 0.03 * float(np.sqrt(np.mean(np.sum(rows**2, axis=1))))
    matrix = np.vstack([rows.T, np.full(len(rows), sigma)])
    target = np.zeros(len(matrix))
    target[-1] = sigma
    try:
        return np.asarray(nnls(matrix, target, maxiter=100 * len(rows))[0])
    except RuntimeError:  # it cycled
        bounded = lsq_linear(matrix, target, bounds=(0.0, np.inf), method="bvls", tol=1e-15)
        return np.asarray(bounded.x)


def _linear_direction(rows: Array, p: float) -> Array:
    """Maximise t subject to ``<u, z_i> >= t`` and ``‖u‖_1 <= 1`` (p = ∞) or ``‖u‖_∞ <= 1``."""
    n, d = rows.shape
    if p == 1.0:
        table = np.hstack([-rows, np.ones((n, 1))])
        box: list[_Bounds] = [(-1.0, 1.0)] * d + [(None, None)]
        return _linear_program(np.append(np.zeros(d), -1.0), table, np.zeros(n), box)[:d]
    table = np.hstack([-rows, rows, np.ones((n, 1))])
    table = np.vstack([table, np.append(np.ones(2 * d), 0.0)])
    bounds: list[_Bounds] = [(0.0, None)] * (2 * d) + [(None, None)]
    cost = np.append(np.zeros(2 * d), -1.0)
    solution = _linear_program(cost, table, np.append(np.zeros(n), 1.0), bounds)
    return solution[:d] - solution[d : 2 * d]


def _linear_weights(rows: Array, p: float) -> Array:
    """Minimise ``‖Σ α_i z_i‖_p`` over the simplex, p = 1 or ∞, by bounds ``|Σ α_i z_i| <= s``."""
    n, d = rows.shape
    bound = -np.eye(d) if p == 1.0 else -np.ones((d, 1))
    size = bound.shape[1]
    table = np.vstack([np.hstack([rows.T, bound]), np.hstack([-rows.T, bound])])
    cost = np.append(np.zeros(n), np.ones(size))
    simplex = np.append(np.ones(n), np.zeros(size))[None]
    bounds: list[_Bounds] = [(0.0, None)] * (n + size)
    return _linear_program(cost, table, np.zeros(2 * d), bounds, simplex)[:n]


def _linear_program(
    cost: Array,
    table: Array,
    limits: Array,
    bounds: list[_Bounds],
    simplex: Array | None = None,
) -> Array:
    """Minimise cost·v subject to table·v <= limits and simplex·v = 1; zeros if HiGHS gives up."""
    result = linprog(
        cost,
        A_ub=table,
        b_ub=limits,
        A_eq=simplex,
        b_eq=None if simplex is None else [1.0],
        bounds=bounds,
        method="highs-ipm",  # ends with a crossover to a vertex; on MNIST faster than the simplex
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return np.zeros(len(cost)) if result.x is None else np.asarray(result.x)


def _cone_direction(rows: Array, q: float) -> Array:
    """Maximise t subject to ``<u, z_i> >= t`` and ``‖u‖_q <= 1``, 1 < q < ∞."""
    cp = cvxpy()
    u, t = cp.Variable(rows.shape[1]), cp.Variable()
    constraints, norm = norm_bound(u, q, rows.shape[1])
    found = solved(cp.Problem(cp.Maximize(t), [*constraints, norm <= 1.0, rows @ u >= t]))
    return np.asarray(u.value) if found else np.zeros(rows.shape[1])


def _cone_weights(rows: Array, p: float) -> Array:
    """Minimise ``‖Σ α_i z_i‖_p`` over the simplex, 1 < p < ∞."""
    cp = cvxpy()
    weights = cp.Variable(len(rows), nonneg=True)
    point = cp.Variable(rows.shape[1])
    constraints, norm = norm_bound(point, p, rows.shape[1])
    constraints += [point == rows.T @ weights, cp.sum(weights) == 1.0]
    found = solved(cp.Problem(cp.Minimize(norm), constraints))
    return np.asarray(weights.value) if found else np.zeros(len(rows))
