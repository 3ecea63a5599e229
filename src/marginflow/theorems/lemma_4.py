"""Lemma 4: the inner product of each layer with its gradient is −c_k ν."""

from __future__ import annotations

from marginflow.attacks import Derivative
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import homogeneous, scale_invariant
from marginflow.theorems._site import Site
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_TOLERANCE = 1e-10


def lemma_4(evidence: Evidence) -> Verdict:
    """``⟨W_k, G_k⟩ = −c_k ν`` (Eqs. 17, 95), with ``ν = (1/n) Σ |ℓ′(m_i)| m_i``.

    For the exponential loss ``ν = (1/n) Σ e^{−m_i} m_i``; for cross-entropy of several classes
    ``ν = −(1/n) Σ ⟨∇_f ℓ_i, f_i⟩``. Both sides are divided by L in the log domain. With δ held fixed
    this is Euler's identity at x + δ and needs nothing of δ; through δ(W) it needs scale invariance.
    """
    invariant = scale_invariant(evidence)
    total = evidence.config["derivative"] == "total"
    claim = Claim(
        "Lemma 4",
        "⟨W_k, ∂L/∂W_k⟩ = −c_k ν, ν = (1/n) Σ |ℓ′(m_i)| m_i",
        (
            homogeneous(evidence),
            Hypothesis(invariant.name, invariant.met, invariant.detail, needed=total),
        ),
        "largest |⟨W_k, G_k⟩ + c_k ν| / (c_k (1/n) Σ |ℓ′ m_i|) over layers and points, δ held fixed "
        "and (for a scale invariant attack) through δ(W)",
        "0",
        f"{_TOLERANCE:g}: rounding of sums over the weights, observed below 1e-13",
    )
    unmet = claim.inapplicable
    if unmet:
        if not evidence.sites:
            return unmet
        return (
            claim.set_aside(f"through δ(W) it is off by {_worst(evidence, 'total'):.2g}") or unmet
        )
    sides: list[Derivative] = ["detached"]
    if evidence.attack is not None and invariant.met:
        sides.append("total")
    errors = {side: _worst(evidence, side) for side in sides}
    text = ", ".join(f"{error:.1e} {side}" for side, error in errors.items())
    return claim.judge(max(errors.values()) <= _TOLERANCE, f"{text} ({evidence.where})")


def _worst(evidence: Evidence, derivative: Derivative) -> float:
    return max(_error(site, derivative) for site in evidence.sites)


def _error(site: Site, derivative: Derivative) -> float:
    slope = site.slope(derivative)
    apart = (site.inner(slope.gradients) + site.degrees * slope.nu).abs() / site.degrees
    # All margins 0 (a dead network): both sides must vanish.
    return float(apart.max()) / (slope.nu_size or 1.0)
