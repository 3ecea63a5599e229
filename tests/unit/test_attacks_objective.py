"""``objective="loss"``, what other libraries differentiate: right while it lasts, and not scale invariant."""

from __future__ import annotations

import math

import torch
from torch import nn
from unit_oracles import case, scale_layers

from marginflow.attacks import FGM, FGSM

EPS = 0.3


def test_for_one_logit_the_loss_has_the_direction_of_the_margin_while_it_lasts() -> None:
    c = case("relu", dtype=torch.float32)
    for kind in (FGM, FGSM):
        margin, loss = kind(eps=EPS), kind(eps=EPS, objective="loss")
        expected = margin(c.model, c.x, c.y).delta
        assert torch.allclose(loss(c.model, c.x, c.y).delta, expected, rtol=0, atol=1e-6)
        # Margins above 104 in float32: the gradient of the loss is 0, the attack is off.
        big = case("relu", dtype=torch.float32)
        outputs = c.model(c.x).detach().reshape(-1)
        y = torch.sign(outputs).long()
        factor = 2.0 ** math.ceil(math.log2(110 / float(outputs.abs().min())))
        scale_layers(big.model, [factor, 1, 1])
        off = loss(big.model, c.x, y)
        assert off.dead_inputs.all()
        assert not off.delta.any()
        assert torch.equal(margin(big.model, c.x, y).delta, margin(c.model, c.x, y).delta)


def test_for_several_classes_the_loss_is_not_scale_invariant() -> None:
    """The signs of its input gradient flip as the layers grow; those of the margin do not."""
    c = case("classes", n=200)
    shares = []
    for factor in (2.0, 8.0):
        big = case("classes", n=200)
        scale_layers(big.model, [factor] * 3)
        for objective in ("margin", "loss"):
            attack = FGSM(eps=EPS, objective=objective)
            before = attack(c.model, c.x, c.y).delta
            after = attack(big.model, c.x, c.y).delta
            share = float((before != after).double().mean())
            if objective == "margin":
                assert share == 0
            else:
                shares.append(share)
    assert shares[1] > shares[0] > 0.02


def test_the_loss_of_several_classes_against_a_naive_loop() -> None:
    c = case("classes")
    attack = FGM(eps=EPS, objective="loss")
    delta = attack(c.model, c.x, c.y).delta
    for i in range(len(c.y)):
        z = c.x[i : i + 1].clone().requires_grad_()
        value = nn.functional.cross_entropy(c.model(z), c.y[i : i + 1])
        (gradient,) = torch.autograd.grad(value, z)
        expected = EPS * gradient[0] / gradient.norm()
        assert torch.allclose(delta[i], expected, rtol=0, atol=1e-12 * EPS)


def test_the_loss_of_one_logit_is_the_logistic_one() -> None:
    """At margins of −100 its gradient is −∇m to a rounding; e^{−m} would have overflowed."""
    c = case("relu", dtype=torch.float32)
    y = -torch.sign(c.model(c.x).detach().reshape(-1)).long()
    expected = FGM(eps=EPS)(c.model, c.x, y).delta
    scale_layers(c.model, [2.0**14, 1, 1])
    assert (c.model(c.x).reshape(-1) * y).max() < -100
    found = FGM(eps=EPS, objective="loss")(c.model, c.x, y).delta
    assert torch.equal(found, expected)
