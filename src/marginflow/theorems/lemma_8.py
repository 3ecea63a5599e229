"""Lemma 8: far from the max-margin direction, descent pushes the first layer back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

if TYPE_CHECKING:
    from marginflow.references import Kappa

_SAMPLES = 400


def threshold(evidence: Evidence, found: Kappa) -> float:
    """``φ = 2n/(eκ)`` (Eq. 62)."""
    return 2 * evidence.data.n / (math.e * found.lower)


def lemma_8(evidence: Evidence) -> Verdict:
    """``⟨P⊥W_1, ∂L̃/∂W_1⟩ ≥ 0`` once ``‖P⊥W_Π‖ ≥ 2n/(eκ)`` and W_Π is adversarially separating.

    The inner product equals ``⟨P⊥W_Π, ∇g(W_Π)⟩`` and depends on W through W_Π only, so it is examined
    at seeded random predictors beyond the threshold (and at those of the path, which
    rarely get there). Eq. (59) needs ``γ⟨W_Π, ū⟩ ≥ ε‖W_Π‖``, which the statement leaves out.
    """
    found = evidence.kappa
    positive = found is not None and found.lower > 0
    claim = Claim(
        "Lemma 8",
        "⟨P⊥W_1, ∂L̃/∂W_1⟩ ≥ 0 where ‖P⊥W_Π‖ ≥ φ = 2n/(eκ)",
        (
            evidence.is_linear(),
            evidence.is_exact_l2(),
            evidence.within_margin(),
            evidence.is_logistic(),
            Hypothesis("κ > 0 (Lemma 7)", positive, f"κ = {found.lower:.4g}" if found else ""),
        ),
        "least ⟨P⊥W_Π, ∇g⟩ / (‖P⊥W_Π‖ ‖∇g‖) over predictors beyond the threshold",
        "at least 0",
        "1e-12: rounding of the cosine",
    )
    if claim.inapplicable or found is None:
        return claim.inapplicable or claim.judge(None, "not separable")
    phi = threshold(evidence, found)
    candidates = [p.direction for p in evidence.points] + _beyond(evidence, phi)
    cosines = [c for w in candidates if (c := _cosine(evidence, w, phi)) is not None]
    if not cosines:
        return claim.judge(None, "no direction is orthogonal to ū", "give more than one feature")
    text = f"{min(cosines):.4g} over {len(cosines)} predictors, φ = {phi:.4g}"
    return claim.judge(min(cosines) >= -1e-12, text)


def _beyond(evidence: Evidence, phi: float) -> list[Tensor]:
    """Predictors aū + bξ with b ≥ φ, ξ ⊥ ū of length 1, and a just large enough, or larger."""
    u = evidence.svm_direction
    generator = torch.Generator().manual_seed(0)
    tilt = evidence.eps / evidence.svm.margin
    least = tilt / math.sqrt(1 - tilt**2)  # a/b at which γ a = ε ‖W_Π‖
    found = []
    for number in range(_SAMPLES):
        xi = torch.randn(u.shape, generator=generator, dtype=torch.float64)
        xi = xi - torch.dot(xi, u) * u
        if not bool(xi.any()):
            break
        b = phi * (1 + number % 4)
        a = b * (least + 1e-9) * (1 + (number // 4) % 3) + (number // 12) % 3
        found.append(a * u + b * xi / torch.linalg.vector_norm(xi))
    return found


def applies(evidence: Evidence, w: Tensor, phi: float) -> bool:
    """Whether the lemma speaks of W_Π = w: ``‖P⊥w‖ ≥ φ`` and ``γ⟨w, ū⟩ ≥ ε‖w‖`` (for Eq. 59)."""
    along = torch.dot(w, evidence.svm_direction)
    beyond = float(torch.linalg.vector_norm(w - along * evidence.svm_direction))
    tilted = evidence.svm.margin * along >= evidence.eps * torch.linalg.vector_norm(w)
    return beyond >= phi and beyond > 0 and bool(tilted)


def _cosine(evidence: Evidence, w: Tensor, phi: float) -> float | None:
    """The cosine of P⊥w and ∇g(w), or None where the lemma says nothing of w."""
    if not applies(evidence, w, phi):
        return None
    u = evidence.svm_direction
    across = w - torch.dot(w, u) * u
    x = torch.from_numpy(evidence.rows)
    y = torch.from_numpy(evidence.labels)
    size = torch.linalg.vector_norm(w)
    margins = y * (x @ w) - evidence.eps * size
    # Only the direction of ∇g counts, so the weights |ℓ′| may be scaled: no underflow.
    logs = torch.nn.functional.logsigmoid(-margins)
    weights = torch.exp(logs - logs.max())
    gradient = -((weights * y) @ x - weights.sum() * evidence.eps * w / size)
    scale = torch.linalg.vector_norm(across) * torch.linalg.vector_norm(gradient)
    return float(torch.dot(across, gradient) / scale)
