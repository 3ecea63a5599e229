"""Losses of margins from −10⁴ to 10⁶, in float32 and float64, against mpmath.

``tests/unit/test_losses.py`` ends at ±10⁴ and says how accurate what is; this goes on to 10⁶ with the
same bounds, and to what is made of many margins at once.
"""

from __future__ import annotations

import mpmath
import pytest
import torch
from mpmath import mpf

import marginflow as mf
from marginflow.losses import CrossEntropy, Exponential, Logistic, Loss

mpmath.mp.dps = 60

FAR = [-1e4, -3e3, -1e2, -1.0, 0.0, 0.7, 1e2, 1e4, 1.7e4, 1e5, 3.3e5, 9.9e5, 1e6]
SETS = {
    "near 1e6": [1e6, 1e6 + 1, 1e6 + 2.5, 1e6 + 40],
    "ties at 1e6": [1e6, 1e6, 1e6],
    "both ends": [-1e4, 0.0, 1e6],
    "a tie of two at 1e5": [1e5, 1e5, 1e5 + 3, 1e6],
    "one": [1e6],
    "near −1e4": [-1e4, -1e4 + 0.5, 1e6],
}
LOSSES = [Exponential(), Logistic(), CrossEntropy()]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def ln_loss(loss: Loss, z: mpf) -> mpf:
    if isinstance(loss, Exponential):
        return -z
    # ln(1 + e^{−z}) = t − t²/2 + …: beyond 60 digits nothing but t is left.
    return -z if z > 200 else mpmath.log(mpmath.log1p(mpmath.exp(-z)))


def ln_slope(loss: Loss, z: mpf) -> mpf:
    if isinstance(loss, Exponential):
        return -z
    return -z - mpmath.log1p(mpmath.exp(-z)) if z > 0 else -mpmath.log1p(mpmath.exp(z))


@every_loss
@every_dtype
def test_logarithms_to_a_million(loss: Loss, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    z = torch.tensor(FAR, dtype=dtype, requires_grad=True)
    values, slopes = loss.log_values(z), loss.log_slopes(z)
    (derivative,) = torch.autograd.grad(values.sum(), z)
    for k, point in enumerate(mpf(v) for v in z.tolist()):
        expected = ln_loss(loss, point)
        assert abs(values[k].item() - expected) <= 2 * eps * max(1, abs(expected)), point
        rate = -mpmath.exp(ln_slope(loss, point) - expected)
        assert abs(derivative[k].item() - rate) <= 2 * eps * abs(rate), point
        expected = ln_slope(loss, point)
        assert abs(slopes[k].item() - expected) <= 2 * eps * max(1, abs(expected)), point


@every_loss
@every_dtype
@pytest.mark.parametrize("name", SETS)
def test_mean_weights_and_gradient(loss: Loss, dtype: torch.dtype, name: str) -> None:
    """``ln L`` to 3 eps of itself; weights to ``eps (4 + 3 |ln w| + c)`` of themselves.

    c = 40 for the logistic loss, whose ln ℓ is rounded itself; 0 where all are beyond 1e4 and ln ℓ = −z.
    """
    eps = torch.finfo(dtype).eps
    z = torch.tensor(SETS[name], dtype=dtype, requires_grad=True)
    mean = loss.log_mean(z)
    (gradient,) = torch.autograd.grad(mean, z)
    log_weights = loss.log_weights(z.detach())
    points = [mpf(v) for v in z.tolist()]
    total = mpmath.fsum(mpmath.exp(ln_loss(loss, p)) for p in points)
    expected = mpmath.log(total / len(points))
    assert abs(mean.item() - expected) <= 3 * eps * max(1, abs(expected))
    for k, point in enumerate(points):
        ln_w = ln_slope(loss, point) - mpmath.log(total)
        slack = eps * (4 + 3 * abs(ln_w) + (0 if min(points) > 1e4 else 40))
        assert abs(log_weights[k].item() - ln_w) <= slack * max(1, abs(ln_w)), point
        w = mpmath.exp(ln_w)
        tiny = torch.finfo(dtype).tiny
        assert abs(-gradient[k].item() - w) <= slack * w + tiny, point


@every_dtype
@pytest.mark.parametrize("copies", [2, 7])
def test_ties_share_the_weight(dtype: torch.dtype, copies: int) -> None:
    """Of k equal margins each has the weight 1/k, however large they are."""
    for at in (-1e4, 0.0, 1e6):
        z = torch.full((copies,), at, dtype=dtype)
        weights = Exponential().log_weights(z).exp()
        assert torch.allclose(weights, torch.full_like(z, 1 / copies), rtol=4e-7, atol=0)
        assert torch.equal(weights, weights[:1].expand(copies))


@pytest.mark.parametrize("name", SETS)
def test_the_smoothed_margin(name: str) -> None:
    """``ℓ = −ln Σ e^{−m_i}`` to 2 eps of its size, between its bounds."""
    data = torch.tensor(SETS[name], dtype=torch.float64).unsqueeze(1)
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.ones_(model.weight)
    found = mf.adversarial_margins(model, data, torch.ones(len(data), dtype=torch.int64))
    assert found.values.tolist() == SETS[name]
    expected = -mpmath.log(mpmath.fsum(mpmath.exp(-mpf(m)) for m in SETS[name]))
    assert abs(found.smoothed - expected) <= 2 * 2.3e-16 * max(1, abs(expected))
    assert found.smoothed <= found.min <= found.smoothed + mpmath.log(len(data)) + 1e-9


@every_dtype
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_cross_entropy_of_logits_of_a_million(dtype: torch.dtype, size: float) -> None:
    """Scores of logits ±size: to 2 eps of the logits; the margin f[y] − max f[j] exactly."""
    outputs = torch.tensor(
        [[size, 0.0, -size], [0.0, size, size], [-size, -size, size], [size, size, size]],
        dtype=dtype,
    )
    y = torch.tensor([0, 0, 2, 1])
    z = CrossEntropy().scores(outputs, y)
    for k, label in enumerate(y.tolist()):
        logits = [mpf(v) for v in outputs[k].tolist()]
        others = [v for j, v in enumerate(logits) if j != label]
        expected = logits[label] - mpmath.log(mpmath.fsum(mpmath.exp(v) for v in others))
        assert abs(z[k].item() - expected) <= 2 * torch.finfo(dtype).eps * max(1, size)
    assert mf.losses.margins_of(outputs, y).tolist() == [size, -size, 2 * size, 0.0]
