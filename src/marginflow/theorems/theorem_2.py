"""Theorem 2: adjacent layers align and W_Π turns to the max-margin direction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marginflow.theorems._evidence import Evidence, Point
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_REACHED = 10.0
_EXPONENT_TOLERANCE = 0.10
_GROWTH = 10.0  # below that the next-order terms still bend the fitted exponents
_NOISE = 1e-27


def theorem_2(evidence: Evidence) -> tuple[Verdict, ...]:
    """``|⟨u_k, v_{k+1}⟩| → 1`` and ``W_Π/‖W_Π‖ → ū``, each with its rate.

    Three verdicts: the direction (with the bound ``γ̂_m ≤ γ_m − ε``, an equality in the limit), the
    rank-one gap ``1 − (‖W_k‖₂/‖W_k‖_F)² = Θ(σ⁻²)``, and the alignment gap ``1 − ⟨u_k, v_{k+1}⟩² =
    O(σ⁻⁴)``, sharper than the paper's. Exponents are fitted on the last third of the
    range of ln σ.
    """
    step = evidence.keeps_step_bound()
    shared = (
        evidence.is_linear(),
        evidence.is_exact_l2(),
        evidence.within_margin(),
        evidence.has_path(),
        Hypothesis("full-batch gradient descent", evidence.is_gradient_descent().met),
        Hypothesis(step.name, step.met, step.detail, needed=False),
        Hypothesis("the logistic loss", evidence.is_logistic().met, needed=False),
    )
    return (
        _direction(evidence, shared),
        _rate(evidence, shared, "rank one", "1 − (‖W_k‖₂/‖W_k‖_F)²", "rank_one_gaps", -2),
        _rate(evidence, shared, "alignment", "1 − ⟨u_k, v_{k+1}⟩²", "neighbour_gaps", -4),
    )


def _direction(evidence: Evidence, shared: Sequence[Hypothesis]) -> Verdict:
    claim = Claim(
        "Theorem 2 (direction)",
        "W_Π/‖W_Π‖ → ū and γ̂_m ≤ γ_m − ε, with equality in the limit",
        shared,
        "angle of W_Π to ū and the gap (γ_m − ε) − γ̂_m, from the first separated point to the last",
        "both shrink; γ̂_m never exceeds γ_m − ε",
        "the bound to 1e-9 relative: the oracle's gap and rounding",
    )
    if claim.inapplicable:
        return claim.inapplicable
    room = evidence.svm.margin - evidence.eps
    separated = [p for p in evidence.points if p.record["normalized_margin"] > 0]
    if len(separated) < 2:
        return claim.judge(None, "not separated yet", "train longer")
    gaps = [room - p.record["normalized_margin"] for p in separated]
    angles = [p.alignment.angle_to(evidence.svm_direction) for p in separated]
    text = (
        f"angle {angles[0]:.3g} → {angles[-1]:.3g} rad; gap {gaps[0]:.3g} → {gaps[-1]:.3g} "
        f"of γ_m − ε = {room:.6g}, at ln(1/L) = {evidence.log_inverse_loss:.4g}"
    )
    if min(gaps) < -1e-9 * room:
        return claim.judge(False, text)
    if evidence.log_inverse_loss < _REACHED:
        return claim.judge(None, text, f"ln(1/L) is still below 10: {evidence.further}")
    # In one dimension, or on a single example, the direction may be exact from the start.
    turned = angles[-1] < angles[0] or angles[-1] <= evidence.svm.angle_bound
    return claim.judge((gaps[-1] < gaps[0] or gaps[-1] <= 1e-9 * room) and turned, text)


def _rate(
    evidence: Evidence,
    shared: Sequence[Hypothesis],
    part: str,
    quantity: str,
    attribute: str,
    exponent: int,
) -> Verdict:
    claim = Claim(
        f"Theorem 2 ({part})",
        f"{quantity} falls like σ^{exponent}",
        shared,
        f"exponent of {quantity} against σ_k, fitted over the last third of ln σ, each layer",
        str(exponent) if attribute == "rank_one_gaps" else f"{exponent}, or below",
        f"{_EXPONENT_TOLERANCE:.0%}: next-order terms at finite σ",
    )
    if claim.inapplicable:
        return claim.inapplicable
    count = len(getattr(evidence.points[0].alignment, attribute))
    # The last layer has one row: it is rank one exactly, and its gap is 0.
    layers = range(min(count, len(evidence.points[0].layers) - 1))
    fits = [_fitted(evidence.points, attribute, k) for k in layers]
    found = [f for f in fits if f is not None]
    if not found or len(found) < len(fits):
        return claim.judge(None, f"σ has not grown by a factor of {_GROWTH:g}", evidence.further)
    text = ", ".join(f"{f:.3f}" for f in found)
    slack = _EXPONENT_TOLERANCE * abs(exponent)
    # Θ for the rank-one gap; O, a bound from above only, for the alignment gap.
    theta = attribute == "rank_one_gaps"
    close = all(f <= exponent + slack and (f >= exponent - slack or not theta) for f in found)
    return claim.judge(close, text)


def _fitted(points: Sequence[Point], attribute: str, k: int) -> float | None:
    """The slope of ln gap against ln σ over the last third of the range of ln σ."""
    sigma = np.log([float(p.alignment.spectral[k]) for p in points])
    gap = np.array([float(getattr(p.alignment, attribute)[k]) for p in points])
    last = (sigma >= (sigma[0] + 2 * sigma.max()) / 3) & (gap > _NOISE)
    if sigma.max() - sigma[0] < np.log(_GROWTH) or last.sum() < 4 or np.ptp(sigma[last]) < 0.1:
        return None
    return float(np.polyfit(sigma[last], np.log(gap[last]), 1)[0])
