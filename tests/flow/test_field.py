"""The field −∇ ln L and its Jacobian against finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from flow_problems import field_of, finite_set

import marginflow as mf

ATTACKS = [
    *(None, "fgm:eps=0.05", "fgsm:eps=0.05", "pgd-l2:eps=0.05,steps=3", "finite"),
    "pgd-linf:eps=0.05,steps=2,random=true",
]
LINEAR_ONLY = ["exact-linear:p=2,eps=0.05", "exact-linear:p=3,eps=0.05"]
CASES = [
    *itertools.product(["identity", "relu", "squared-relu"], ATTACKS),
    *itertools.product(["identity"], LINEAR_ONLY),
]
_STEP = 1e-6


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("loss", ["exponential", "logistic"])
@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize(("activation", "attack"), CASES)
def test_field_slope_jacobian_and_curvature(
    activation: str, attack: str | None, derivative: str, loss: str, closed: bool
) -> None:
    data = mf.load("separable:n=8,d=4,margin=0.3,seed=1").to(dtype=torch.float64)
    model = mf.models.mlp(4, 6, 5, 1, activation=activation, seed=3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.6)
    found = finite_set(4, 5, 0.03) if attack == "finite" else attack
    field = field_of(model, data, found, loss=loss, derivative=derivative, closed=closed)
    w = field.read()
    u = np.random.default_rng(0).standard_normal(len(w))
    up, down = field(w + _STEP * u), field(w - _STEP * u)
    slope = field.potential_slope(w)
    rise = (up.log_loss - down.log_loss) / (2 * _STEP)
    assert -slope @ u == pytest.approx(rise, rel=1e-7, abs=1e-8)
    turn = (up.velocity - down.velocity) / (2 * _STEP)
    assert np.abs(field.jacobian(w) @ u - turn).max() <= 1e-8 * max(1, np.abs(turn).max())
    bend = field.potential_slope(w + _STEP * u) - field.potential_slope(w - _STEP * u)
    bend /= 2 * _STEP
    assert np.abs(field.curvature(w, u) - bend).max() <= 1e-8 * max(1, np.abs(bend).max())
    gap = np.abs(slope - field(w).velocity).max()
    assert gap <= 1e-12 if field.conservative else True


def test_velocity_is_the_gradient_of_the_log_loss() -> None:
    """Against a naive loop over examples, at margins where e^{−m} is 0 in float64."""
    data = mf.load("separable:n=8,d=4,margin=0.3,seed=1").to(dtype=torch.float64)
    model = mf.models.mlp(4, 6, 1, activation="relu", seed=0).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(100.0)
    field = field_of(model, data)
    w = field.read()
    margins, gradients = [], []
    for x, y in zip(data.x, data.y, strict=True):
        m = (y * model(x.unsqueeze(0))).sum()
        margins.append(float(m.detach()))
        parts = torch.autograd.grad(m, field.parameters)
        gradients.append(np.concatenate([p.reshape(-1).numpy() for p in parts]))
    assert max(map(abs, margins)) > 1000
    low = min(margins)
    weights = np.exp(low - np.array(margins))
    expected = (weights / weights.sum()) @ np.array(gradients)
    value = field(w)
    np.testing.assert_allclose(value.velocity, expected, rtol=1e-12, atol=1e-12)
    assert value.log_loss == pytest.approx(-low + math.log(weights.mean()), rel=1e-14)
    assert value.smoothed == pytest.approx(low - math.log(weights.sum()), rel=1e-14)
    assert value.margin == pytest.approx(low, rel=1e-14)


def test_detached_and_total_differ_where_the_maximum_is_not_exact() -> None:
    data = mf.load("separable:n=8,d=4,margin=0.3,seed=1").to(dtype=torch.float64)
    model = mf.models.mlp(4, 6, 5, 1, activation="squared-relu", seed=3).double()
    detached = field_of(model, data, "fgm:eps=0.5", derivative="detached")
    total = field_of(model, data, "fgm:eps=0.5", derivative="total")
    w = detached.read()
    assert not detached.conservative
    assert total.conservative
    assert np.linalg.norm(detached(w).velocity - total(w).velocity) > 1e-3
    np.testing.assert_array_equal(detached.potential_slope(w), total(w).velocity)


def test_the_last_point_is_remembered() -> None:
    data = mf.load("separable:n=8,d=4,margin=0.3,seed=1").to(dtype=torch.float64)
    field = field_of(mf.models.deep_linear(4, 1, seed=0).double(), data)
    w = field.read()
    first = field(w)
    assert field(w.copy()) is first
    assert field.evaluations == 1
    assert field(w + 1) is not first
    field.forget()
    assert field(w) is not first
    assert field.evaluations == 3
