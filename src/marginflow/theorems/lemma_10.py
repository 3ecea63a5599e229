"""Lemma 10: adversarial margins are as regular as the network, if δ(W) is (Assumption 2)."""

from __future__ import annotations

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import assumption_2, homogeneous
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_TOLERANCE = 1e-6


def lemma_10(evidence: Evidence) -> Verdict:
    """``y f(x + δ(W); W)`` is locally Lipschitz in W where δ is, or where the inner maximum is exact.

    The proof uses that δ(W) *solves* the inner maximisation (Eqs. 80, 81), which FGM, FGSM and PGD
    do not on networks that are not linear in x. Their δ follows the sign or the direction of
    ∇_x f, and jumps with it: at every change of a sign, and at the kinks of ReLU and leaky ReLU.
    Measured on segments of the path, halved 44 times: what is Lipschitz shrinks along, a jump stays;
    and by small steps beside the path.
    """
    claim = Claim(
        "Lemma 10",
        "the adversarial margins y_i f(x_i + δ_i(W); W) are locally Lipschitz in W",
        (
            homogeneous(evidence),
            Hypothesis("a perturbation", evidence.attack is not None and evidence.eps > 0),
            assumption_2(evidence),
        ),
        "largest jump of a margin that was found on the path of Ŵ, relative to max |m|",
        "0",
        f"{_TOLERANCE:g} after 44 halvings: a slope of 10⁷ would be taken for a jump",
    )
    shown = "" if evidence.jumps is None else f"{evidence.jumps} ({evidence.where})"
    unmet = claim.set_aside(shown)
    if unmet or evidence.jumps is None:
        return unmet or claim.judge(None, "no segment of the path can be searched")
    return claim.judge(evidence.jumps.margin <= _TOLERANCE, shown)
