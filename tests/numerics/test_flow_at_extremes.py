"""The field, the clock and the engines at small and large weights and margins to 1e6.

The field ``−∇ ln L`` is compared with mpmath to 1e-12 where margins are at most 10⁴, and to
``max m`` roundings beyond (a softmin weight is ``e^{−(m_i − m_min)}``, and m_i is rounded); the clock with
the closed form of one example.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from mpmath import mpf
from numerics_oracles import ACTIVATIONS, Exact, clean, exact, one_step, times
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import Attack, ExactLinear
from marginflow.engine import build
from marginflow.flow import Field
from marginflow.losses import get_loss

DATA = mf.load("separable:n=8,d=3,margin=0.5")


def network(activation: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    if activation == "linear":
        return mf.models.deep_linear(3, 4, 1, seed=4).to(dtype)
    return mf.models.mlp(3, 6, 5, 1, activation=activation, seed=4).to(dtype)


def naive_gradient(
    model: nn.Module, activation: str, attack: Attack | None, loss: str, x: Tensor, y: Tensor
) -> tuple[mpf, list[mpf], mpf]:
    """``ln L``, ``−∇ ln L`` with δ held fixed, and the largest margin's size."""
    oracle = Exact.of(model, activation)
    perturb = clean if attack is None else one_step(2, attack.eps)
    at = [
        (perturb(oracle, exact(row), label), label)
        for row, label in zip(x, y.tolist(), strict=True)
    ]
    margins = [oracle.margin(*one)[0] for one in at]
    gradients = [oracle.gradient(*one) for one in at]
    low = min(margins)
    if loss == "exponential":
        logs = [-m for m in margins]
        slopes = [mpmath.exp(low - m) for m in margins]
    else:
        logs = [-m if m > 200 else mpmath.log(mpmath.log1p(mpmath.exp(-m))) for m in margins]
        top = max(logs)
        slopes = [
            mpmath.exp(-m - mpmath.log1p(mpmath.exp(-m)) - top)
            if m > 0
            else mpmath.exp(-top) / (1 + mpmath.exp(m))
            for m in margins
        ]
    top = max(logs)
    total = mpmath.fsum(mpmath.exp(v - top) for v in logs)
    velocity = [
        mpmath.fsum(s * g[j] for s, g in zip(slopes, gradients, strict=True)) / total
        for j in range(len(gradients[0]))
    ]
    return top + mpmath.log(total / len(logs)), velocity, max(abs(m) for m in margins)


def distance(found: list[float], expected: list[mpf]) -> mpf:
    gap = mpmath.norm([a - b for a, b in zip(found, expected, strict=True)])
    return gap / mpmath.norm(expected)


@pytest.mark.parametrize("closed", [True, False], ids=["closed form", "autograd"])
@pytest.mark.parametrize("loss", ["exponential", "logistic"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 40.0, 1e3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_field(activation: str, scale: float, loss: str, closed: bool) -> None:
    model = times(network(activation), scale)
    field = Field(
        model,
        DATA.x.double(),
        DATA.y,
        loss=get_loss(loss),
        attack=None,
        derivative="detached",
        closed=closed,
    )
    log_loss, velocity, size = naive_gradient(
        model, activation, None, loss, DATA.x.double(), DATA.y
    )
    found = field(field.read())
    slack = 1e-12 + 1e-15 * size
    assert abs(found.log_loss - log_loss) <= 1e-14 * max(1, abs(log_loss))
    assert distance(found.velocity.tolist(), velocity) <= slack


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize(
    ("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["double", "float"]
)
@pytest.mark.parametrize("target", [1e-12, 1.0, 1e4, 1e6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_of_the_log_loss_by_both_engines(
    activation: str, target: float, dtype: torch.dtype, accuracy: float, engine: str
) -> None:
    """Margins up to ±``target``, where L itself under- or overflows; ascents step along it."""
    model = network(activation, dtype)
    largest = float(model(DATA.x.to(dtype)).detach().abs().max())
    order = mf.measure_homogeneity(model, DATA.x).order
    times(model, (target / largest) ** (1 / order))
    if engine == "fused" and activation == "squared-relu" and dtype is torch.float32:
        accuracy *= 2
    x = DATA.x.to(dtype)
    made = build(model, get_loss("exponential"), None, shape=(3,), batch_size=len(x), engine=engine)
    made.check(x, DATA.y)
    found = made(x, DATA.y, of_log=True)
    log_loss, velocity, size = naive_gradient(model, activation, None, "exponential", x, DATA.y)
    slack = accuracy * max(1, min(size, 1e9)) if target > 1 else accuracy
    flat = torch.cat([g.reshape(-1) for g in found.gradients])
    assert abs(float(found.loss) - log_loss) <= accuracy * max(1, abs(log_loss))
    assert distance([-v for v in flat.double().tolist()], velocity) <= slack


@pytest.mark.parametrize(
    ("attack", "scale"),
    [(None, 1e-30), (ExactLinear(2, 0.25), 1.0)],
    ids=["clean, from 1e-30", "exact, from 1"],
)
def test_the_clock_of_one_example(attack: Attack | None, scale: float) -> None:
    """One layer, one example ‖x‖ = 1: ``d m/dt = g² e^{−m}`` along x, so ``m = ln(e^{m_0} + g² t)``."""
    g = 1.0 if attack is None else 0.75
    x, y = torch.tensor([[0.6, 0.8]], dtype=torch.float64), torch.tensor([1])
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(scale * x)
    flow = mf.gradient_flow(
        model, mf.Dataset(x, y), attack=attack, loss="exponential", log_time=1e6
    )
    assert flow.reason == "log_time"
    margin = mf.adversarial_margins(flow.model, x, y, attack).min
    expected = mpmath.log(mpmath.exp(mpf(g * scale)) + mpf(g) ** 2 * mpmath.exp(mpf(flow.log_time)))
    assert abs(margin - expected) <= 1e-8 * expected


@pytest.mark.parametrize("scale", [1e-30, 1e3])
def test_starts_of_every_size_end_at_the_svm(scale: float) -> None:
    """1e3 is a start at margins −5.6e4 … 1.9e5: all of ln t < 0 lies in 1e-7 of the way."""
    model = times(mf.models.deep_linear(3, 4, 1, seed=3).double(), scale)
    flow = mf.gradient_flow(model, DATA, log_time=1e6)
    assert flow.reason == "log_time", flow.advice
    found = mf.adversarial_margins(flow.model, DATA.x, DATA.y).normalized_min
    # From 1e3 the weights have hardly doubled by then; the margin is below the maximum in any case.
    assert 0.3 < found <= 0.5 + 1e-9
    assert scale > 1 or found > 0.4999998


@pytest.mark.parametrize(
    ("spec", "attack", "scale", "log_time"),
    [
        ("deep-linear:3,3", None, 1e3, 0.0),
        ("mlp:4", "fgsm:eps=0.05", 1e3, 0.0),
        ("mlp:4", None, 1e10, 1e6),
    ],
)
def test_large_starts(spec: str, attack: str | None, scale: float, log_time: float) -> None:
    """These ended in a math domain error, an overflow of expm1, and never began."""
    model = mf.models.build(spec, input_shape=(3,), seed=3).double()
    flow = mf.gradient_flow(times(model, scale), DATA, attack=attack, log_time=log_time)
    assert flow.reason == "log_time", flow.advice
    assert math.isfinite(flow.log_time)
    assert flow.log_time >= log_time * (1 - 1e-9)


@pytest.mark.parametrize(
    ("spec", "scale"), [("deep-linear:3,3", 1e-10), ("mlp:4,activation=squared-relu", 1e-30)]
)
def test_a_start_at_the_saddle_says_so(spec: str, scale: float) -> None:
    """Of order 3 and more 0 is left after a time like ``‖W‖^{2−K}``; a bisection gave up here."""
    model = mf.models.build(spec, input_shape=(3,), seed=3).double()
    flow = mf.gradient_flow(times(model, scale), DATA, log_time=1e3)
    assert flow.reason == "not separated"
    assert "near the saddle at 0" in flow.advice
    assert "start from larger weights" in flow.advice


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_step_of_training_that_cannot_be_made(scale: float) -> None:
    """Float32: at 1e-30 gradients are 0 and W stays; at 1e30 outputs are no numbers, and it says so."""
    model = times(mf.models.mlp(3, 6, 5, 1, seed=4), scale)
    before = [p.clone() for p in model.parameters()]
    if scale > 1:
        with pytest.raises(mf.errors.DivergedError, match="step 1"):
            mf.train(model, DATA, lr=0.1, epochs=1, measure=False)
    else:
        mf.train(model, DATA, lr=0.1, epochs=1, measure=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
