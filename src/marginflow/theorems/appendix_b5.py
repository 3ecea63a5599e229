"""Appendix B.5: under ℓp perturbations the limit direction is the robust one, not the SVM's."""

from __future__ import annotations

import math

import torch

from marginflow.alignment import angle
from marginflow.errors import MissingDependencyError
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_REACHED = 10.0


def appendix_b5(evidence: Evidence) -> Verdict:
    """W_Π turns to ``argmin ‖w‖₂ s.t. y_i⟨w, x_i⟩ − ε‖w‖_q ≥ 1`` (Eq. 140, which says max).

    For the exact ℓp perturbation of a deep linear network, any p ∈ [1, ∞], FGSM being p = ∞.
    """
    from marginflow.references import robust_svm

    attack = evidence.attack
    exact = (
        attack is not None
        and attack.bounds is None
        and attack.name in ("exact-linear", "fgsm", "fgm")
    )
    robust, missing = None, ""
    if evidence.linear and exact and evidence.p != 2:
        try:
            robust = robust_svm(evidence.rows, evidence.labels, evidence.eps, p=evidence.p)
        except MissingDependencyError as error:
            missing = str(error)  # the other statements can be judged without it
    claim = Claim(
        "Appendix B.5",
        "W_Π/‖W_Π‖ tends to the solution of the robust problem with the dual norm",
        (
            evidence.is_linear(),
            Hypothesis("an exact ℓp perturbation", exact, evidence.config["attack"]),
            Hypothesis("p ≠ 2 (p = 2 is Theorem 2)", evidence.p != 2, f"p = {evidence.p:g}"),
            Hypothesis(
                "Eq. (143): ε below the largest feasible",
                None if robust is None else robust.feasible,
                "" if robust is None else f"ε = {evidence.eps:.6g} of {robust.largest_eps:.6g}",
            ),
            evidence.has_path(),
        ),
        "angle of W_Π to the robust direction, beside that to the SVM direction",
        "falls to 0, and below a tenth of the angle between the two oracles",
        "a tenth: the directions are told apart; the convergence is logarithmic",
    )
    if claim.inapplicable or robust is None:
        return claim.inapplicable or claim.judge(None, "no oracle", missing)
    target = torch.from_numpy(robust.direction)
    apart = angle(target, evidence.svm_direction)
    angles = [p.alignment.angle_to(target) for p in evidence.points]
    to_svm = evidence.points[-1].alignment.angle_to(evidence.svm_direction)
    text = (
        f"robust {angles[0]:.3g} → {angles[-1]:.3g} rad, SVM {to_svm:.3g} rad "
        f"(oracles {apart:.3g} apart, gap {robust.gap:.1g}), ln(1/L) = {evidence.log_inverse_loss:.4g}"
    )
    if angles[-1] < apart / 10:
        return claim.judge(True, text)
    if evidence.log_inverse_loss < _REACHED or math.isnan(evidence.log_inverse_loss):
        return claim.judge(None, text, f"ln(1/L) is still below 10: {evidence.further}")
    # A direction on its way falls like 1/ln t: by half while ln(1/L) doubles.
    half = next(
        angle_there
        for point, angle_there in zip(evidence.points, angles, strict=True)
        if -(point.record["log_loss"] or 0.0) >= evidence.log_inverse_loss / 2
    )
    settled_elsewhere = angles[-1] > 0.95 * half and to_svm < angles[-1]
    turned_away = angles[-1] >= angles[0]
    return claim.judge(
        False if settled_elsewhere or turned_away else None, text, "still turning: train longer"
    )
