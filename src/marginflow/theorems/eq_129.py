"""Eq. (129): the constraint qualification of Mangasarian and Fromovitz (MFCQ) along the path."""

from __future__ import annotations

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import homogeneous, scale_invariant
from marginflow.theorems._site import Site, pushforward
from marginflow.theorems._verdict import Claim, Verdict

_TOLERANCE = 1e-10


def eq_129(evidence: Evidence) -> Verdict:
    """``⟨V, ∂m_i/∂V⟩ = K m_i > 0`` at ``V = W/m_min^{1/K}``, for all i and so for the active ones.

    The direction V itself thus raises every active constraint of (19) at first order, which is MFCQ.
    Both sides scale alike, so W may stand for V. The derivative goes through δ(W), by differentiating
    the gradient of ``Σ u_i m_i`` in u, which never forms a gradient of one example.
    """
    claim = Claim(
        "Eq. 129",
        "⟨V, ∂m_i/∂V⟩ = K m_i > 0: V satisfies MFCQ wherever all margins are positive",
        (homogeneous(evidence), scale_invariant(evidence)),
        "smallest and largest ⟨W, ∂m_i⟩/(K m_i) over examples and points with L < 1/n, less 1",
        "0",
        f"{_TOLERANCE:g}: rounding of sums over the weights, observed below 1e-13",
    )
    if claim.inapplicable or not evidence.sites:
        return claim.inapplicable or claim.judge(None, "no point to examine")
    error, points = mfcq_error(evidence)
    if not points:
        return claim.judge(None, "no kept point has L < 1/n", evidence.further)
    text = f"{error[0]:+.1e}, {error[1]:+.1e} ({points} of {evidence.where})"
    return claim.judge(max(map(abs, error)) <= _TOLERANCE, text)


def mfcq_error(evidence: Evidence) -> tuple[tuple[float, float], int]:
    """The smallest and largest ``⟨W, ∂m_i⟩/(K m_i) − 1``, and at how many points."""
    found = [_extremes(site) for site in evidence.sites if site.smoothed > 0]
    if not found:
        return (0.0, 0.0), 0
    return (min(low for low, _ in found), max(high for _, high in found)), len(found)


def _extremes(site: Site) -> tuple[float, float]:
    margins = site.adversarial_margins()
    weights = tuple(tuple(w.detach() for w in ws) for ws in site.layers)
    (moved,) = pushforward(margins, site.layers, [weights])
    error = moved / (float(site.degrees.sum()) * margins.detach()) - 1
    return float(error.min()), float(error.max())
