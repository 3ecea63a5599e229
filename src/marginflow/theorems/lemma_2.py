"""Lemma 2: with its step size and growing radius the loss never increases."""

from __future__ import annotations

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_TOLERANCE = 1e-13


def lemma_2(evidence: Evidence) -> Verdict:
    """``L(t+1) ≤ L(t) − (η/2)‖∇L(t)‖²`` at every step (Eq. 30), for ``lr="lemma2"``."""
    lr = evidence.config["lr"]
    outside = [r["below_floor"] for r in evidence.run.metrics if r.get("below_floor") is not None]
    claim = Claim(
        "Lemma 2",
        "the loss never increases under η = min{1, 1/β(r, r̄, ε)} with r(t) growing by μ",
        (
            evidence.is_linear(),
            evidence.is_exact_l2(),
            evidence.within_margin(),
            evidence.is_logistic(),
            evidence.takes_steps(),
            evidence.is_gradient_descent(),
            Hypothesis(
                "the step size of Lemma 2",
                None if lr is None else str(lr).startswith("lemma2"),
                f"lr = {lr}",
            ),
            Hypothesis(
                "‖W_Π‖ stays above r̄",
                not outside or max(outside) == 0,
                f"{max(outside):.0f} steps below" if outside else "",
            ),
        ),
        "largest (L(t+1) − L(t) + (η/2)‖∇L‖²)/L(t) over all steps",
        "at most 0",
        f"{_TOLERANCE:g}: rounding of the loss in float64",
    )
    if claim.inapplicable:
        return claim.inapplicable
    final = evidence.run.final
    if final.get("descent_excess") is None:
        return claim.judge(None, "fewer than two steps", "train longer")
    text = (
        f"{final['descent_excess']:.2e} over {final['step']} steps; "
        f"r grew to {final['radius']:.4g}, η = {final['learning_rate']:.3g}"
    )
    return claim.judge(final["descent_excess"] <= _TOLERANCE, text)
