"""Lemma 7's κ: how firmly the support vectors hold ū from all sides.

``κ = min_{‖ξ‖₂ = 1, ξ ⊥ ū} max_{i ∈ S} ⟨ξ, y_i x_i⟩`` (Eq. 54). The inner maximum is the support
function of the polytope C = conv{P⊥ y_i x_i : i ∈ S}, so κ is the distance from 0 to the boundary
of C: positive iff 0 lies inside, which needs the P⊥ y_i x_i to span ū⊥.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.spatial import ConvexHull, QhullError

from marginflow.errors import InputError
from marginflow.references._inputs import signed_examples
from marginflow.references.svm import max_margin

Array = npt.NDArray[np.float64]

_HULL_DIMENSION = 8
_HULL_POINTS = 200


@dataclass(frozen=True, eq=False)
class Kappa:
    """κ, or bounds on it.

    Attributes:
        lower, upper: ``lower ≤ κ ≤ upper``; equal where κ is exact.
        exact: whether the facets of the polytope were enumerated.
        spans: whether the projected support vectors span ū⊥; if not, κ ≤ 0.
        support: indices of the support vectors, shape (k,).
    """

    lower: float
    upper: float
    exact: bool
    spans: bool
    support: npt.NDArray[np.intp]


def kappa(x: npt.ArrayLike, y: npt.ArrayLike) -> Kappa:
    """κ of Eq. (54) for separable data.

    Exact where the facets can be had: in a simplex (|S| = dim + 1 affinely independent points,
    the generic case) by one linear solve each, in up to 8 dimensions by Qhull. Elsewhere the
    linear programs ``min t, ⟨ξ, z_i⟩ ≤ t, ‖ξ‖_∞ ≤ 1, ξ_j = ±1`` (one for each j and sign) bound it:
    their least value κ_∞ gives ``κ_∞/√dim ≤ κ``, and each solution, normalised, a bound from above.

    Args:
        x: examples, (n, d).
        y: labels −1/+1, (n,).

    Raises:
        DataError: as for :func:`max_margin`.
        InputError: the data are not separable through the origin.
    """
    z = signed_examples(x, y)
    svm = max_margin(x, y)
    if not svm.separable:
        raise InputError("kappa: expected data separable by a hyperplane through the origin")
    u = np.asarray(svm.direction)
    support = np.flatnonzero(z @ u <= svm.margin + 1e-7 * max(1.0, abs(svm.margin)))
    # An orthonormal basis of ū⊥; its first column is ū itself.
    q, _ = np.linalg.qr(np.column_stack([u, np.eye(len(u))]))
    points = z[support] @ q[:, 1 : len(u)]
    dimension = points.shape[1]
    if dimension == 0:
        return Kappa(math.inf, math.inf, True, True, support)
    rank = int(np.linalg.matrix_rank(points, tol=1e-9 * max(1.0, float(np.abs(points).max()))))
    if rank < dimension:
        return Kappa(-math.inf, 0.0, False, False, support)
    offsets = _facets(points)
    if offsets is not None:
        value = float(offsets.min())
        return Kappa(value, value, True, True, support)
    lower, upper = _bounds(points)
    return Kappa(lower, upper, False, True, support)


def _facets(points: Array) -> Array | None:
    """Signed distances of 0 to the facets of conv(points), positive inside, where affordable."""
    count, dimension = points.shape
    if dimension == 1:
        return np.array([points.max(), -points.min()])
    if count == dimension + 1:
        offsets = []
        for left_out in range(count):
            face = np.delete(points, left_out, axis=0)
            # The normal ν with ⟨ν, z⟩ = 1 on the face: its distance from 0 is 1/‖ν‖.
            if np.linalg.cond(face) > 1e12:
                return None
            normal = np.linalg.solve(face, np.ones(dimension))
            inside = float(points[left_out] @ normal) < 1
            offsets.append((1 if inside else -1) / float(np.linalg.norm(normal)))
        return np.array(offsets)
    if dimension > _HULL_DIMENSION or count > _HULL_POINTS:
        return None
    try:
        return np.asarray(-ConvexHull(points).equations[:, -1])
    except QhullError:
        return None


def _bounds(points: Array) -> tuple[float, float]:
    count, dimension = points.shape
    least, upper = math.inf, math.inf
    cost = np.zeros(dimension + 1)
    cost[-1] = 1.0
    table = np.column_stack([points, -np.ones(count)])
    for j in range(dimension):
        for sign in (1.0, -1.0):
            limits: list[tuple[float | None, float | None]] = [(-1.0, 1.0)] * dimension
            limits[j] = (sign, sign)
            done = linprog(cost, A_ub=table, b_ub=np.zeros(count), bounds=[*limits, (None, None)])
            least = min(least, float(done.fun))
            xi = done.x[:-1] / np.linalg.norm(done.x[:-1])
            upper = min(upper, float((points @ xi).max()))
    return least / math.sqrt(dimension) if least > 0 else least, upper
