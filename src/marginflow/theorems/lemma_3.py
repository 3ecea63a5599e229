"""Lemma 3: the perturbation does not change when layers are multiplied by positive numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marginflow.attacks import Attack
from marginflow.attacks import build as build_attack
from marginflow.errors import InputError
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import homogeneous
from marginflow.theorems._site import Site
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_TOLERANCE = 1e-12
_DRAWS = 3
_COMMON = (2.0, 3.0, 5.0)


def lemma_3(evidence: Evidence) -> Verdict:
    """``δ_i(a_1 W_1, …, a_L W_L) = δ_i(W)`` for a_k > 0 (Eq. 5), at the kept points.

    Powers of two change no bit of a product or a sum, so under them δ must be bit-identical; under
    other factors equal to rounding. Standard training is examined under the perturbation
    that it is measured with. Attacks that follow the gradient of the *loss* are not scale
    invariant; how many signs they change when all layers are multiplied by 2, 3 and 5 is shown.
    """
    attack = evidence.attack or _measured(evidence)
    claim = Claim(
        "Lemma 3",
        "δ(a_1 W_1, …, a_L W_L) = δ(W) for all a_k > 0",
        (
            homogeneous(evidence),
            Hypothesis("a perturbation", attack is not None and attack.eps > 0),
            Hypothesis(
                "the attack follows the margin, not the loss",
                attack is None or attack.scale_invariant,
                "" if attack is None else attack.spec,
            ),
        ),
        "numbers of δ that change under powers of two; largest |Δδ|/ε under other factors",
        "none; 0",
        f"none, as powers of two are exact; {_TOLERANCE:g}: rounding of the other factors",
    )
    unmet = claim.inapplicable
    if attack is None or attack.eps == 0 or not evidence.sites:
        return unmet or claim.judge(None, "no perturbation")
    if unmet:
        return claim.set_aside(_signs(evidence, attack)) or unmet
    changed, total, largest = changes(evidence.sites, attack)
    text = f"{changed} of {total} numbers; {largest:.1e} ({evidence.where})"
    return claim.judge(changed == 0 and largest <= _TOLERANCE, text)


def changes(sites: Sequence[Site], attack: Attack) -> tuple[int, int, float]:
    """How many numbers of δ change, of how many, when layers are multiplied by powers of two.

    Third, the largest ``|Δδ|/ε`` under other factors in [e⁻², e²].
    """
    generator = torch.Generator().manual_seed(0)
    changed, total, largest = 0, 0, 0.0
    for site in sites:
        delta = _delta(attack, site, None)
        for _ in range(_DRAWS):
            powers = torch.randint(-8, 9, (len(site.layers),), generator=generator)
            found = _delta(attack, site, [2.0**k for k in powers.tolist()])
            changed += int((found != delta).sum())
            total += delta.numel()
            logs = 4 * torch.rand(len(site.layers), generator=generator, dtype=torch.float64) - 2
            found = _delta(attack, site, logs.exp().tolist())
            largest = max(largest, float((found - delta).abs().max()) / attack.eps)
    return changed, total, largest


def _delta(attack: Attack, site: Site, factors: list[float] | None) -> Tensor:
    """δ with layer k multiplied by the k-th factor; a random start is drawn alike each time."""
    with site.at(site.weights if factors is None else site.scaled(factors)) as model:
        draw = torch.Generator().manual_seed(0)
        return attack(model, site.x, site.y, generator=draw).delta


def _signs(evidence: Evidence, attack: Attack) -> str:
    parts = []
    for factor in _COMMON:
        flipped, changed, numbers, examples = 0, 0, 0, 0
        for site in evidence.sites:
            delta = _delta(attack, site, None)
            found = _delta(attack, site, [factor] * len(site.layers))
            flipped += int((torch.sgn(found) != torch.sgn(delta)).sum())
            moved = (found - delta).abs().reshape(len(delta), -1).amax(dim=1)
            changed += int((moved > _TOLERANCE * attack.eps).sum())
            numbers += delta.numel()
            examples += len(delta)
        parts.append(f"×{factor:g} {flipped / numbers:.2%} and {changed / examples:.0%}")
    return (
        "signs of δ that flip, and examples whose δ changes, with all layers multiplied: "
        f"{', '.join(parts)} ({evidence.where})"
    )


def _measured(evidence: Evidence) -> Attack | None:
    try:
        return build_attack(evidence.config.get("measure_with"))
    except InputError:
        return None
