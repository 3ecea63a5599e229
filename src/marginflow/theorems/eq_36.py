"""Eq. (36): what gradient descent conserves between adjacent layers."""

from __future__ import annotations

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Claim, Verdict

_TOLERANCE = 1e-11


def eq_36(evidence: Evidence) -> Verdict:
    """``W_{k+1}ᵀW_{k+1} − W_kW_kᵀ`` changes by the accumulated η² terms only.

    Exact for gradient descent and SGD with any step, loss, attack and derivative, because
    on a deep linear network the loss depends on W through W_Π; not with momentum.
    """
    claim = Claim(
        "Eq. 36",
        "W_{k+1}ᵀW_{k+1} − W_kW_kᵀ changes only by Σ η²(G_{k+1}ᵀG_{k+1} − G_kG_kᵀ)",
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
