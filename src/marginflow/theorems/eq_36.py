"""Eq. (36): what gradient descent conserves between adjacent layers."""

from __future__ import annotations

import torch

from marginflow.alignment import balances
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Claim, Verdict
from marginflow.theorems.lemma_11 import conserved_to

_TOLERANCE = 1e-11


def eq_36(evidence: Evidence) -> Verdict:
    """``W_{k+1}ᵀ W_{k+1} − W_k W_kᵀ`` changes by the accumulated η² terms only.

    Exact for gradient descent and SGD with any step, loss, attack and derivative, because
    on a deep linear network the loss depends on W through W_Π; not with momentum.
    """
    if evidence.is_flow:
        return _along_the_flow(evidence)
    claim = Claim(
        "Eq. 36",
        "W_{k+1}ᵀ W_{k+1} − W_k W_kᵀ changes only by Σ η²(G_{k+1}ᵀ G_{k+1} − G_k G_kᵀ)",
        (evidence.is_linear(), evidence.without_momentum(), evidence.is_float64()),
        "largest relative drift over layers and measured points",
        "0",
        f"{_TOLERANCE:g}: rounding, observed at 1e-14 after 10⁴ steps, grows at most like the steps",
    )
    if claim.inapplicable:
        return claim.inapplicable
    drifts = [
        r["balance_drift"] for r in evidence.run.metrics if r.get("balance_drift") is not None
    ]
    if not drifts:
        return claim.judge(None, "no drift was recorded", "train two layers or more, measured")
    return claim.judge(max(drifts) <= _TOLERANCE, f"{max(drifts):.2e}")


def _along_the_flow(evidence: Evidence) -> Verdict:
    """Without η² terms the differences are constant; judged from the kept weights."""
    tolerance = conserved_to(evidence)
    stepped = any(record.get("method") == "steps" for record in evidence.run.metrics)
    claim = Claim(
        "Eq. 36",
        "W_{k+1}ᵀ W_{k+1} − W_k W_kᵀ is constant along the gradient flow",
        (evidence.is_linear(), evidence.is_float64(), evidence.has_path()),
        "largest change over layers and kept points, relative to the largest ‖W_k‖_F²",
        "0",
        f"{tolerance:g}: 1e-9, or 100 times the rtol of Runge–Kutta steps",
    )
    if claim.inapplicable:
        return claim.inapplicable
    start = balances(evidence.points[0].layers)
    if not start:
        return claim.judge(None, "one layer", "follow two layers or more")
    size = max(float(w.square().sum()) for point in evidence.points for w in point.layers)
    drift = max(
        float(torch.linalg.matrix_norm(now - then))
        for point in evidence.points
        for now, then in zip(balances(point.layers), start, strict=True)
    )
    if stepped and drift / size > tolerance:
        why = "explicit steps add to it of second order; Lemma 11 takes that off, layer by layer"
        return claim.judge(None, f"{drift / size:.2e}", why)
    return claim.judge(drift / size <= tolerance, f"{drift / size:.2e}")
