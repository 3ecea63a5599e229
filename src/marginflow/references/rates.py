"""How fast the direction of a one-layer linear predictor converges under an ℓ2 adversary.

The flow of ``φ(w) = (1/n) Σ e^{−m_i}``, ``m_i = <w, z_i> − ε‖w‖₂``, ε < γ_m. Write ū and γ_m for
the max-margin direction and margin, P⊥ for the projection off ū, ``w = a ū + b`` with b ⊥ ū, and S
for the support vectors (``<ū, z_i> = γ_m``). As a → ∞ with b bounded, ``‖w‖ = a + O(1/a)``, so

    m_i = a(γ_m − ε) + <b, P⊥ z_i> + O(1/a)                     (i in S; the others die out)
    ȧ  = (γ_m − ε) e^{−a(γ_m − ε)} C(b)/n,   C(b) = Σ_S e^{−<b, P⊥ z_i>}
    ḃ  = e^{−a(γ_m − ε)} (1/n) [ Σ_S e^{−<b, P⊥ z_i>} P⊥ z_i − (ε/a) C(b) b ]

Along ``dτ = e^{−a(γ_m−ε)} dt/n``, τ ~ ln t, the part of b in the span of the P⊥ z_i (i in S)
follows −∇C up to O(1/a), so it tends to ``w⊥* = argmin_{b ⊥ ū} C(b)``, the *same* point as without
adversary (the residual of Soudry et al. 2018, theorem 9). C has a minimiser iff
``Σ_S α_i P⊥ z_i = 0`` with all α_i > 0, which is the SVM's stationarity ``Σ α_i z_i = γ_m ū`` with
every support vector active; on the span it is unique. The norm does feel ε: integrating ȧ,

    a(t) = [ln t + ln((γ_m − ε)² C(w⊥*)/n)] / (γ_m − ε) + o(1)
    angle(w, ū) = arctan(‖b‖/a),   so   angle · ln t → ‖w⊥*‖ (γ_m − ε) .

Against ε = 0 at the same t the angle is smaller by (γ_m − ε)/γ_m: the adversary makes the norm grow
faster while b stays put.

The part b° of b off that span needs care. Nothing drives it but the last term: dividing the two
displays, ``d b°/da = −(ε/(γ_m − ε)) b°/a``, hence

    ‖b°‖ ∝ a^{−ε/(γ_m − ε)} ∝ (ln t)^{−ε/(γ_m − ε)} .

With an adversary the start is forgotten, at this slow power law, and the limit above holds from
every start. Without one (ε = 0) b° keeps for ever what the start and the early pull of the other
examples gave it, and ``angle · ln t → γ_m (‖w⊥*‖² + ‖b°‖²)^{1/2}``: the limit above, and with it
the exact factor γ_m/(γ_m − ε) between the two, then needs the support vectors to span the space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from marginflow.errors import InputError
from marginflow.references._inputs import Array, Indices, budget, signed_examples
from marginflow.references.svm import max_margin

_GRADIENT = 1e-12
_SMALLEST_SHARE = 1e-8
_STEPS = 200


@dataclass(frozen=True)
class Residual:
    """The bounded part w⊥* of the one-layer flow, beside its direction ū.

    Attributes:
        vector: w⊥*, shape (d,), orthogonal to ū.
        norm: ``‖w⊥*‖₂``.
        log_partition: ``ln C(w⊥*)``, C as in the module's text.
        gradient: ``‖∇ ln C(w⊥*)‖₂ / max_S ‖P⊥ z_i‖₂``, 0 at the exact minimiser.
        converged: whether ``gradient`` is at most 1e-12 and no share is below 1e-8. If not, a
            support vector has multiplier 0 (a degenerate SVM): C has no minimiser, b(t) grows
            without bound, and no rate is claimed.
        direction: ū, shape (d,).
        margin: γ_m.
        support: the indices in S.
        shares: ``e^{−<w⊥*, P⊥ z_i>}/C``, shape (k,), k = |S|: the SVM's multipliers, scaled to sum
            1.
        spans: whether the P⊥ z_i span all d − 1 dimensions across ū.
        examples: n.
    """

    vector: Array
    norm: float
    log_partition: float
    gradient: float
    converged: bool
    direction: Array
    margin: float
    support: Indices
    shares: Array
    spans: bool
    examples: int


def w_perp(x: npt.ArrayLike, y: npt.ArrayLike) -> Residual:
    """``w⊥* = argmin_{w ⊥ ū} Σ_{i in S} exp(−<w, P⊥ y_i x_i>)`` by Newton's method on ln C.

    Args:
        x: shape (n, d).
        y: labels −1 or +1, shape (n,).

    Raises:
        DataError: bad shapes, labels, NaN or infinity.
        InputError: the data are not separable through the origin.
    """
    z = signed_examples(x, y)
    widest = max_margin(x, y)
    if not widest.separable:
        raise InputError("w_perp: expected data separable by a hyperplane through the origin")
    u = widest.direction / np.linalg.norm(widest.direction)
    held = z[widest.support]
    across = held - np.outer(held @ u, u)
    scale = float(np.max(np.linalg.norm(held, axis=1)))
    _, singular, basis = np.linalg.svd(across / scale, full_matrices=False)
    rows = across / scale @ basis[singular > 1e-9].T
    found, gradient = _least_log_partition(rows)
    vector = found @ basis[singular > 1e-9] / scale
    log_partition = float(logsumexp(-rows @ found))
    shares = np.exp(-rows @ found - log_partition)
    return Residual(
        vector=vector,
        norm=float(np.linalg.norm(vector)),
        log_partition=log_partition,
        gradient=gradient,
        converged=gradient <= _GRADIENT and float(shares.min()) >= _SMALLEST_SHARE,
        direction=u,
        margin=widest.margin,
        support=widest.support,
        shares=shares,
        spans=rows.shape[1] == z.shape[1] - 1,
        examples=len(z),
    )


def limit_angle_times_log_time(residual: Residual, eps: float) -> float:
    """``lim angle(w(t), ū) · ln t = ‖w⊥*‖ (γ_m − ε)``, in radians.

    Args:
        residual: what :func:`w_perp` gave.
        eps: radius of the ℓ2 perturbations, in the units of x.

    Raises:
        InputError: eps outside [0, γ_m), a residual that has not converged, or eps = 0 with
            support vectors that do not span the space (the limit then depends on the start).
    """
    return residual.norm * _slack(residual, eps)


def memory_exponent(residual: Residual, eps: float) -> float:
    """The power −ε/(γ_m − ε) of ln t with which the start is forgotten off the support's span.

    Args:
        residual: what :func:`w_perp` gave.
        eps: radius of the ℓ2 perturbations, in the units of x.

    Raises:
        InputError: eps outside [0, γ_m).
    """
    return -eps / _room(residual, eps)


def predicted_angle(residual: Residual, eps: float, log_time: npt.ArrayLike) -> Array:
    """``arctan(‖w⊥*‖/a(t))`` with a(t) to o(1), in radians; b° (the start) counts as forgotten.

    Of the shape of the times.

    Args:
        residual: of :func:`w_perp`.
        eps: radius of the ℓ2 perturbations, in the units of x.
        log_time: ln t, any shape, large enough that a(t) > 0.

    Raises:
        InputError: as :func:`limit_angle_times_log_time`, or a time too early.
    """
    slack = _slack(residual, eps)
    offset = 2.0 * math.log(slack) + residual.log_partition - math.log(residual.examples)
    along = (np.asarray(log_time, dtype=np.float64) + offset) / slack
    if not np.all(along > 0.0):
        raise InputError(f"log_time: expected ln t above {-offset:g}, where the expansion begins")
    return np.asarray(np.arctan(residual.norm / along))


def _room(residual: Residual, eps: float) -> float:
    """``γ_m − ε``."""
    eps = budget(eps)
    if eps >= residual.margin:
        raise InputError(f"eps: expected less than the margin {residual.margin:g}, got {eps:g}")
    return residual.margin - eps


def _slack(residual: Residual, eps: float) -> float:
    """``γ_m − ε``, where the rate holds."""
    room = _room(residual, eps)
    if not residual.converged:
        raise InputError(
            "residual: a support vector has multiplier 0 (degenerate data), so no rate is known; "
            "perturb the data"
        )
    if eps == 0.0 and not residual.spans:
        raise InputError(
            "eps: expected more than 0, since the support vectors do not span the space: without "
            "an adversary the limit depends on the start (‖w⊥*‖ γ_m is then a lower bound)"
        )
    return room


def _least_log_partition(rows: Array) -> tuple[Array, float]:
    """The minimiser of ``ln Σ e^{−<b, rows_i>}``, and the norm of its gradient there.

    ln C is convex; its Newton step is damped until Armijo's condition holds. The rows span their
    space, so the Hessian (their covariance under the weights) is definite at a minimiser.
    """
    b = np.zeros(rows.shape[1])
    largest = max(float(np.max(np.linalg.norm(rows, axis=1))), np.finfo(float).tiny)
    value, gradient, hessian = _log_partition(rows, b)
    for _ in range(_STEPS):
        if np.linalg.norm(gradient) <= 1e-16 * largest:
            break
        step = -np.linalg.lstsq(hessian, gradient)[0]
        decrease = float(gradient @ step)
        size = 1.0
        # Near the end the decrease drowns in rounding: there the full step is right.
        while size > 1e-8 and -decrease > 1e-14 * max(abs(value), 1.0):
            if _log_partition(rows, b + size * step)[0] <= value + 1e-4 * size * decrease:
                break
            size /= 2.0
        new_value, new_gradient, new_hessian = _log_partition(rows, b + size * step)
        if -decrease <= 1e-14 and np.linalg.norm(new_gradient) >= np.linalg.norm(gradient):
            break
        b, value, gradient, hessian = b + size * step, new_value, new_gradient, new_hessian
    return b, float(np.linalg.norm(gradient)) / largest


def _log_partition(rows: Array, b: Array) -> tuple[float, Array, Array]:
    """``ln C(b)``, its gradient and its Hessian."""
    logs = -rows @ b
    value = float(logsumexp(logs))
    weights = np.exp(logs - value)
    mean = weights @ rows
    centred = rows - mean
    return value, -mean, centred.T @ (weights[:, None] * centred)
