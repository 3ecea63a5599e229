"""Margins, norms, degrees and perturbations at weights from 1e-30 to 1e30, against mpmath.

Reached: normalised margins to 1e-13 in float64 and 3e-6 in float32, of the largest one, at every
scale; at powers of two the very bits of the scale 1.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from numerics_oracles import (
    ACTIVATIONS,
    Exact,
    Perturb,
    clean,
    exact,
    length,
    one_step,
    steps,
    times,
)
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear, FiniteSet
from marginflow.homogeneity import within_range
from marginflow.norms import dual_vector, per_example_norm, project

INF = math.inf
ATTACKS: dict[str, tuple[Attack | None, Perturb]] = {
    "clean": (None, clean),
    "fgm": (FGM(0.2), one_step(2, 0.2)),
    "fgsm": (FGSM(0.1), one_step(INF, 0.1)),
    "pgd-l2": (PGD("l2", 0.2, steps=3, step_size=0.1), steps(2, 0.2, 0.1, 3)),
    "pgd-linf": (PGD("linf", 0.1, steps=3, step_size=0.06), steps(INF, 0.1, 0.06, 3)),
    "exact-l2": (ExactLinear(2, 0.2), one_step(2, 0.2)),
    "exact-l3": (ExactLinear(3, 0.2), one_step(3, 0.2)),
    "exact-linf": (ExactLinear("linf", 0.1), one_step(INF, 0.1)),
}
SERVED = [
    (activation, attack)
    for activation, attack in itertools.product(ACTIVATIONS, ATTACKS)
    if activation == "linear" or not attack.startswith("exact")
]
ACCURACY = {torch.float64: 1e-13, torch.float32: 3e-6}
every_dtype = pytest.mark.parametrize("dtype", list(ACCURACY))


def network(activation: str, dtype: torch.dtype = torch.float64, outputs: int = 1) -> nn.Module:
    """Of three layers, so that products of scales reach 1e±90 (1e±210 for squared ReLU)."""
    if activation == "linear":
        return mf.models.deep_linear(4, 5, 3, outputs, seed=2).to(dtype)
    return mf.models.mlp(4, 7, 6, outputs, activation=activation, seed=2).to(dtype)


def examples(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((n, 4), generator=generator, dtype=torch.float64)
    return x.float().double(), torch.arange(n) % 2 * 2 - 1


@every_dtype
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("activation", "attack"), SERVED)
def test_margins_against_mpmath(
    activation: str, attack: str, scale: float, dtype: torch.dtype
) -> None:
    model = times(network(activation, dtype), scale)
    x, y = examples(3)
    given, perturb = ATTACKS[attack]
    oracle = Exact.of(model, activation)
    rows = [exact(row) for row in x]
    expected = [
        oracle.margin(perturb(oracle, row, label), label)[0]
        for row, label in zip(rows, y.tolist(), strict=True)
    ]
    rho, total = oracle.rho(), length(oracle.norms())
    largest = max(abs(m) for m in expected) or 1
    for engine in ("autograd", "fused") if not attack.startswith("exact") else ("autograd",):
        found = mf.adversarial_margins(model, x.to(dtype), y, given, engine=engine)
        assert abs(found.rho - rho) <= 1e-14 * rho
        assert abs(found.total_norm - total) <= 1e-14 * total
        for k, m in enumerate(expected):
            slack = ACCURACY[dtype] * largest
            assert abs(found.values[k].item() - m) <= slack, (engine, k)
            assert abs(found.normalized[k].item() - m / rho) <= slack / rho, (engine, k)
            by_total = found.normalized_by_total[k].item()
            assert abs(by_total - m / total**oracle.order) <= slack / total**oracle.order


@every_dtype
@pytest.mark.parametrize("factors", [(1e30, 1e-30, 1e30), (1e-30, 1e30, 1.0), (1e25, 1.0, 1e-37)])
def test_layers_of_unequal_scale(factors: tuple[float, ...], dtype: torch.dtype) -> None:
    model = times(network("relu", dtype), factors)
    x, y = examples(3)
    oracle = Exact.of(model, "relu")
    found = mf.adversarial_margins(model, x.to(dtype), y, FGM(0.2))
    margins = [
        oracle.margin(one_step(2, 0.2)(oracle, exact(row), label), label)[0] / oracle.rho()
        for row, label in zip(x, y.tolist(), strict=True)
    ]
    for value, expected in zip(found.normalized.tolist(), margins, strict=True):
        assert abs(value - expected) <= ACCURACY[dtype] * max(abs(m) for m in margins)


@every_dtype
@pytest.mark.parametrize(("activation", "attack"), SERVED)
def test_powers_of_two_change_no_bit(activation: str, attack: str, dtype: torch.dtype) -> None:
    """Normalised margins, ρ but for its exponent, accuracy and dead inputs; 2^±100 is 1e±30."""
    x, y = examples()
    given = ATTACKS[attack][0]
    before = mf.adversarial_margins(network(activation, dtype), x.to(dtype), y, given)
    for exponents in ((-100, -100, -100), (100, 100, 100), (-97, 60, 13), (3, -5, 1)):
        model = times(network(activation, dtype), [2.0**e for e in exponents])
        after = mf.adversarial_margins(model, x.to(dtype), y, given, engine="autograd")
        # The fused engine may choose another library for the products; autograd is one code.
        plain = mf.adversarial_margins(
            network(activation, dtype), x.to(dtype), y, given, engine="autograd"
        )
        assert torch.equal(after.normalized, plain.normalized), exponents
        assert torch.allclose(after.normalized, before.normalized, rtol=1e-5, atol=1e-9)
        assert torch.equal(after.dead_inputs, plain.dead_inputs)
        assert after.accuracy == plain.accuracy


@every_dtype
def test_several_classes_and_their_loss(dtype: torch.dtype) -> None:
    """The soft margin of cross-entropy is not homogeneous: it is taken of the outputs in true units."""
    x, _ = examples()
    y = torch.tensor([0, 1, 2, 0, 1])
    model = times(network("relu", dtype, outputs=3), [2.0**40, 2.0**30, 2.0**30])
    once = network("relu", torch.float64, outputs=3)
    times(once, [2.0**40, 2.0**30, 2.0**30])
    found = mf.adversarial_margins(model, x.to(dtype), y, FGM(0.1), loss="cross-entropy")
    wide = mf.adversarial_margins(once, x, y, FGM(0.1), loss="cross-entropy")
    assert found.log_loss == pytest.approx(wide.log_loss, rel=1e-5)
    assert found.log_loss == pytest.approx(math.log(-wide.min / 5), rel=0.02)
    assert torch.allclose(found.normalized, wide.normalized, rtol=0, atol=1e-6)


def test_beyond_the_range_of_float64_it_is_refused() -> None:
    x, y = examples()
    for scale in (1e-100, 1e100):
        model = times(network("squared-relu"), scale)
        with pytest.raises(mf.errors.ModelError, match="scale the layers, which changes no"):
            mf.adversarial_margins(model, x, y)
    near = mf.adversarial_margins(times(network("relu"), 1e96), x, y)
    assert near.normalized_min == pytest.approx(
        mf.adversarial_margins(network("relu"), x, y).normalized_min, rel=1e-13
    )


def test_only_what_is_in_danger_is_copied() -> None:
    x, _ = examples()
    model = network("relu", torch.float32)
    homogeneity = mf.measure_homogeneity(model, x)
    assert within_range(model, homogeneity) == (model, 0.0)
    times(model, 1e20)
    before = [p.clone() for p in model.parameters()]
    scaled, shift = within_range(model, homogeneity)
    assert scaled is not model
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(1 <= norm < 2 for norm in homogeneity.norms(scaled).tolist())
    assert shift == round(
        math.log2(homogeneity.norm_product(model) / homogeneity.norm_product(scaled))
    )


@every_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize(
    ("activation", "degrees"),
    [("linear", (1, 1, 1)), ("relu", (1, 1, 1)), ("squared-relu", (4, 2, 1))],
)
def test_degrees_at_every_scale(
    activation: str, degrees: tuple[int, ...], scale: float, dtype: torch.dtype
) -> None:
    model = times(network(activation, dtype), scale)
    found = mf.measure_homogeneity(model, examples()[0])
    assert found.degrees == degrees
    for norm, expected in zip(
        found.norms(model).tolist(), Exact.of(model, "relu").norms(), strict=True
    ):
        assert abs(norm - expected) <= 1e-14 * expected


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Sigmoid], ids=lambda a: a.__name__)
def test_small_weights_make_nothing_homogeneous(activation: type[nn.Module], scale: float) -> None:
    """At weights of 1e-12 a tanh is linear to 1e-24; it is no homogeneous activation for that."""
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), activation(), nn.Linear(6, 1, bias=False)
    ).double()
    times(model, scale)
    with pytest.raises(mf.errors.NotHomogeneousError):
        mf.measure_homogeneity(model, examples()[0])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@every_dtype
def test_norms_directions_and_projections(scale: float, dtype: torch.dtype) -> None:
    """Squares of 1e±30 are no numbers of float32; a direction keeps every bit under powers of two."""
    v = (torch.tensor([[3.0, 4.0, 0.0], [1.0, -2.0, 2.0]], dtype=torch.float64) * scale).to(dtype)
    rows = [exact(row) for row in v]
    for p in (2.0, INF):
        sizes = [length(row) if p == 2 else max(map(abs, row)) for row in rows]
        for found, size in zip(per_example_norm(v, p).tolist(), sizes, strict=True):
            assert abs(found - size) <= 1e-15 * size
        inside = per_example_norm(project(v, p, float(sizes[0]) / 2), p)
        assert inside.tolist() == pytest.approx(
            [float(min(size, sizes[0] / 2)) for size in sizes],
            rel=4e-7 if dtype is torch.float32 else 1e-15,
        )
    g = torch.tensor([[3.0, 4.0, 0.0], [1.0, -2.0, 2.0]], dtype=dtype)
    for p in (1.0, 1.5, 2.0, 3.0, INF):
        for exponent in (-125, -100, 100, 125):
            assert torch.equal(dual_vector(g * 2.0**exponent, p), dual_vector(g, p)), (p, exponent)


@every_dtype
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_worst_of_a_finite_set(scale: float, dtype: torch.dtype) -> None:
    deltas = torch.tensor([[0.0] * 4, [0.3, 0, 0, 0], [0, -0.3, 0, 0.1]], dtype=dtype)
    x, y = examples()
    model = network("relu", dtype)
    attack = FiniteSet(deltas)
    before = mf.adversarial_margins(model, x.to(dtype), y, attack)
    after = mf.adversarial_margins(times(model, scale), x.to(dtype), y, attack)
    assert torch.equal(before.normalized, after.normalized)
    least = torch.stack(
        [mf.adversarial_margins(model, (x + d).to(dtype), y).normalized for d in deltas.double()]
    ).amin(dim=0)
    assert torch.allclose(after.normalized, least, rtol=0, atol=1e-6)
