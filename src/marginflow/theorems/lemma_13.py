"""Lemma 13: Euler's identity for subgradients, at the kinks of ReLU and its like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import homogeneous
from marginflow.theorems._regularity import Kinks, find_kinks
from marginflow.theorems._site import Site
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict
from marginflow.theorems.lemma_9 import euler_error

_TOLERANCE = 1e-10
_NEAR = 1e-10
_SITES = 3


def lemma_13(evidence: Evidence) -> Verdict:
    """``⟨W_k, g_k⟩ = c_k f`` for subgradients g ∈ ∂f (Eq. 136, layer by layer), at kinks.

    Inputs on a kink are found by bisection between examples. There the identity is examined
    with the gradients from both sides, whose convex combinations are subgradients too, and with the
    one that torch chooses exactly *on* the kink: the unit's pre-activation, 1e-14 after the
    bisection, is set to 0 on the way through the network.
    """
    kinks = evidence.kinks
    claim = Claim(
        "Lemma 13",
        "⟨W_k, g_k⟩ = c_k f for subgradients g of f where it has a kink",
        (
            homogeneous(evidence),
            Hypothesis(
                "a network with kinks",
                kinks is not None if evidence.sites else None,
                "" if kinks is not None else "∇_x f is continuous; Lemma 9 is all there is",
            ),
        ),
        "largest |⟨W_k, g_k⟩ − c_k f|/(c_k max |f|): gradients from both sides, and torch's on the kink",
        "0",
        f"{_TOLERANCE:g}: rounding of sums over the weights, observed below 1e-13",
    )
    if claim.inapplicable or kinks is None:
        return claim.inapplicable or claim.judge(None, "no kink")
    sites = evidence.sites
    chosen = [sites[k] for k in sorted({round(i * (len(sites) - 1) / 2) for i in range(_SITES)})]
    sides, on, places, exact = 0.0, 0.0, 0, 0
    for site in chosen:
        found = kinks if site is sites[-1] else find_kinks(site.model, site.x)
        if found is None:
            continue
        for points in (found.below, found.above):
            sides = max(sides, euler_error(site, site.model(points)))
        error, count = _on_kinks(site, found)
        on, places, exact = max(on, error), places + len(found.below), exact + count
    at = f"{on:.1e} on {exact} of them" if exact else "no activation module to set to 0"
    text = f"{sides:.1e} beside {places} kinks, {at} ({len(chosen)} points of the path)"
    return claim.judge(max(sides, on) <= _TOLERANCE, text)


def _on_kinks(site: Site, kinks: Kinks) -> tuple[float, int]:
    """The error with pre-activations of exactly 0, and for how many kinks one could be set."""
    with _activations(site.model) as inputs, torch.no_grad():
        site.model(kinks.below)
    if not inputs:
        return 0.0, 0
    n = len(kinks.below)
    relative = [u.reshape(n, -1).abs() / u.abs().max().clamp(min=1e-300) for u in inputs]
    nearest = torch.stack([r.amin(dim=1) for r in relative])  # (calls, n)
    call = nearest.argmin(dim=0)
    near = nearest.amin(dim=0) <= _NEAR
    if not bool(near.any()):
        return 0.0, 0
    masks = []
    for number, (u, r) in enumerate(zip(inputs, relative, strict=True)):
        here = (r == r.amin(dim=1, keepdim=True)) & ((call == number) & near).unsqueeze(1)
        masks.append(here.reshape(u.shape))
    with _activations(site.model, masks):
        error = euler_error(site, site.model(kinks.below)[near])
    return error, int(near.sum())


@contextmanager
def _activations(model: nn.Module, masks: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Note what each ReLU or leaky ReLU is given, call by call; set it to 0 where masks say so."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        (u,) = args
        seen.append(u.detach().clone())
        if masks is None:
            return None
        # The value becomes exactly 0, the derivative by u stays.
        return (u - u.detach() * masks[len(seen) - 1],)

    handles = [
        module.register_forward_pre_hook(hook)
        for module in model.modules()
        if isinstance(module, nn.ReLU | nn.LeakyReLU)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
