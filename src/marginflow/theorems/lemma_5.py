"""Lemma 5: with a constant step the weights leave S(r) for the r of that step."""

from __future__ import annotations

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict
from marginflow.training import smoothness


def lemma_5(evidence: Evidence) -> Verdict:
    """With η = 1/β(r, r̄, ε) constant there is a t with ``max_k ‖W_k(t)‖_F > r``.

    The run's own η is read as 1/β* for the radius r that this equation gives.
    """
    lr = evidence.config["lr"]
    shared = (
        evidence.is_linear(),
        evidence.is_exact_l2(),
        evidence.within_margin(),
        evidence.is_logistic(),
        evidence.takes_steps(),
        evidence.is_gradient_descent(),
        evidence.has_path(),
        Hypothesis(
            "a constant step", None if lr is None else not isinstance(lr, str), f"lr = {lr}"
        ),
    )
    usable = all(h.met for h in shared)
    radius = _radius_of(evidence, float(lr)) if usable else None
    start = float(evidence.points[0].alignment.frobenius.max()) if usable else 0.0
    inside = Hypothesis(
        "W(0) ∈ S(r) for the r with η = 1/β*(r, r̄, ε)",
        radius is not None and radius > start if usable else None,
        "" if radius is None else f"r = {radius:.4g}, max ‖W_k(0)‖_F = {start:.4g}",
    )
    claim = Claim(
        "Lemma 5",
        "with the constant step 1/β(r, r̄, ε) the weights leave S(r)",
        (*shared, inside),
        "max_k ‖W_k‖_F at the end",
        f"above r = {radius:.4g} at some time" if radius else "above r at some time",
        "none: a strict inequality",
    )
    if claim.inapplicable or radius is None:
        return claim.inapplicable or claim.judge(None, "no radius")
    largest = max(float(p.alignment.frobenius.max()) for p in evidence.points)
    text = f"{largest:.4g} (from {start:.4g})"
    if largest > radius:
        return claim.judge(True, text)
    return claim.judge(None, text, "still inside S(r): train longer")


def _radius_of(evidence: Evidence, lr: float) -> float | None:
    """The r with ``η β*(r, r̄, ε) = 1``, by bisection, or None if there is none above 1e-6."""
    depth = len(evidence.points[0].layers)

    def excess(r: float) -> float:
        return (
            lr * smoothness(depth, r, evidence.floor, evidence.eps, data_norm=evidence.largest_norm)
            - 1
        )

    low, high = 1e-6, 1.0
    if excess(low) > 0 or depth == 1:
        return None
    while excess(high) < 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return low
