"""The hypotheses of Section 3.2 and whether a run meets them: measured where they can be."""

from __future__ import annotations

import math

import numpy as np

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._path import Path
from marginflow.theorems._site import Site
from marginflow.theorems._verdict import NOT_SAID, Hypothesis

_AGREE = 1e-10


def homogeneous(evidence: Evidence) -> Hypothesis:
    """A multi-homogeneous network that can be built here."""
    name = "a multi-homogeneous network"
    if evidence.network is None:
        return Hypothesis(name, False, "it cannot be built here; give it: verify(run, model=…)")
    if evidence.homogeneity is None:
        return Hypothesis(name, False)
    if not evidence.sites:
        return Hypothesis(name, False, "a layer is 0 or not finite")
    degrees = ", ".join(f"{c:g}" for c in evidence.homogeneity.degrees)
    return Hypothesis(name, True, f"degrees {degrees}")


def scale_invariant(evidence: Evidence) -> Hypothesis:
    """Definition 1, Eq. (5)."""
    attack = evidence.attack
    met = attack is None or attack.scale_invariant
    return Hypothesis(
        "a scale invariant attack (Definition 1)", met, str(evidence.config["attack"])
    )


def two_classes(evidence: Evidence) -> Hypothesis:
    """One output, labels −1/+1."""
    return Hypothesis("two classes and one output", evidence.data.binary)


def exponential(evidence: Evidence) -> Hypothesis:
    """``ℓ = e^{−m}``."""
    name = str(evidence.config["loss"])
    if evidence.unsaid("loss"):
        return Hypothesis("the exponential loss", None, NOT_SAID)
    return Hypothesis("the exponential loss", name == "exponential", name)


def gradient_flow(evidence: Evidence, *, needed: bool) -> Hypothesis:
    """Eq. (16)."""
    detail = "" if evidence.is_flow else "discrete steps"
    return Hypothesis("the gradient flow, Eq. (16)", evidence.is_flow, detail, needed)


def true_derivative(evidence: Evidence) -> Hypothesis:
    """The run follows the derivative of ``L(x + δ(W); W)`` by W, through δ(W).

    So it does by order (``total``), and where holding δ fixed changes nothing at the kept
    points: an exact inner maximum (Danskin), or a δ that is constant between jumps.
    """
    name = "the derivative through δ(W), or an exact inner maximum"
    if evidence.config["derivative"] == "total":
        return Hypothesis(name, True, "total")
    if evidence.attack is None:
        return Hypothesis(name, True, "no perturbation")
    if not evidence.sites:
        return Hypothesis(name, None, "detached")
    if not evidence.differentiable:
        return Hypothesis(name, None, "detached; another library's δ cannot be differentiated")
    apart = derivative_gap(evidence)
    detail = f"detached, and the two gradients differ by {apart:.1g}"
    return Hypothesis(name, apart <= _AGREE, detail)


def derivative_gap(evidence: Evidence) -> float:
    """Largest ``‖G_detached − G_total‖/‖G_total‖`` over the kept points."""
    return max((gradients_apart(site) for site in evidence.sites), default=0.0)


def gradients_apart(site: Site) -> float:
    """``‖G_detached − G_total‖/‖G_total‖`` at one point."""
    one, two = site.slope("detached").gradients, site.slope("total").gradients
    pairs = [(a, b) for u, v in zip(one, two, strict=True) for a, b in zip(u, v, strict=True)]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    if apart > 0:
        return math.sqrt(apart / size) if size > 0 else math.inf
    return 0.0


def assumption_2(evidence: Evidence, *, settled: bool = False) -> Hypothesis:
    """δ(W) locally Lipschitz, or an exact inner maximum, whose margins are so whatever δ does.

    Args:
        evidence: the run.
        settled: only from L < 1/n on: a dead input that comes to life makes δ jump from 0 to
            ε, and there are none left then.
    """
    name = "Assumption 2: δ(W) locally Lipschitz, or an exact inner maximum"
    attack = evidence.attack
    if attack is None or attack.eps == 0:
        return Hypothesis(name, True, "no perturbation")
    if evidence.exact_maximum:
        return Hypothesis(name, True, f"{attack.name}, an exact maximum")
    if math.isinf(attack.p):
        return Hypothesis(name, False, "the signs of ∇_x f jump")
    if evidence.kinks is not None:
        size = float(evidence.kinks.jumps.max())
        return Hypothesis(name, False, f"∇_x f jumps at kinks, by {size:.2g} of its norm")
    jumps = evidence.jumps
    if settled and jumps is not None and jumps.found:
        jumps = evidence.jumps_since_separation or jumps
    if jumps is not None and jumps.found:
        return Hypothesis(name, False, f"δ jumps by {jumps.delta:.2g} ε on the path")
    return Hypothesis(name, None if jumps is None else True, "no kink and no jump was found")


def measured_alike(evidence: Evidence) -> Hypothesis:
    """The recorded margins are those under the attack trained against."""
    measured = evidence.config.get("measure_with", evidence.config["attack"])
    name = "margins measured under the attack trained against"
    if evidence.unsaid("attack"):
        return Hypothesis(name, None, NOT_SAID)
    return Hypothesis(name, measured == evidence.config["attack"], str(measured))


def separated(evidence: Evidence) -> Hypothesis:
    """Assumption 4, corrected: positive margins alone do not suffice."""
    path = path_of(evidence)
    met = True if path is not None and path.has_separated else None
    return Hypothesis("L(t_0) < 1/n at some t_0 (Assumption 4 as printed is too weak)", met)


def of_the_objective(evidence: Evidence) -> tuple[Hypothesis, ...]:
    """What Theorems 3 to 6 and Lemma 12 ask beside the flow itself: the loss and Assumptions 2 and 4."""
    return (
        two_classes(evidence),
        exponential(evidence),
        scale_invariant(evidence),
        true_derivative(evidence),
        assumption_2(evidence, settled=True),
        measured_alike(evidence),
        separated(evidence),
    )


def along_the_flow(evidence: Evidence) -> tuple[Hypothesis, ...]:
    """What Lemma 12 and Theorems 5 and 6 ask of a run: Assumptions 2 and 4 and the exact flow."""
    return (
        gradient_flow(evidence, needed=True),
        homogeneous(evidence),
        *of_the_objective(evidence),
    )


def path_of(evidence: Evidence) -> Path | None:
    """The measurements, or None where there are none."""
    records = evidence.run.metrics
    if evidence.homogeneity is None or not records:
        return None
    return Path(records, np.array(evidence.homogeneity.degrees), evidence.data.n)
