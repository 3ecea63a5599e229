"""Lemma 7: the support vectors hold ū from all sides, κ > 0."""

from __future__ import annotations

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict


def lemma_7(evidence: Evidence) -> Verdict:
    """``κ = min_{‖ξ‖=1, ξ⊥ū} max_{i∈S} ⟨ξ, y_i x_i⟩ > 0`` (Eq. 54), a property of the data.

    Holds with probability 1 for data from a density *if the support vectors span the space*.
    """
    found = evidence.kappa
    features = evidence.rows.shape[1]
    spans = None if found is None else found.spans
    detail = (
        "" if found is None else f"{len(found.support)} support vectors in {features} dimensions"
    )
    claim = Claim(
        "Lemma 7",
        "κ > 0: no direction orthogonal to ū is free of all support vectors",
        (
            Hypothesis("linearly separable data", evidence.separable),
            Hypothesis("support vectors that span the space", spans, detail),
        ),
        "κ, by the facets of the polytope of projected support vectors or by linear programs",
        "above 0",
        "none: κ is exact, or its lower bound must be positive",
    )
    if claim.inapplicable or found is None:
        return claim.inapplicable or claim.judge(None, "not separable")
    text = f"{found.lower:.6g}" if found.exact else f"in [{found.lower:.4g}, {found.upper:.4g}]"
    if found.lower > 0:
        return claim.judge(True, text)
    return claim.judge(False if found.upper <= 0 else None, text, "the bounds do not decide")
