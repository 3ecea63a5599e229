"""The robust hard-margin SVM: where a deep linear network goes under an exact ℓp adversary.

    minimise ½‖w‖₂²  subject to  y_i <w, x_i> − ε‖w‖_q >= 1 for all i,   1/p + 1/q = 1,

Lyu & Zhu 2022, appendix B.5, Eqs. (140)–(141), for p = ∞ (where 140 prints *max* for *min*). The
problem is convex because ``min Σ‖W_k‖_F² = L‖w‖₂^{2/L}`` over the factorisations of w, whose
minimisers are those of ‖w‖₂. It is feasible iff ε is below ``max_{‖u‖_q=1} min_i y_i <u, x_i>``,
Eqs. (142)–(143). For p = 2 the constraint is ``<w, z_i> >= 1 + ε‖w‖₂`` and w has the SVM's
direction, with ‖w‖₂ = 1/(γ_m − ε).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marginflow.references._game import GroupNorm, solve_game
from marginflow.references._inputs import (
    Array,
    Indices,
    budget,
    dual_exponent,
    exponent,
    lp_norm,
    signed_examples,
)
from marginflow.references.svm import MaxMargin, angle_of_gap, max_margin

_ON_THE_MARGIN = 1e-6
_UNDECIDED = 1e-6


@dataclass(frozen=True)
class RobustSVM:
    """The robust SVM and its certificate; of an infeasible problem, how far it is from feasible.

    Attributes:
        p: the perturbations' exponent.
        eps: their radius, in the units of x.
        feasible: whether ``eps < largest_eps``; if not, ``weights`` and ``direction`` are zeros,
            ``margin`` and ``dual_value`` 0.0, ``gap`` infinite.
        largest_eps: the least budget that makes the problem infeasible, Eq. (143), in the units of
            x.
        weights: w, shape (d,), with ``min_i y_i <w, x_i> − ε‖w‖_q = 1``.
        direction: ``w/‖w‖₂``, shape (d,).
        margin: ``1/‖w‖₂ = min_i y_i <u, x_i> − ε‖u‖_q`` at u = direction.
        dual_value: ``‖Σ α_i y_i x_i − δ‖₂ >= margin``, the distance from a point of the hull of
            the signed examples to a point of the ball ``‖δ‖_p <= ε``.
        gap: ``(dual_value − margin)/dual_value``.
        support: indices of the examples with the least margin (to 1e-6 relative), sorted.
        multipliers: α, shape (n,), >= 0, sum 1; the problem's own multipliers are ``α‖w‖₂²``.
        advice: empty if feasible, else what to do.
    """

    p: float
    eps: float
    feasible: bool
    largest_eps: float
    weights: Array
    direction: Array
    margin: float
    dual_value: float
    gap: float
    support: Indices
    multipliers: Array
    advice: str = ""

    @property
    def angle_bound(self) -> float:
        """A proven bound, in radians, on the angle to the exact direction: arccos(1 − gap)."""
        return angle_of_gap(self.gap) if self.feasible else math.pi


def robust_svm(x: npt.ArrayLike, y: npt.ArrayLike, eps: float, *, p: float) -> RobustSVM:
    """``argmin ½‖w‖₂²`` subject to ``y_i <w, x_i> − ε‖w‖_q >= 1``, with its primal–dual gap.

    Args:
        x: shape (n, d).
        y: labels −1 or +1, shape (n,).
        eps: radius of the perturbations, >= 0, in the units of x.
        p: their exponent, in [1, ∞].

    Raises:
        DataError: bad shapes, labels, NaN or infinity.
        InputError: eps negative or not finite, p below 1.
        MissingDependencyError: cvxpy or Clarabel is not installed.
    """
    eps, p = budget(eps), exponent(p)
    z = signed_examples(x, y)
    widest = max_margin(x, y, p=p)
    if not (widest.separable and eps < widest.margin):
        return _infeasible(z, eps, widest)
    used = z.any(axis=0)
    a = z[:, used]
    d = a.shape[1]
    euclidean = GroupNorm(np.eye(d), (np.arange(d),), np.ones(1))
    found = solve_game(a, eps, p, euclidean, widest.direction[used], widest.support)
    weights = np.zeros(z.shape[1])
    weights[used] = found.weights
    margins = z @ weights
    level = 1.0 + eps * lp_norm(weights, dual_exponent(p))
    return RobustSVM(
        p=p,
        eps=eps,
        feasible=True,
        largest_eps=widest.margin,
        weights=weights,
        direction=weights * found.value,
        margin=found.value,
        dual_value=found.dual_value,
        gap=found.gap,
        support=np.flatnonzero(margins <= level * (1.0 + _ON_THE_MARGIN)),
        multipliers=found.multipliers,
    )


def largest_feasible_eps(x: npt.ArrayLike, y: npt.ArrayLike, *, p: float) -> float:
    """The budget ``max_{‖u‖_q=1} min_i y_i <u, x_i>`` (Eq. 143) below which ε must stay.

    In the units of x; 0.0 for data that are not separable through the origin.

    Args:
        x: shape (n, d).
        y: labels −1 or +1, shape (n,).
        p: exponent of the perturbations' norm, in [1, ∞].

    Raises:
        DataError: bad shapes, labels, NaN or infinity.
        InputError: p below 1.
        MissingDependencyError: p is none of 1, 2, ∞ and cvxpy or Clarabel is not installed.
    """
    return max_margin(x, y, p=p).margin


def _infeasible(z: Array, eps: float, widest: MaxMargin) -> RobustSVM:
    if widest.separable:
        advice = f"eps = {eps:g} is not below {widest.margin:g}, the largest feasible: reduce it"
    elif widest.gap > _UNDECIDED:
        advice = f"the solvers failed (gap {widest.gap:.0e}): rescale x, or try another p"
    else:
        advice = "the data are not separable by a hyperplane through the origin: no eps is feasible"
    return RobustSVM(
        p=widest.p,
        eps=eps,
        feasible=False,
        largest_eps=widest.margin,
        weights=np.zeros(z.shape[1]),
        direction=np.zeros(z.shape[1]),
        margin=0.0,
        dual_value=0.0,
        gap=math.inf,
        support=widest.support,
        multipliers=widest.multipliers,
        advice=advice,
    )
