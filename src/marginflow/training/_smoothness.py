"""Smoothness constants of the adversarial loss of a deep linear network (Lemma 1, Eq. 12).

The set is ``S(r) = {W : ‖W_k‖_F ≤ r, ‖W_Π‖₂ ≥ r̄}``, the loss ``L(W) = g(W_Π)`` with
``g(p) = (1/n) Σ ℓ(y_i⟨p, x_i⟩ − ε‖p‖₂)``, ℓ β-smooth with |ℓ′| ≤ α, ‖x_i‖ ≤ R.
"""

from __future__ import annotations

import math

from marginflow._checks import real, whole

LOGISTIC_ALPHA = 1.0
"""α of the logistic loss: |ℓ′| < 1."""
LOGISTIC_BETA = 0.25
"""β of the logistic loss: 0 < ℓ″ ≤ 1/4."""


def printed_smoothness(
    depth: int,
    radius: float,
    floor: float,
    eps: float,
    *,
    alpha: float = LOGISTIC_ALPHA,
    beta: float = LOGISTIC_BETA,
) -> float:
    """β(r, r̄, ε) as printed in Eq. (12), for ‖x_i‖ ≤ 1 and r ≥ 1.

    ``r^{3L} L² [α + β + (ε/r̄^L)(2α + β + αβ/r̄^L)]``. Its derivation drops a factor 1 + ε, writes αβ
    for α and r̄^L for r̄; the value is nevertheless far above :func:`smoothness` in practice.

    Args:
        depth: L.
        radius: r ≥ 1.
        floor: r̄ > 0, the lower bound on ‖W_Π‖₂.
        eps: ε ≥ 0, in the units of x.
        alpha: bound on ``|ℓ′|``.
        beta: bound on ``ℓ″``.

    Raises:
        InputError: a number out of range.
    """
    L, r, low, e = _checked(depth, radius, floor, eps)
    raised = _power(1 / low, L)
    perturbed = e * raised * (2 * alpha + beta + alpha * beta * raised) if e else 0.0
    return _power(r, 3 * L) * L**2 * (alpha + beta + perturbed)


def smoothness(
    depth: int,
    radius: float,
    floor: float,
    eps: float,
    *,
    data_norm: float = 1.0,
    alpha: float = LOGISTIC_ALPHA,
    beta: float = LOGISTIC_BETA,
) -> float:
    """The corrected constant β*, a bound on ‖∇²L(W)‖₂ over S(r).

    ``β* = L r^{2L−2} [β(R + ε)² + εα/r̄] + (L−1) r^{L−2} α (R + ε)``.

    Derivation: ``∇²g = (1/n)Σ ℓ″ z zᵀ − ℓ′ (ε/‖p‖)(I − p̂p̂ᵀ)`` with z = y x − εp̂, so
    ``‖∇²g‖ ≤ β(R+ε)² + αε/r̄``; ``‖dW_Π‖ ≤ √L r^{L−1} ‖dW‖`` gives the first term, and the
    second differential of the product, at most ``(L−1) r^{L−2} ‖dW‖²``, times
    ``‖∇g‖ ≤ α(R+ε)`` the second.

    Args:
        depth: L.
        radius: r > 0.
        floor: r̄ > 0, the lower bound on ‖W_Π‖₂.
        eps: ε ≥ 0, in the units of x.
        data_norm: R = max ‖x_i‖₂, in the units of ε.
        alpha: bound on ``|ℓ′|``.
        beta: bound on ``ℓ″``.

    Raises:
        InputError: a number out of range.
    """
    L, r, low, e = _checked(depth, radius, floor, eps)
    reach = real("data_norm", data_norm, above=0.0) + e
    curved = L * _power(r, 2 * L - 2) * (beta * reach**2 + e * alpha / low)
    return curved + (L - 1) * _power(r, L - 2) * alpha * reach


def _power(base: float, exponent: int) -> float:
    """``base ** exponent``, infinite beyond the range of floats instead of an error."""
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


def _checked(
    depth: int, radius: float, floor: float, eps: float
) -> tuple[int, float, float, float]:
    return (
        whole("depth", depth, least=1),
        real("radius", radius, above=0.0),
        real("floor", floor, above=0.0),
        real("eps", eps, least=0.0),
    )
