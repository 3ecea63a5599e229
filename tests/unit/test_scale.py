"""The scale test: multiplying the layers changes no decision, so it must change no measurement.

A bias-free network trained against FGSM on the bundled digits 3 and 8, measured under ℓ2-PGD-10 with
ε = 0.6 (n = 286, float32, seed 0). Differentiating the margin gives the same adversarial accuracy
and the same normalised margins to the last bit whatever the scale.

``objective="loss"`` is what other attack libraries do, and it breaks here: the input gradient of the
logistic loss is ``−σ(−m) ∇m``, which in float32 underflows to 0 at margins above about 104. The
attack then switches itself off on exactly the examples it cannot afford to lose, and the accuracy
that it reports rises with the scale.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from unit_oracles import scale_layers

import marginflow as mf
from marginflow.attacks import PGD
from marginflow.margins import Margins

EPS = 0.6
SCALES = [2.0, 8.0]


@dataclass(frozen=True, eq=False)
class Trained:
    model: nn.Module
    x: Tensor
    y: Tensor

    def scaled(self, factor: float) -> nn.Module:
        model = copy.deepcopy(self.model)
        scale_layers(model, [factor] * 3)
        return model

    def measure(self, model: nn.Module, objective: str = "margin") -> Margins:
        attack = PGD("l2", eps=EPS, steps=10, objective=objective)
        return mf.adversarial_margins(model, self.x, self.y, attack)


@pytest.fixture(scope="module")
def one_logit() -> Trained:
    data = mf.load("digits:3,8")
    run = mf.train(
        "mlp:64,32", data, attack="fgsm:eps=0.15", epochs=60, batch_size=32, measure=False
    )
    return Trained(run.model, data.x, data.y)


@pytest.fixture(scope="module")
def two_logits(one_logit: Trained) -> Trained:
    """The same function as ``f[1] − f[0]``."""
    model = mf.models.mlp(64, 64, 32, 2, seed=0)
    with torch.no_grad():
        *hidden, last = one_logit.model.parameters()
        for ours, theirs in zip(model.parameters(), hidden, strict=False):
            ours.copy_(theirs)
        list(model.parameters())[-1].copy_(torch.cat([-last / 2, last / 2]))
    return Trained(model, one_logit.x, (one_logit.y + 1) // 2)


@pytest.fixture(params=["one_logit", "two_logits"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return request.getfixturevalue(request.param)


def test_the_budget_is_one_at_which_something_can_change(trained: Trained) -> None:
    found = trained.measure(trained.model)
    assert 0.3 < found.accuracy < 0.9
    assert not found.dead_inputs.any()
    assert mf.adversarial_margins(trained.model, trained.x, trained.y).accuracy > 0.9


@pytest.mark.parametrize("factor", [*SCALES, 0.125, 512.0])
def test_the_margin_does_not_see_a_power_of_two(trained: Trained, factor: float) -> None:
    before, after = trained.measure(trained.model), trained.measure(trained.scaled(factor))
    assert after.accuracy == before.accuracy
    assert torch.equal(after.values, before.values * factor**3)
    assert after.rho == before.rho * factor**3  # type: ignore[operator]
    assert torch.equal(after.normalized, before.normalized)
    assert after.normalized_min == before.normalized_min
    assert torch.equal(after.dead_inputs, before.dead_inputs)


@pytest.mark.parametrize("factors", [(3.0, 0.7, 11.0), (1e-3, 1e3, 17.0), (1e4, 1e4, 1e4)])
def test_the_margin_hardly_sees_another_factor(
    trained: Trained, factors: tuple[float, ...]
) -> None:
    """In float32 the weights are rounded once: no decision changes, γ̂ to a few units of 1e-7."""
    model = copy.deepcopy(trained.model)
    scale_layers(model, factors)
    before, after = trained.measure(trained.model), trained.measure(model)
    assert after.accuracy == before.accuracy
    size = before.normalized.abs().max()
    assert (after.normalized - before.normalized).abs().max() <= 1e-5 * size


def test_the_loss_agrees_with_the_margin_while_margins_are_small(trained: Trained) -> None:
    margin, loss = trained.measure(trained.model), trained.measure(trained.model, "loss")
    assert loss.accuracy == margin.accuracy
    size = margin.normalized.abs().max()
    assert (loss.normalized - margin.normalized).abs().max() <= 1e-4 * size


@pytest.mark.parametrize("factor", [8.0, 512.0])
def test_the_loss_switches_itself_off_as_margins_grow(trained: Trained, factor: float) -> None:
    """From an accuracy of about 0.66 towards the clean 0.948, on a network that decides the same."""
    true = trained.measure(trained.model).accuracy
    claimed = trained.measure(trained.scaled(factor), "loss")
    assert claimed.accuracy > true + 0.2
    assert claimed.accuracy > 0.9
    assert claimed.dead_inputs.float().mean() > 0.8
    clean = mf.adversarial_margins(trained.model, trained.x, trained.y)
    if factor == 512:
        assert claimed.accuracy == clean.accuracy
    # Where the attack is off the clean margin is reported as an adversarial one.
    off = claimed.dead_inputs
    assert torch.equal(claimed.normalized[off], clean.normalized[off])


def test_float64_only_delays_it(one_logit: Trained) -> None:
    double = Trained(copy.deepcopy(one_logit.model).double(), one_logit.x, one_logit.y)
    true = double.measure(double.model)
    assert double.measure(double.scaled(8.0), "loss").accuracy == true.accuracy
    assert double.measure(double.scaled(64.0), "loss").accuracy > true.accuracy + 0.2
    assert torch.equal(double.measure(double.scaled(64.0)).normalized, true.normalized)
