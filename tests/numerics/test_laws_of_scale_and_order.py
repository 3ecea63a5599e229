"""Laws on random networks and data: powers of two, order of examples, duplicates, reflection."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_oracles import times
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import Attack
from marginflow.references import max_margin

laws = settings(max_examples=15, deadline=None, derandomize=True)
SPECS = {
    "deep-linear:4": ["none", "exact-linear:p=2,eps=0.05", "exact-linear:p=inf,eps=0.02"],
    "mlp:7,5": ["none", "fgm:eps=0.05", "fgsm:eps=0.02", "pgd-l2:eps=0.05,steps=3"],
    "mlp:7,activation=squared-relu": ["none", "pgd-linf:eps=0.02,steps=3"],
}
settings_of = st.sampled_from([(s, a) for s, attacks in SPECS.items() for a in attacks])
seeds = st.integers(0, 10_000)
exponents = st.integers(-100, 100)


def drawn(spec: str, attack: str, seed: int) -> tuple[nn.Module, Attack | None, Tensor, Tensor]:
    """A network with examples labelled as it does, far enough from 0 for a small perturbation."""
    model = mf.models.build(spec, input_shape=(4,), seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((24, 4), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(x).reshape(-1)
    far = outputs.abs().argsort(descending=True)[:6]
    return model, mf.attacks.build(attack), x[far], torch.where(outputs[far] < 0, -1, 1)


@laws
@given(settings_of, seeds, st.lists(exponents, min_size=3, max_size=3))
def test_powers_of_two_to_the_bit(setting: tuple[str, str], seed: int, powers: list[int]) -> None:
    model, attack, x, y = drawn(*setting, seed)
    before = mf.adversarial_margins(model, x, y, attack, engine="autograd")
    factors = [2.0**e for e in powers][: len(list(model.parameters()))]
    after = mf.adversarial_margins(times(model, factors), x, y, attack, engine="autograd")
    assert torch.equal(before.normalized, after.normalized)
    assert torch.equal(before.dead_inputs, after.dead_inputs)


@laws
@given(settings_of, seeds, exponents)
def test_a_certificate_is_one_of_a_direction(
    setting: tuple[str, str], seed: int, exponent: int
) -> None:
    model, attack, x, y = drawn(*setting, seed)
    if mf.adversarial_margins(model, x, y, attack).min <= 0:
        return
    before = mf.kkt_certificate(model, x, y, attack)
    after = mf.kkt_certificate(times(copy.deepcopy(model), 2.0**exponent), x, y, attack)
    assert after.residual == pytest.approx(before.residual, rel=1e-10, abs=1e-14)
    assert torch.equal(after.support, before.support)
    assert torch.allclose(after.multipliers, before.multipliers, rtol=1e-8, atol=1e-10)


@laws
@given(settings_of, seeds, st.permutations(range(6)))
def test_the_order_of_examples(setting: tuple[str, str], seed: int, order: list[int]) -> None:
    model, attack, x, y = drawn(*setting, seed)
    before = mf.adversarial_margins(model, x, y, attack)
    after = mf.adversarial_margins(model, x[order], y[order], attack)
    size = float(before.values.abs().max())
    assert torch.allclose(after.values, before.values[order], rtol=0, atol=1e-13 * size)
    assert after.smoothed == pytest.approx(before.smoothed, rel=1e-12, abs=1e-13)
    if before.min > 0:
        one, other = (mf.kkt_certificate(model, x[i], y[i], attack) for i in (range(6), order))
        assert other.residual == pytest.approx(one.residual, rel=1e-10, abs=1e-14)
        assert sorted(order[i] for i in other.support) == one.support.tolist()


@laws
@given(settings_of, seeds)
def test_every_example_twice(setting: tuple[str, str], seed: int) -> None:
    """Margins, r and its curve stay; ℓ falls by ln 2; the two share a multiplier."""
    model, attack, x, y = drawn(*setting, seed)
    twice = torch.cat([x, x]), torch.cat([y, y])
    before = mf.adversarial_margins(model, x, y, attack)
    after = mf.adversarial_margins(model, *twice, attack)
    size = float(before.values.abs().max())
    assert torch.allclose(after.values, before.values.repeat(2), rtol=0, atol=1e-13 * size)
    assert after.normalized_min == pytest.approx(before.normalized_min, rel=1e-12, abs=1e-15)
    assert after.smoothed == pytest.approx(before.smoothed - math.log(2), rel=1e-12, abs=1e-12)
    if before.min <= 0:
        return
    one, two = (mf.kkt_certificate(model, a, b, attack) for a, b in ((x, y), twice))
    assert two.residual == pytest.approx(one.residual, rel=1e-9, abs=1e-13)
    assert two.support.tolist() == [*one.support.tolist(), *(one.support + 6).tolist()]
    # Which of the two bears it is not determined: their sum is, where it is unique at all.
    assert two.multipliers @ two.margins[two.support] == pytest.approx(
        float(one.multipliers @ one.margins[one.support]), rel=1e-9
    )
    shared = one.paper_multipliers / 2
    assert torch.allclose(two.paper_multipliers, shared.repeat(2), rtol=1e-9, atol=1e-300)


@laws
@given(st.sampled_from(SPECS["deep-linear:4"]), seeds)
def test_reflected_examples_of_a_linear_network(attack_spec: str, seed: int) -> None:
    """``f(−x) = −f(x)``: x ↦ −x with y ↦ −y changes no bit of a margin, some of them or all."""
    model, attack, x, y = drawn("deep-linear:4", attack_spec, seed)
    sign = torch.tensor([1, -1, 1, -1, -1, 1])
    before = mf.adversarial_margins(model, x, y, attack, engine="autograd")
    after = mf.adversarial_margins(
        model, x * sign.unsqueeze(1), y * sign, attack, engine="autograd"
    )
    assert torch.equal(before.values, after.values)
    found = (
        max_margin(x.numpy(), y.numpy()),
        max_margin((x * sign.unsqueeze(1)).numpy(), (y * sign).numpy()),
    )
    assert found[0].margin == pytest.approx(found[1].margin, rel=1e-9, abs=1e-12)


@laws
@given(seeds, st.integers(-100, 100))
def test_the_alignment_of_scaled_layers(seed: int, exponent: int) -> None:
    model = mf.models.deep_linear(4, 5, 3, 1, seed=seed).double()
    before = mf.measure_alignment(model)
    after = mf.measure_alignment(times(model, [2.0**exponent, 2.0**-exponent, 2.0**exponent]))
    assert torch.allclose(after.neighbour_gaps, before.neighbour_gaps, rtol=1e-12, atol=1e-15)
    assert torch.allclose(after.rank_one_gaps, before.rank_one_gaps, rtol=1e-12, atol=1e-15)
    assert after.product_gap == pytest.approx(before.product_gap, rel=1e-12)
