"""Lemma 9: Euler's identity, ⟨W_k, ∂f/∂W_k⟩ = c_k f."""

from __future__ import annotations

from torch import Tensor

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import homogeneous
from marginflow.theorems._site import Site, only, pushforward
from marginflow.theorems._verdict import Claim, Verdict

_TOLERANCE = 1e-10


def lemma_9(evidence: Evidence) -> Verdict:
    """``⟨W_k, ∂f(x_i; W)/∂W_k⟩ = c_k f(x_i; W)`` (Eq. 75) for every output at the clean inputs."""
    claim = Claim(
        "Lemma 9",
        "⟨W_k, ∂f/∂W_k⟩ = c_k f (Euler)",
        (homogeneous(evidence),),
        "largest |⟨W_k, ∂f_i/∂W_k⟩ − c_k f_i| / (c_k max |f|) over layers, examples and points",
        "0",
        f"{_TOLERANCE:g}: rounding of sums over the weights, observed below 1e-13",
    )
    if claim.inapplicable:
        return claim.inapplicable
    worst = max(euler_error(site, site.model(site.x)) for site in evidence.sites)
    return claim.judge(worst <= _TOLERANCE, f"{worst:.1e} ({evidence.where})")


def euler_error(site: Site, outputs: Tensor) -> float:
    """Largest ``|⟨W_k, ∂f_i/∂W_k⟩ − c_k f_i| / (c_k max |f|)`` of given outputs of the network."""
    values = outputs.reshape(-1)
    directions = [only(site.layers, k) for k in range(len(site.layers))]
    moved = pushforward(values, site.layers, directions)
    size = float(values.detach().abs().max()) or 1.0
    return max(
        float((found / c - values.detach()).abs().max()) / size
        for found, c in zip(moved, site.homogeneity.degrees, strict=True)
    )
