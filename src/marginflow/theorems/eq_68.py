"""Eq. (68): the part of W_1 orthogonal to ū stays bounded while W_1 grows."""

from __future__ import annotations

import math

import torch

from marginflow.theorems._evidence import Evidence, Point
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict
from marginflow.theorems.lemma_8 import applies, threshold


def eq_68(evidence: Evidence) -> Verdict:
    """``‖P⊥W_1(t)‖²/‖W_1(t)‖² ≤ [‖P⊥W_1(t_1)‖² + 2(L(t_1) − L(t))]/‖W_1(t_1)‖²`` while Lemma 8 applies.

    On a stretch t_1 < t on which ``‖P⊥W_Π‖ ≥ φ``, Lemma 8 applies and ‖W_1‖ does not fall
    (Eq. 64). Most runs never get that far from ū; the paper then concludes
    ``‖P⊥W_1‖/‖W_1‖ → 0`` from ``‖W_1‖ → ∞`` alone, and that ratio is printed.
    """
    found = evidence.kappa
    positive = found is not None and found.lower > 0
    claim = Claim(
        "Eq. 68",
        "the share of W_1 orthogonal to ū is bounded by its share at t_1 plus 2L(t_1)/‖W_1(t_1)‖²",
        (
            evidence.is_linear(),
            evidence.is_exact_l2(),
            evidence.within_margin(),
            evidence.is_logistic(),
            evidence.is_gradient_descent(),
            evidence.keeps_step_bound(),
            evidence.has_path(),
            Hypothesis("κ > 0 (Lemma 7)", positive),
        ),
        "largest left side / right side over measured pairs t_1 < t beyond the threshold φ",
        "at most 1",
        "1e-12: rounding",
    )
    if claim.inapplicable or found is None:
        return claim.inapplicable or claim.judge(None, "not separable")
    phi = threshold(evidence, found)
    u = evidence.svm_direction
    parts = [_parts(point, u) for point in evidence.points]
    ratios = []
    far = [applies(evidence, point.direction, phi) for point in evidence.points]
    for start, (across_0, size_0, _, loss_0) in enumerate(parts):
        for later in range(start + 1, len(parts)):
            across, size, _, loss = parts[later]
            if not (far[start] and far[later] and size >= parts[later - 1][1]):
                break
            bound = (across_0 + 2 * (loss_0 - loss)) / size_0
            ratios.append(across / size / bound)
    first, last = parts[0][0] / parts[0][1], parts[-1][0] / parts[-1][1]
    share = f"‖P⊥W_1‖²/‖W_1‖² {first:.3g} → {last:.3g}"
    if not ratios:
        furthest = max(p[2] for p in parts)
        text = f"{share}; ‖P⊥W_Π‖ at most {furthest:.3g}, φ = {phi:.3g}"
        return claim.judge(
            None,
            text,
            "no stretch beyond φ with γ⟨W_Π, ū⟩ ≥ ε‖W_Π‖ and a growing ‖W_1‖: not needed",
        )
    return claim.judge(max(ratios) <= 1 + 1e-12, f"{max(ratios):.4g}; {share}")


def _parts(point: Point, u: torch.Tensor) -> tuple[float, float, float, float]:
    """``‖P⊥W_1‖²``, ``‖W_1‖²``, ``‖P⊥W_Π‖`` and L."""
    w = point.layers[0]
    across = w - torch.outer(w @ u, u)
    product = point.direction
    beyond = torch.linalg.vector_norm(product - torch.dot(product, u) * u)
    loss = math.exp(point.record["log_loss"])
    return float(across.square().sum()), float(w.square().sum()), float(beyond), loss
