"""Every loss against mpmath with 50 digits, and the contract that all of them keep.

Bounds in units of the dtype's eps, for scores −1e4 … 1e4 in float32 and float64:

* ``values``, ``log_slopes`` and their derivatives: 2 eps relative (2 ulp; of the smallest
  subnormal number where they underflow);
* ``log_values``: 2 eps of ``max(1, |ln ℓ|)``, its derivative 2 eps relative;
* ``log_weights`` and the gradient of ``log_mean``: ``w_i`` to ``(3 + 3 |ln w_i| + c)`` eps
  relative, with c = 0 for the exponential loss and c = min(max |ln ℓ_i|, 40) for the others,
  whose ln ℓ is rounded itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from mpmath import mpf
from test_logmath import DTYPES, GRID, sigmoid_neg, softplus_neg
from torch import Tensor
from torch.nn.functional import cross_entropy

from marginflow.errors import DataError, InputError, SpecificationError
from marginflow.losses import (
    CrossEntropy,
    Exponential,
    Logistic,
    Loss,
    check_labels,
    get_loss,
    margins_of,
)

mpmath.mp.dps = 50

LOSSES = [Exponential(), Logistic(), CrossEntropy()]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def exact_value(loss: Loss, z: mpf) -> mpf:
    return mpmath.exp(-z) if isinstance(loss, Exponential) else softplus_neg(z)


def exact_slope(loss: Loss, z: mpf) -> mpf:
    """``|ℓ′(z)|``."""
    return mpmath.exp(-z) if isinstance(loss, Exponential) else sigmoid_neg(z)


def ln_slope(loss: Loss, z: mpf) -> mpf:
    return -z if isinstance(loss, Exponential) else -softplus_neg(-z)


def value_and_derivative(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> list[tuple[mpf, float, float]]:
    # Each number several times: the vector instructions of torch and their scalar remainder.
    z = torch.tensor(GRID, dtype=dtype).repeat(3).requires_grad_()
    values = function(z)
    (slopes,) = torch.autograd.grad(values.sum(), z)
    points = map(mpf, z.tolist())
    return list(zip(points, values.tolist(), slopes.tolist(), strict=True))


def assert_close(found: float, expected: mpf, dtype: torch.dtype, where: mpf) -> None:
    """To 2 eps relative; 2 of the smallest subnormal below the normal range; inf above it."""
    limits = torch.finfo(dtype)
    if abs(expected) > limits.max:
        assert found == math.copysign(math.inf, expected), where
        return
    floor = mpf(limits.tiny)
    assert abs(found - expected) <= 2 * limits.eps * max(abs(expected), floor), (where, found)


@every_loss
@every_dtype
def test_values(loss: Loss, dtype: torch.dtype) -> None:
    for z, value, slope in value_and_derivative(loss.values, dtype):
        assert_close(value, exact_value(loss, z), dtype, z)
        assert_close(slope, -exact_slope(loss, z), dtype, z)


@every_loss
@every_dtype
def test_log_values(loss: Loss, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for z, value, slope in value_and_derivative(loss.log_values, dtype):
        expected = mpmath.log(exact_value(loss, z))
        assert abs(value - expected) <= 2 * eps * max(1, abs(expected)), z
        expected = -exact_slope(loss, z) / exact_value(loss, z)
        assert abs(slope - expected) <= 2 * eps * abs(expected), z


@every_loss
@every_dtype
def test_log_slopes(loss: Loss, dtype: torch.dtype) -> None:
    for z, value, slope in value_and_derivative(loss.log_slopes, dtype):
        assert_close(value, ln_slope(loss, z), dtype, z)
        derivative = -1 if isinstance(loss, Exponential) else -sigmoid_neg(-z)
        assert_close(slope, mpf(derivative), dtype, z)


SETS = {
    **{f"around {c:g}": (c, c + 0.3, c + 1.7, c + 6.0, c - 0.05) for c in GRID},
    "all": tuple(GRID),
    "one": (1e4,),
}


@every_loss
@every_dtype
@pytest.mark.parametrize("name", SETS)
def test_log_mean_log_weights_and_gradient(loss: Loss, dtype: torch.dtype, name: str) -> None:
    limits = torch.finfo(dtype)
    z = torch.tensor(SETS[name], dtype=dtype, requires_grad=True)
    exact = [exact_value(loss, mpf(one)) for one in z.tolist()]
    weights = [exact_slope(loss, mpf(one)) / sum(exact) for one in z.tolist()]
    rounded = max(abs(mpmath.log(one)) for one in exact)
    c = 0 if isinstance(loss, Exponential) else min(rounded, 40)

    log_mean = loss.log_mean(z)
    expected = mpmath.log(sum(exact) / len(exact))
    assert abs(log_mean.item() - expected) <= 2 * limits.eps * max(1, abs(expected), c)

    (gradient,) = torch.autograd.grad(log_mean, z)
    for found, logarithm, weight in zip(
        gradient.tolist(), loss.log_weights(z).tolist(), weights, strict=True
    ):
        bound = (3 + 3 * abs(mpmath.log(weight)) + c) * limits.eps
        assert abs(logarithm - mpmath.log(weight)) <= bound
        assert abs(-found - weight) <= bound * weight + 2 * limits.eps * limits.tiny


@every_loss
@every_dtype
@pytest.mark.parametrize("center", [-80.0, -15.0, 0.0, 1e-8, 15.0, 80.0])
def test_mean(loss: Loss, dtype: torch.dtype, center: float) -> None:
    eps = torch.finfo(dtype).eps
    z = torch.tensor([center, center + 0.4, center - 1.3, center + 2], dtype=dtype)
    z.requires_grad_()
    mean = loss.mean(z)
    (gradient,) = torch.autograd.grad(mean, z)
    expected = sum(exact_value(loss, mpf(one)) for one in z.tolist()) / 4
    assert abs(mean.item() - expected) <= 4 * eps * expected
    for found, one in zip(gradient.tolist(), z.tolist(), strict=True):
        slope = exact_slope(loss, mpf(one)) / 4
        assert abs(-found - slope) <= 3 * eps * slope


# --- the contract of every loss


@every_loss
def test_loss_falls_and_weights_are_not_negative(loss: Loss) -> None:
    z = torch.tensor(GRID, dtype=torch.float64)
    assert (torch.diff(loss.values(z).clamp(max=1e300)) <= 0).all()
    assert (torch.diff(loss.log_values(z)) < 0).all()
    log_weights = loss.log_weights(z)
    assert torch.isfinite(log_weights).all()
    assert (torch.diff(log_weights) <= 0).all()  # ℓ is convex: larger scores weigh less
    assert (log_weights <= 0).all()  # |ℓ′| ≤ ℓ for all three


@every_loss
def test_gradient_of_the_log_loss_is_minus_the_weighted_gradients(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(3)
    for center in (-300.0, 0.0, 20.0, 5000.0):
        A = torch.randn((9, 4), generator=generator, dtype=torch.float64)
        theta = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
        z = center + torch.tanh(A @ theta)
        (found,) = torch.autograd.grad(loss.log_mean(z), theta, retain_graph=True)
        weights = loss.log_weights(z).detach().exp()
        rows = [torch.autograd.grad(one, theta, retain_graph=True)[0] for one in z]
        expected = -sum(w * row for w, row in zip(weights, rows, strict=True))
        assert torch.allclose(found, expected, rtol=1e-13, atol=0)


@every_loss
@every_dtype
def test_second_derivatives_are_finite(loss: Loss, dtype: torch.dtype) -> None:
    z = torch.tensor(GRID, dtype=dtype, requires_grad=True)
    for function in (loss.log_values, loss.log_slopes):
        (first,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
        if first.requires_grad:
            assert torch.isfinite(torch.autograd.grad(first.sum(), z)[0]).all()
    hessian = torch.autograd.functional.hessian(loss.log_mean, z.detach())
    assert torch.isfinite(hessian).all()


@every_loss
def test_the_mean_is_the_exponential_of_the_log_mean(loss: Loss) -> None:
    z = torch.linspace(-30, 40, 29, dtype=torch.float64)
    assert loss.log_mean(z).exp().item() == pytest.approx(loss.mean(z).item(), rel=1e-13)


def test_weights_of_the_exponential_loss_are_softmax_of_minus_z() -> None:
    z = torch.tensor([3.0, -1.0, 0.5, 7.0], dtype=torch.float64)
    expected = torch.softmax(-z, 0)
    assert torch.allclose(Exponential().log_weights(z).exp(), expected, rtol=1e-14, atol=0)


# --- cross-entropy of logits


def logits(scale: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    outputs = scale * torch.randn((12, 5), generator=generator, dtype=torch.float64)
    y = torch.arange(12) % 5
    return outputs.to(dtype).requires_grad_(), y


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_cross_entropy_is_torchs_where_that_is_accurate(scale: float) -> None:
    loss = CrossEntropy()
    outputs, y = logits(scale)
    mean = loss.mean(loss.scores(outputs, y))
    expected = cross_entropy(outputs, y)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-14)
    found = torch.autograd.grad(mean, outputs)[0]
    wanted = torch.autograd.grad(expected, outputs)[0]
    assert torch.allclose(found, wanted, rtol=1e-13, atol=1e-16 * wanted.abs().max().item())


@every_dtype
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0, 3000.0])
@pytest.mark.parametrize("shift", [0.0, 4096.0])
def test_cross_entropy_of_large_logits(scale: float, shift: float, dtype: torch.dtype) -> None:
    """Scores, ln L and the gradient of ln L by the logits, where torch's has long been 0."""
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).tiny
    loss = CrossEntropy()
    outputs, y = logits(scale, dtype)
    outputs = (outputs.detach() + shift).requires_grad_()
    z = loss.scores(outputs, y)
    log_mean = loss.log_mean(z)
    (found,) = torch.autograd.grad(log_mean, outputs)

    rows = [[mpf(f) for f in row] for row in outputs.tolist()]
    exact_z, shares = [], []
    for row, label in zip(rows, y.tolist(), strict=True):
        others = [mpmath.exp(f) if j != label else mpf(0) for j, f in enumerate(row)]
        exact_z.append(row[label] - mpmath.log(sum(others)))
        shares.append([o / sum(others) for o in others])
    losses = [softplus_neg(one) for one in exact_z]
    width = max(abs(f) for row in rows for f in row) - shift
    for one, expected in zip(z.tolist(), exact_z, strict=True):
        # Rounded once at the size of the logits' differences, not of the logits.
        assert abs(one - expected) <= 2 * eps * (2 * width + 1)
    expected = mpmath.log(sum(losses) / len(losses))
    assert abs(log_mean.item() - expected) <= 4 * eps * (2 * width + 1)
    for i, label in enumerate(y.tolist()):
        weight = sigmoid_neg(exact_z[i]) / sum(losses)
        for j in range(5):
            want = -weight if j == label else weight * shares[i][j]
            slack = 8 * eps * (2 * width + 1) * abs(want) + 4 * tiny
            assert abs(found[i, j].item() - want) <= slack, (i, j)


def test_cross_entropy_of_two_classes_is_the_logistic_loss_of_the_difference() -> None:
    outputs = torch.tensor([[1.0, 4.0], [2.0, -3.0], [1e4, 0.0]], dtype=torch.float64)
    z = CrossEntropy().scores(outputs, torch.tensor([0, 0, 1]))
    assert z.tolist() == [-3.0, 5.0, -1e4]


def test_cross_entropy_gradient_survives_in_float32() -> None:
    """F.cross_entropy gives a gradient of 0 here; ln L still has all its direction."""
    outputs = torch.tensor([[400.0, 100.0, 250.0]], requires_grad=True)
    y = torch.tensor([0])
    assert not torch.autograd.grad(cross_entropy(outputs, y), outputs)[0].any()
    loss = CrossEntropy()
    (found,) = torch.autograd.grad(loss.log_mean(loss.scores(outputs, y)), outputs)
    assert found[0, [0, 2]].tolist() == [-1.0, 1.0]


# --- margins


def test_margins_against_a_loop() -> None:
    outputs, y = logits(2.0)
    found = margins_of(outputs, y)
    for i, label in enumerate(y.tolist()):
        row = outputs[i].tolist()
        assert found[i].item() == row[label] - max(v for j, v in enumerate(row) if j != label)
    f, sign = torch.tensor([2.0, -3.0, 0.0]), torch.tensor([1, 1, -1])
    for shaped in (f, f.unsqueeze(1)):
        assert margins_of(shaped, sign).tolist() == [2.0, -3.0, 0.0]
    assert margins_of(f, sign.double()).dtype == torch.float32


@every_loss
def test_scores_bound_the_margin(loss: Loss) -> None:
    """``margin − ln(C − 1) ≤ z ≤ margin``; equal for the binary losses."""
    if loss.multiclass:
        outputs, y = logits(3.0)
        gap = margins_of(outputs, y) - loss.scores(outputs, y)
        assert (gap >= 0).all()
        assert (gap <= math.log(4)).all()
    else:
        outputs, y = torch.randn(6, 1, dtype=torch.float64), torch.tensor([1, -1] * 3)
        assert torch.equal(loss.scores(outputs, y), margins_of(outputs, y))


@pytest.mark.parametrize(
    ("outputs", "y", "says"),
    [
        (torch.zeros(3), torch.tensor([1, -1]), "n = 2 labels"),
        (torch.zeros(3, 2, 2), torch.tensor([0, 1, 0]), "expected shape"),
        (torch.zeros(()), torch.tensor([1]), "expected shape"),
        (torch.zeros(3), torch.tensor([0, 1, 1]), "expected −1 and \\+1"),
        (torch.zeros(3, 1), torch.tensor([2, 1, 1]), "expected −1 and \\+1"),
        (torch.zeros(3, 4), torch.tensor([0, 1, 4]), "expected 0 … 3"),
        (torch.zeros(3, 4), torch.tensor([-1, 1, 1]), "expected 0 … 3"),
        (torch.zeros(3, 4), torch.tensor([0.0, 1.0, 1.0]), "int64.*y.long"),
        (torch.zeros(3, 4), torch.tensor([0, 1, 1], dtype=torch.uint8), "int64.*y.long"),
        # (n,) times (n, 1) would broadcast to (n, n) in silence.
        (torch.zeros(3), torch.ones(3, 1), "expected shape \\(n,\\), got \\(3, 1\\)"),
        (torch.zeros(3, 1), torch.ones(3, 1), "expected shape \\(n,\\)"),
        (torch.zeros(1), torch.tensor(1), "expected shape \\(n,\\)"),
    ],
)
def test_labels_that_do_not_fit(outputs: Tensor, y: Tensor, says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_labels(outputs, y)
    with pytest.raises(DataError, match=says):
        margins_of(outputs, y)
    for loss in LOSSES:
        with pytest.raises(DataError):
            loss.scores(outputs, y)


def test_binary_losses_refuse_several_outputs_and_cross_entropy_refuses_one() -> None:
    for loss in (Exponential(), Logistic()):
        with pytest.raises(DataError, match="use loss='cross-entropy'"):
            loss.scores(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="use loss='logistic'"):
        CrossEntropy().scores(torch.zeros(2, 1), torch.tensor([1, -1]))


def test_losses_by_name() -> None:
    for name, kind in [
        ("exponential", Exponential),
        ("logistic", Logistic),
        ("Logistic", Logistic),
        ("cross-entropy", CrossEntropy),
        ("cross_entropy", CrossEntropy),
        ("CrossEntropy", CrossEntropy),
    ]:
        assert type(get_loss(name)) is kind
    one = Logistic()
    assert get_loss(one) is one
    with pytest.raises(SpecificationError, match="did you mean 'logistic'"):
        get_loss("logistc")
    with pytest.raises(InputError, match="expected a name or a Loss"):
        get_loss(None)  # type: ignore[arg-type]
