"""Lemma 6: the differences of the layers' norms stay bounded."""

from __future__ import annotations

import math

import torch

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Claim, Verdict


def lemma_6(evidence: Evidence) -> Verdict:
    """``|‖W_k‖_F² − ‖W_j‖_F²| ≤ |‖W_k(0)‖_F² − ‖W_j(0)‖_F²| + 2 L̃(W(0))`` for all k, j.

    Needs η ≤ min(1, 1/β) along the path (Eq. 38), which the paper's statement leaves out.
    """
    claim = Claim(
        "Lemma 6",
        "| ‖W_k‖_F² − ‖W_j‖_F² | stays within 2L̃(W(0)) of its initial value",
        (
            evidence.is_linear(),
            evidence.is_exact_l2(),
            evidence.within_margin(),
            evidence.is_gradient_descent(),
            evidence.keeps_step_bound(),
            evidence.has_path(),
        ),
        "largest growth of | ‖W_k‖_F² − ‖W_j‖_F² |, divided by 2L̃(W(0))",
        "at most 1",
        "none: an upper bound, far above rounding",
    )
    if claim.inapplicable:
        return claim.inapplicable
    initial = evidence.points[0].record.get("log_loss")
    if len(evidence.points[0].layers) < 2 or initial is None:
        return claim.judge(None, "one layer, or no loss recorded", "measure from epoch 0")
    room = 2 * math.exp(initial)
    differences = [_differences(p.alignment.frobenius.square()) for p in evidence.points]
    growth = max(float((d - differences[0]).max()) for d in differences)
    return claim.judge(growth <= room, f"{growth / room:.4g} ({growth:.4g} of {room:.4g})")


def _differences(squares: torch.Tensor) -> torch.Tensor:
    return (squares.unsqueeze(0) - squares.unsqueeze(1)).abs()
