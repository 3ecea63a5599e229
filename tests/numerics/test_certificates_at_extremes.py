"""KKT certificates of weights from 1e-30 to 1e30 and margins to 1e6, against mpmath.

A KKT point is one of a direction: residuals, best multipliers, χ and ξ's multipliers belong to
``W/‖W‖`` but for the slopes of the loss. Reached: 1e-12 of each, from gradients by naive loops.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import mpmath
import pytest
import torch
from mpmath import mpf
from numerics_oracles import (
    ACTIVATIONS,
    Exact,
    Perturb,
    Row,
    clean,
    exact,
    inner,
    length,
    one_step,
    times,
)
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import FGM, Attack, ExactLinear

SCALES = [1e-30, 1e-8, 1e8, 1e30]


def network(activation: str) -> nn.Module:
    if activation == "linear":
        return mf.models.deep_linear(3, 4, 1, seed=4).double()
    return mf.models.mlp(3, 6, 5, 1, activation=activation, seed=4).double()


def fitted(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Examples with the labels that the network gives them: all margins are positive."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn((40, 3), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(x).reshape(-1)
    far = outputs.abs().argsort(descending=True)[:4]
    return x[far], torch.sign(outputs[far]).long()


@dataclass(frozen=True, eq=False)
class Naive:
    """Definition 3 by the paper's formulas, in 60 digits."""

    margins: Row
    norm: mpf
    cosine: mpf
    chi: mpf
    multipliers: Row
    xi: mpf
    bound: mpf

    @staticmethod
    def of(oracle: Exact, x: Tensor, y: Tensor, perturb: Perturb) -> Naive:
        at = [
            (perturb(oracle, exact(row), label), label)
            for row, label in zip(x, y.tolist(), strict=True)
        ]
        margins = [oracle.margin(*one)[0] for one in at]
        gradients = [oracle.gradient(*one) for one in at]
        least, order, w = min(margins), oracle.order, oracle.flat()
        # e^{−m} in units of e^{−min m}: nothing else of L enters but ratios.
        slopes = [mpmath.exp(least - m) for m in margins]
        gradient = [
            -mpmath.fsum(s * g[j] for s, g in zip(slopes, gradients, strict=True))
            for j in range(len(w))
        ]
        norm, size = length(w), length(gradient)
        multipliers = [norm * least ** (mpf(order - 2) / order) * s / size for s in slopes]
        cosine = -inner(w, gradient) / (norm * size)
        return Naive(
            margins,
            norm,
            cosine,
            norm * least ** (mpf(-1) / order) * mpmath.sqrt(2 * (1 - cosine)),
            multipliers,
            max(a * (m / least - 1) for a, m in zip(multipliers, margins, strict=True)),
            norm**2 / (mpmath.e * order * least ** (1 + mpf(2) / order)),
        )


@pytest.mark.parametrize("scale", [1.0, *SCALES])
@pytest.mark.parametrize(
    ("activation", "attack", "perturb"),
    [
        ("linear", None, clean),
        ("linear", ExactLinear(2, 0.01), one_step(2, 0.01)),
        ("relu", None, clean),
        ("relu", mf.attacks.FGSM(0.01), one_step(math.inf, 0.01)),
        ("squared-relu", None, clean),
    ],
    ids=["linear", "linear exact", "relu", "relu fgsm", "squared-relu"],
)
def test_the_papers_multipliers(
    activation: str, attack: Attack | None, perturb: Perturb, scale: float
) -> None:
    model = network(activation)
    x, y = fitted(model)
    times(model, scale)
    found = mf.kkt_certificate(model, x, y, attack)
    expected = Naive.of(Exact.of(model, activation), x, y, perturb)
    for m, value in zip(found.margins.tolist(), expected.margins, strict=True):
        assert abs(m - value) <= 1e-13 * max(expected.margins)
    assert abs(found.norm - expected.norm) <= 1e-14 * expected.norm
    # A softmin weight e^{−(m_i − m_min)} is known to m roundings.
    spread = max(1.0, min(float(max(expected.margins)), 1e4))
    assert abs(found.cosine - expected.cosine) <= 1e-12 * spread
    assert abs(found.stationarity - expected.chi) <= 1e-12 * spread * expected.chi
    for a, value in zip(found.paper_multipliers.tolist(), expected.multipliers, strict=True):
        assert abs(a - value) <= 1e-12 * spread * max(expected.multipliers)
    assert abs(found.complementarity - expected.xi) <= 1e-12 * spread * max(expected.xi, 1)
    assert abs(found.complementarity_bound - expected.bound) <= 1e-12 * expected.bound
    assert found.complementarity <= found.complementarity_bound * (1 + 1e-12)
    assert found.self_check == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_best_multipliers_are_those_of_the_direction(activation: str, scale: float) -> None:
    model = network(activation)
    x, y = fitted(model)
    before = mf.kkt_certificate(model, x, y)
    after = mf.kkt_certificate(times(copy.deepcopy(model), scale), x, y)
    assert after.residual == pytest.approx(before.residual, rel=1e-12)
    assert torch.equal(after.support, before.support)
    assert torch.allclose(after.multipliers, before.multipliers, rtol=1e-11, atol=1e-13)
    assert torch.allclose(after.curve.residuals, before.curve.residuals, rtol=1e-12, atol=0)
    assert after.residuals.best == pytest.approx(before.residuals.best, rel=1e-12)
    assert after.solver_gap <= 1e-12


@pytest.mark.parametrize("scale", SCALES)
def test_a_kkt_point_stays_one(scale: float) -> None:
    """Two examples with a unit each: ``m_i = w_i a_i`` and V = (1, 1) in both layers, so λ = 1 and 1."""
    model = mf.models.mlp(2, 2, 1, seed=0).double()
    first, second = model.parameters()
    with torch.no_grad():
        first.copy_(torch.eye(2))
        second.copy_(torch.ones(1, 2))
    found = mf.kkt_certificate(
        times(model, scale), torch.eye(2).double(), torch.ones(2).long(), tau=0
    )
    # m_i = w a with ∂m_i = (a, w): W = Σ λ_i ∂m_i at λ = 1, of both examples alike.
    assert found.residual <= 1e-15
    assert found.multipliers.tolist() == pytest.approx([1, 1], rel=1e-14)
    assert found.residuals.paper <= 1e-7
    assert found.cosine_gap <= 1e-15
    assert found.complementarity == 0
    assert found.smallest_margin == pytest.approx(scale**2, rel=1e-15)


@pytest.mark.parametrize("margin", [1e-4, 1.0, 1e4, 1e6])
def test_margins_to_a_million(margin: float) -> None:
    """χ and ξ along the ray of one network: the softmin closes in on the smallest margin."""
    model = network("linear")
    x, y = fitted(model)
    least = mf.adversarial_margins(model, x, y).min
    times(model, math.sqrt(margin / least))
    found = mf.kkt_certificate(model, x, y)
    expected = Naive.of(Exact.of(model, "linear"), x, y, clean)
    slack = 1e-12 + 4e-16 * margin
    assert abs(found.stationarity - expected.chi) <= slack * expected.chi
    assert abs(found.complementarity - expected.xi) <= slack * expected.bound
    assert found.cosine == pytest.approx(float(expected.cosine), abs=slack)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_nearest_kkt_point(scale: float) -> None:
    model = network("relu")
    x, y = fitted(model)
    before = mf.nearest_kkt_point(model, x, y)
    after = mf.nearest_kkt_point(times(copy.deepcopy(model), scale), x, y)
    assert after.converged == before.converged
    assert after.margin == pytest.approx(before.margin, rel=1e-9)
    assert after.margin_before == pytest.approx(before.margin_before, rel=1e-14)


def test_frozen_layers_are_not_scaled() -> None:
    model = network("relu")
    x, y = fitted(model)
    next(model.parameters()).requires_grad_(False)
    before = mf.kkt_certificate(model, x, y)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable:
            p.mul_(2.0**90)
    after = mf.kkt_certificate(model, x, y)
    assert after.residual == pytest.approx(before.residual, rel=1e-12)
    assert after.smallest_margin == before.smallest_margin * 2.0**180


def test_layers_too_unequal_are_refused() -> None:
    model = network("squared-relu")
    x, y = fitted(model)
    layers = mf.measure_homogeneity(model, x)
    times(model, [1e-50, 1e-30, 1e60])
    with pytest.raises(mf.errors.ModelError, match="scale each layer to about the same norm"):
        mf.kkt_certificate(model, x, y, homogeneity=layers)


def test_fgm_through_its_derivative() -> None:
    """The total derivative of FGM takes per-example gradients through δ(W)."""
    model = network("squared-relu")
    x, y = fitted(model)
    before = mf.kkt_certificate(model, x, y, FGM(0.01))
    for exponent in (-100, 100):
        scaled = times(copy.deepcopy(model), 2.0**exponent)
        after = mf.kkt_certificate(scaled, x, y, FGM(0.01))
        assert after.residual == pytest.approx(before.residual, rel=1e-12)
        assert torch.allclose(after.multipliers, before.multipliers, rtol=1e-11, atol=1e-13)
