"""Eq. (20): whoever withstands the perturbation classifies the clean example with a larger margin."""

from __future__ import annotations

import torch

from marginflow.attacks import FiniteSet
from marginflow.losses import margins_of
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import homogeneous
from marginflow.theorems._site import Site
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_ROUNDING = 1e-12


def eq_20(evidence: Evidence) -> Verdict:
    """``y f(x + τ) ≥ y f(x + δ)`` for every τ that the adversary may choose, here for τ = 0.

    So the normalised clean margin is at least the adversarial one, at every point and example. That
    is the *definition* of an exact inner maximum, and false of a weaker attack: FGSM or PGD on a
    network that is curved between x and x + δ may raise the margin.
    """
    attack = evidence.attack
    claim = Claim(
        "Eq. 20",
        "y f(x; W) ≥ y f(x + δ(W); W): robust examples are classified right without a perturbation",
        (
            homogeneous(evidence),
            Hypothesis("adversarial training", attack is not None and attack.eps > 0),
            Hypothesis(
                "an exact inner maximum over a set with δ = 0",
                evidence.exact_maximum and _allows_zero(evidence),
                str(evidence.config["attack"]),
            ),
        ),
        "smallest clean − adversarial margin over examples and points, relative to the largest |m_i|",
        "at least 0",
        f"{_ROUNDING:g}: rounding",
    )
    if not evidence.sites or attack is None:
        return claim.inapplicable or claim.judge(None, "no point to examine")
    gaps = [_smallest(site) for site in evidence.sites]
    least = min(gap for gap, _ in gaps)
    normalised = min(gap for _, gap in gaps)
    text = f"{least:.3g}, normalised by ρ {normalised:.3g} ({evidence.where})"
    return claim.set_aside(text) or claim.judge(least >= -_ROUNDING, text)


def _smallest(site: Site) -> tuple[float, float]:
    """The smallest difference of margins, relative to the largest margin and to ρ."""
    with torch.no_grad():
        clean = margins_of(site.model(site.x), site.y)
        hit = margins_of(site.model(site.x + site.delta), site.y)
    gap = float((clean - hit).min())
    size = max(float(clean.abs().max()), float(hit.abs().max()), 1e-300)
    log_rho = float((site.degrees * site.norms.log()).sum())
    return gap / size, gap / float(torch.tensor(log_rho, dtype=torch.float64).exp())


def _allows_zero(evidence: Evidence) -> bool:
    """Every ball contains δ = 0; a finite set need not."""
    if not isinstance(evidence.attack, FiniteSet):
        return True
    rows = evidence.attack.deltas.reshape(len(evidence.attack.deltas), -1)
    return bool((rows == 0).all(dim=1).any())
