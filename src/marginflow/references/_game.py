"""The robust margin of linear predictors under any of the norms that networks minimise.

    max_{N(u) <= 1}  min_i <u, z_i> − ε‖u‖_q   =   min_{α in the simplex, ‖δ‖_p <= ε} N*(Σ α_i z_i − δ)

with 1/p + 1/q = 1: the distance, in the dual norm N*, from the hull of the signed examples to the
ball of perturbations. The left side is also ``1/min{N(w) : <w, z_i> − ε‖w‖_q >= 1}``. The two
sides are solved apart (cvxpy, Clarabel) and evaluated in plain float64 on all examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from marginflow.references._cone import cvxpy, norm_bound, solved
from marginflow.references._inputs import Array, Indices, dual_exponent, lp_norm
from marginflow.references._working_set import BATCH, grow

_CLOSE = 1e-10


@dataclass(frozen=True)
class GroupNorm:
    """``N(w) = Σ_k c_k ‖(B w)_k‖₂`` on the row space of B, and its dual ``max_k ‖(B v)_k‖₂/c_k``.

    Attributes:
        basis: B, shape (r, d), orthonormal rows.
        groups: for each k the rows of B that belong to it.
        costs: c_k > 0, shape (groups,).
    """

    basis: Array
    groups: tuple[Indices, ...]
    costs: Array

    def moduli(self, w: Array) -> Array:
        """``‖(B w)_k‖₂`` for each group, shape (groups,)."""
        coefficients = self.basis @ w
        return np.array([float(np.linalg.norm(coefficients[rows])) for rows in self.groups])

    def value(self, w: Array) -> float:
        """``N(w)``."""
        return float(self.costs @ self.moduli(w))

    def dual(self, v: Array) -> float:
        """``N*(v)``."""
        return float(np.max(self.moduli(v) / self.costs))


@dataclass(frozen=True)
class GameSolution:
    """Both sides of the game.

    Attributes:
        weights: w of shape (d,) with ``min_i <w, z_i> − ε‖w‖_q = 1``; its N is ``1/value``.
        value: the robust margin ``1/N(w)``, a lower bound on the game's value.
        dual_value: ``N*(Σ α_i z_i − δ)``, an upper bound.
        multipliers: α, shape (n,), >= 0, sum 1.
    """

    weights: Array
    value: float
    dual_value: float
    multipliers: Array

    @property
    def gap(self) -> float:
        """``(dual_value − value)/dual_value``."""
        return (self.dual_value - self.value) / self.dual_value


def robust_margin(z: Array, w: Array, eps: float, p: float) -> float:
    """``min_i <w, z_i> − ε‖w‖_q``, 1/p + 1/q = 1."""
    return float((z @ w).min()) - eps * lp_norm(w, dual_exponent(p))


def solve_game(
    z: Array, eps: float, p: float, norm: GroupNorm, known: Array, start: Indices
) -> GameSolution:
    """Solve both sides.

    Args:
        z: signed examples, shape (n, d).
        eps: radius of the perturbations.
        p: their exponent.
        norm: N.
        known: a w in the row space of ``norm.basis`` with positive robust margin; it sets the
            scale, and is the answer should the solver fail (the gap then tells).
        start: examples to begin the working set with.
    """
    scale = float(np.max(np.linalg.norm(z, axis=1)))
    a, radius = z / scale, eps / scale
    target = robust_margin(a, known, radius, p) / norm.value(known)

    def primal(rows: Array) -> Array:
        w = _primal(rows, radius, p, norm, target)
        better = w.any() and robust_margin(rows, w, radius, p) > 0.0
        return w / norm.value(w) if better else known / norm.value(known)

    first = np.argsort(a @ known, kind="stable")[:BATCH]
    chosen, w = grow(a, primal, np.union1d(start, first))
    if robust_margin(a, w, radius, p) <= 0.0:
        w = known / norm.value(known)
    w = w / (robust_margin(a, w, radius, p) * scale)
    least = 1.0 / (norm.value(w) * scale)
    dual = math.inf
    for unit in (target, 1.0):  # the first is usually closer, the second is the steadier
        candidate, perturbation = _dual(a[chosen], radius, p, norm, unit)
        distance = norm.dual(candidate @ a[chosen] - perturbation)
        if distance < dual:
            dual, weights = distance, candidate
        if dual - least <= _CLOSE * dual:
            break
    multipliers = np.zeros(len(z))
    multipliers[chosen] = weights
    return GameSolution(
        weights=w,
        value=least * scale,
        dual_value=dual * scale,
        multipliers=multipliers,
    )


def _primal(rows: Array, eps: float, p: float, norm: GroupNorm, target: float) -> Array:
    """Minimise N(w) subject to ``<w, z_i> − ε‖w‖_q >= target``; zeros if Clarabel gives up."""
    cp = cvxpy()
    coefficients = cp.Variable(len(norm.basis))
    w = norm.basis.T @ coefficients
    constraints: list[Any] = []
    penalty: Any = 0.0
    if eps > 0.0:
        constraints, size = norm_bound(w, dual_exponent(p), rows.shape[1])
        penalty = eps * size
    constraints.append((rows @ norm.basis.T) @ coefficients - penalty >= target)
    if len(norm.groups) == 1:
        cost = cp.sum_squares(coefficients) / 2.0
    else:
        bounds = cp.Variable(len(norm.groups))
        constraints += _group_bounds(coefficients, norm.groups, bounds)
        cost = norm.costs @ bounds
    if not solved(cp.Problem(cp.Minimize(cost), constraints)):
        return np.zeros(rows.shape[1])
    return np.asarray(norm.basis.T @ coefficients.value)


def _dual(rows: Array, eps: float, p: float, norm: GroupNorm, unit: float) -> tuple[Array, Array]:
    """α of shape (n,) in the simplex and δ of shape (d,) in the ball that minimise N*/unit."""
    cp = cvxpy()
    n, d = rows.shape
    lens = norm.basis / unit
    weights = cp.Variable(n, nonneg=True)
    delta = cp.Variable(d)
    image = cp.Variable(len(norm.basis))
    constraints: list[Any] = [cp.sum(weights) == 1.0]
    if eps > 0.0:
        cone, size = norm_bound(delta, p, d)
        constraints += [*cone, size <= eps, image == (lens @ rows.T) @ weights - lens @ delta]
    else:
        constraints.append(image == (lens @ rows.T) @ weights)
    if len(norm.groups) == 1:
        cost = cp.sum_squares(image) / 2.0
    else:
        cost = cp.Variable()
        constraints += _group_bounds(image, norm.groups, norm.costs * cost)
    if not solved(cp.Problem(cp.Minimize(cost), constraints)):
        return np.full(n, 1.0 / n), np.zeros(d)
    found = np.maximum(weights.value, 0.0)
    perturbation = np.zeros(d) if eps == 0.0 else np.asarray(delta.value)
    excess = lp_norm(perturbation, p) / eps if eps > 0.0 else 0.0
    return found / found.sum(), perturbation / max(excess, 1.0)


def _group_bounds(coefficients: Any, groups: tuple[Indices, ...], bounds: Any) -> list[Any]:
    """``‖coefficients_k‖₂ <= bounds_k`` for each group k: absolute values, or second-order cones."""
    cp = cvxpy()
    single = [k for k, rows in enumerate(groups) if len(rows) == 1]
    several = [k for k, rows in enumerate(groups) if len(rows) > 1]
    constraints = []
    if single:
        rows = np.concatenate([groups[k] for k in single])
        constraints.append(cp.abs(coefficients[rows]) <= bounds[single])
    constraints += [cp.SOC(bounds[k], coefficients[groups[k]]) for k in several]
    return constraints
