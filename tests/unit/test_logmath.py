"""``marginflow._logmath`` against mpmath with 50 digits, value and gradient, to the ends of its range.

Bounds are in units of the dtype's eps (one ulp of 1) and were met with room on this torch:
value 1.4, first derivative 1.1.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from mpmath import mpf

from marginflow._logmath import greatest, log_mean_exp, log_softplus_neg

mpmath.mp.dps = 50

DTYPES = [torch.float32, torch.float64]
_POSITIVE = [
    *(1e-8, 1e-4, 0.1, 0.5413, 0.55, 1.0, 3.0, 7.0, 14.9, 15.0, 15.1, 20.0, 36.7, 50.0, 80.0),
    *(87.0, 88.0, 89.0, 100.0, 103.0, 104.0, 300.0, 708.0, 710.0, 746.0, 1e3, 3e3, 1e4),
]
GRID = [-m for m in reversed(_POSITIVE)] + [0.0, *_POSITIVE]


def softplus_neg(m: mpf) -> mpf:
    return mpmath.log1p(mpmath.exp(-m)) if m > 0 else -m + mpmath.log1p(mpmath.exp(m))


def sigmoid_neg(m: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 33], ids=["scalar", "vectorised"])
def test_log_softplus_neg_and_its_derivative(dtype: torch.dtype, copies: int) -> None:
    eps = torch.finfo(dtype).eps
    m = torch.tensor(GRID, dtype=dtype).repeat_interleave(copies).requires_grad_()
    # One number at a time there are no vector instructions.
    parts = m if copies == 1 else [m]
    values = torch.cat([log_softplus_neg(one).reshape(-1) for one in parts])
    (slopes,) = torch.autograd.grad(values.sum(), m)
    for point, value, slope in zip(m.tolist(), values.tolist(), slopes.tolist(), strict=True):
        loss = softplus_neg(mpf(point))
        expected = mpmath.log(loss)
        assert abs(value - expected) <= 2 * eps * max(1, abs(expected)), (point, value)
        expected = -sigmoid_neg(mpf(point)) / loss
        assert abs(slope - expected) <= 2 * eps * abs(expected), (point, slope)


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_second_derivative(dtype: torch.dtype) -> None:
    """To 10³ ulp: the Jacobian of the gradient flow is made of it."""
    m = torch.tensor(GRID, dtype=dtype, requires_grad=True)
    (first,) = torch.autograd.grad(log_softplus_neg(m).sum(), m, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), m)
    for point, curvature in zip(m.tolist(), second.tolist(), strict=True):
        with mpmath.workdps(10_000 if point > 300 else 400):  # two terms near 1, less e^{−m} apart
            loss, slope = softplus_neg(mpf(point)), sigmoid_neg(mpf(point))
            expected = slope * (1 - slope) / loss - (slope / loss) ** 2
        # Below the smallest normal number there are fewer digits.
        slack = 1e3 * torch.finfo(dtype).eps * abs(expected) + torch.finfo(dtype).tiny
        assert abs(curvature - expected) <= slack, (point, curvature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [-1e4, -746.0, -15.0, 0.0, 1.0, 104.0, 746.0, 1e4])
def test_log_mean_exp_and_its_gradient(dtype: torch.dtype, center: float) -> None:
    eps = torch.finfo(dtype).eps
    offsets = torch.tensor([0.0, 0.3, -1.7, 5.0, -11.0, 0.01, -60.0], dtype=torch.float64)
    v = (center + offsets).to(dtype).requires_grad_()
    mean = log_mean_exp(v)
    (weights,) = torch.autograd.grad(mean, v)
    exact = [mpmath.exp(mpf(one)) for one in v.tolist()]
    expected = mpmath.log(sum(exact) / len(exact))
    assert abs(mean.item() - expected) <= 2 * eps * max(1, abs(expected))
    for weight, one in zip(weights.tolist(), exact, strict=True):
        share = one / sum(exact)
        # An exponent −60 is known to 60 eps: the bound grows with |ln w|.
        assert abs(weight - share) <= 2 * eps * (1 + abs(mpmath.log(share))) * share
    assert abs(weights.double().sum().item() - 1) <= 4 * eps


def test_log_mean_exp_of_one_value_is_the_value() -> None:
    for value in GRID:
        v = torch.tensor([value], dtype=torch.float32, requires_grad=True)
        assert log_mean_exp(v).item() == v.item()
        assert torch.autograd.grad(log_mean_exp(v), v)[0].item() == 1


def test_log_mean_exp_of_infinite_values() -> None:
    assert log_mean_exp(torch.tensor([math.inf, 1.0])).item() == math.inf
    assert log_mean_exp(torch.tensor([-math.inf, -math.inf])).item() == -math.inf
    found = log_mean_exp(torch.tensor([-math.inf, 2.0], dtype=torch.float64)).item()
    assert found == pytest.approx(2 - math.log(2), rel=1e-15)
    assert math.isnan(log_mean_exp(torch.tensor([math.nan, 1.0])).item())


def test_greatest_is_a_constant() -> None:
    v = torch.tensor([[1.0, 7.0], [-math.inf, -math.inf]], requires_grad=True)
    top = greatest(v, dim=1, keepdim=True)
    assert top.tolist() == [[7.0], [0.0]]
    assert not top.requires_grad
