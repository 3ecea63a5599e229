"""The two gradients of adversarial training against finite differences of the loss.

``total``: ``L(W) = mean ℓ(m(x + δ(W); W))``, the perturbation computed anew at every W.
``detached``: the same with δ frozen. Float64; central differences with step 3e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_attacks import some_deltas
from unit_oracles import Case, case, numerical_gradient, relative_error

from marginflow.attacks import FGM, FGSM, PGD, Attack, Derivative, ExactLinear, FiniteSet
from marginflow.engine import AutogradEngine
from marginflow.losses import Loss, get_loss

TOLERANCE = 1e-7

SMOOTH: dict[str, Attack] = {
    "fgm": FGM(eps=0.2),
    "fgm-loss": FGM(eps=0.2, objective="loss"),
    "fgm-bounds": FGM(eps=0.4, bounds=(-0.7, 0.8)),
    "pgd-l2": PGD("l2", eps=0.2, steps=3, step_size=0.09),
    "pgd-l2-loss": PGD("l2", eps=0.2, steps=2, step_size=0.15, objective="loss"),
    "pgd-l2-random": PGD("l2", eps=0.2, steps=3, step_size=0.09, random_start=True),
    "pgd-l2-bounds": PGD("l2", eps=0.4, steps=3, step_size=0.2, bounds=(-0.7, 0.8)),
}
PIECEWISE: dict[str, Attack] = {
    "fgsm": FGSM(eps=0.05),
    "pgd-linf": PGD("linf", eps=0.05, steps=3, step_size=0.02),
    "finite-set": FiniteSet(some_deltas((6,))),
}


def loss_of(c: Case) -> Loss:
    return get_loss("logistic" if c.binary else "cross-entropy")


def gradients(c: Case, attack: Attack, derivative: Derivative) -> torch.Tensor:
    engine = AutogradEngine(c.model, loss_of(c), attack, derivative)
    generator = torch.Generator().manual_seed(2)
    result = engine(c.x, c.y, generator)
    return torch.cat([g.reshape(-1) for g in result.gradients])


def differences(c: Case, attack: Attack, *, frozen: bool) -> torch.Tensor:
    loss = loss_of(c)

    def perturbed() -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        return c.x + attack(c.model, c.x, c.y, generator=generator).delta

    fixed = perturbed()

    def value() -> float:
        with torch.no_grad():
            outputs = c.model(fixed if frozen else perturbed())
            return loss.mean(loss.scores(outputs, c.y)).item()

    slopes = numerical_gradient(value, list(c.model.parameters()))
    return torch.cat([g.reshape(-1) for g in slopes])


def smooth_case(network: str, attack: Attack) -> Case:
    c = case(network, n=5)
    if attack.bounds is not None:
        return Case(c.model, c.x.clamp(*attack.bounds), c.y)
    return c


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("network", ["squared", "squared-classes"])
def test_total_is_the_derivative_of_the_adversarial_loss(name: str, network: str) -> None:
    attack = SMOOTH[name]
    c = smooth_case(network, attack)
    found = gradients(c, attack, "total")
    assert relative_error(found, differences(c, attack, frozen=False)) < TOLERANCE
    # And the path through δ matters: the two gradients are far apart.
    assert relative_error(gradients(c, attack, "detached"), found) > 1e-3


@pytest.mark.parametrize("name", [*SMOOTH, *PIECEWISE])
@pytest.mark.parametrize("network", ["squared", "squared-classes", "leaky"])
def test_detached_is_the_derivative_with_delta_frozen(name: str, network: str) -> None:
    attack = {**SMOOTH, **PIECEWISE}[name]
    c = smooth_case(network, attack)
    found = gradients(c, attack, "detached")
    assert relative_error(found, differences(c, attack, frozen=True)) < TOLERANCE


@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("network", ["squared", "squared-classes", "relu", "classes"])
def test_where_delta_is_piecewise_constant_the_two_agree(name: str, network: str) -> None:
    """FGSM and ℓ∞-PGD between their jumps; a finite set by Danskin's theorem."""
    attack, c = PIECEWISE[name], case(network, n=5)
    total = gradients(c, attack, "total")
    if name == "pgd-linf":
        # x + δ keeps its value; only the graph is another.
        assert relative_error(gradients(c, attack, "detached"), total) < 1e-13
    else:
        assert torch.equal(total, gradients(c, attack, "detached"))
    assert relative_error(total, differences(c, attack, frozen=False)) < TOLERANCE


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_danskin_for_exact_inner_maxima(p: float) -> None:
    """The gradient through δ(W) equals the one with δ frozen, and both are the true slope."""
    attack, c = ExactLinear(p=p, eps=0.2), case("linear", n=5)
    found = gradients(c, attack, "total")
    assert relative_error(gradients(c, attack, "detached"), found) < 1e-12
    assert relative_error(found, differences(c, attack, frozen=False)) < TOLERANCE


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_an_exact_maximum_of_the_margin_is_not_one_of_cross_entropy(p: float) -> None:
    """Several classes: δ is exact for the hard margin only, so the two gradients may differ."""
    attack, c = ExactLinear(p=p, eps=0.2), case("linear-classes", n=5)
    found = gradients(c, attack, "total")
    assert relative_error(found, differences(c, attack, frozen=False)) < TOLERANCE
    detached = gradients(c, attack, "detached")
    assert relative_error(detached, differences(c, attack, frozen=True)) < TOLERANCE
    if p in (1.0, math.inf):
        assert relative_error(detached, found) < 1e-12  # δ is piecewise constant
    else:
        assert relative_error(detached, found) > 1e-4


def test_fgm_on_a_linear_network_is_exact_too() -> None:
    c = case("linear", n=5)
    total = gradients(c, FGM(eps=0.2), "total")
    assert relative_error(gradients(c, FGM(eps=0.2), "detached"), total) < 1e-12
    assert relative_error(gradients(c, ExactLinear(2, 0.2), "total"), total) < 1e-12


@pytest.mark.parametrize("name", ["fgm", "pgd-l2"])
def test_total_on_a_relu_network_between_its_kinks(name: str) -> None:
    """Piecewise linear: ∇_x f is locally independent of x, but depends on W; the chain rule holds."""
    attack, c = SMOOTH[name], case("relu", n=5)
    found = gradients(c, attack, "total")
    assert relative_error(found, differences(c, attack, frozen=False)) < TOLERANCE


@pytest.mark.parametrize("name", SMOOTH)
def test_total_with_dead_examples_is_finite(name: str) -> None:
    """0/0 in the direction of an image of zeros must not poison the weights' gradient."""
    attack = SMOOTH[name]
    c = smooth_case("squared", attack)
    x = c.x.clone()
    x[1] = 0
    alone = Case(c.model, x[[0, 2, 3, 4]], c.y[[0, 2, 3, 4]])
    found = gradients(Case(c.model, x, c.y), attack, "total")
    assert torch.isfinite(found).all()
    if not attack.random:
        # The dead example has δ = 0 and no gradient of its own: 4/5 of the others' mean.
        expected = 0.8 * gradients(alone, attack, "total")
        assert relative_error(found, expected) < 1e-12
