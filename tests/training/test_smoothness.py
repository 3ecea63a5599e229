"""The constants of Lemma 1 against exact fractions, and against the Hessians that they bound."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from marginflow.errors import InputError
from marginflow.training import printed_smoothness, smoothness

CASES = [
    (depth, r, low, eps)
    for depth in (1, 2, 3, 5)
    for r in (1.0, 1.5, 2.0)
    for low, eps in ((0.25, 0.0), (0.5, 0.125), (2.0, 0.75))
]


@pytest.mark.parametrize(("depth", "r", "low", "eps"), CASES)
def test_the_formulas_in_fractions(depth: int, r: float, low: float, eps: float) -> None:
    L, q, s, e, x = depth, Fraction(r), Fraction(low), Fraction(eps), Fraction(3, 2)
    for a, b in ((Fraction(1), Fraction(1, 4)), (Fraction(2), Fraction(3, 8))):
        options = {"alpha": float(a), "beta": float(b)}
        star = L * q ** (2 * L - 2) * (b * (x + e) ** 2 + e * a / s) + (L - 1) * q ** (
            L - 2
        ) * a * (x + e)
        found = smoothness(depth, r, low, eps, data_norm=1.5, **options)
        assert found == pytest.approx(float(star), rel=1e-14)
        printed = q ** (3 * L) * L**2 * (a + b + e / s**L * (2 * a + b + a * b / s**L))
        assert printed_smoothness(depth, r, low, eps, **options) == pytest.approx(
            float(printed), rel=1e-14
        )


def test_the_values_that_the_notes_quote() -> None:
    """54 against 4·10⁵ at L = 3, r = 2: that is ε = 0.2, r̄ = 0.3, ‖x_i‖ ≤ 1."""
    corrected, printed = smoothness(3, 2, 0.3, 0.2), printed_smoothness(3, 2, 0.3, 0.2)
    print(f"\nL = 3, r = 2, ε = 0.2, r̄ = 0.3: corrected {corrected:.6g}, printed {printed:.6g}")
    assert corrected == pytest.approx(54.08, rel=1e-14)
    assert printed == pytest.approx(398_609.382716, rel=1e-9)


def hessian(x: Tensor, y: Tensor, eps: float, layers: list[Tensor]) -> Tensor:
    """∇² of the logistic adversarial loss, column by column."""
    sizes = [w.numel() for w in layers]
    at = torch.cat([w.reshape(-1) for w in layers]).requires_grad_()
    parts = [v.reshape(w.shape) for v, w in zip(torch.split(at, sizes), layers, strict=True)]
    product = parts[0]
    for w in parts[1:]:
        product = w @ product
    p = product.reshape(-1)
    margins = y * (x @ p) - eps * torch.linalg.vector_norm(p)
    loss = torch.log1p(torch.exp(-margins)).mean()
    (gradient,) = torch.autograd.grad(loss, at, create_graph=True)
    rows = [torch.autograd.grad(g, at, retain_graph=True)[0] for g in gradient]
    return torch.stack(rows)


@pytest.mark.parametrize("widths", [(3, 1), (3, 2, 1), (3, 2, 2, 1)])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_no_hessian_exceeds_the_constant(widths: tuple[int, ...], eps: float) -> None:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(5, 3)
    x = x / torch.linalg.vector_norm(x, dim=1).max()
    y = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    depth, closest = len(widths) - 1, 0.0
    for trial in range(120):
        layers = [draw(a, b) for a, b in zip(widths[1:], widths[:-1], strict=True)]
        if trial % 2:  # rank one and in line: where products of norms are attained
            units = [draw(w) for w in widths]
            layers = [torch.outer(b, a) for a, b in pairwise(units)]
        r = 1.0 + trial % 5 / 2
        layers = [r * w / torch.linalg.matrix_norm(w) for w in layers]
        if trial % 3 == 0:
            layers[0] = layers[0] * 0.05
        product = layers[0]
        for w in layers[1:]:
            product = w @ product
        low = float(torch.linalg.vector_norm(product))
        size = float(torch.linalg.eigvalsh(hessian(x, y, eps, layers)).abs().max())
        bound = smoothness(depth, r, low, eps)
        assert size <= bound * (1 + 1e-12)
        assert size <= printed_smoothness(depth, r, low, eps)
        closest = max(closest, size / bound)
    print(f"\nL = {depth}, ε = {eps}: the largest Hessian is {closest:.3f} of β*")
    assert closest > 0.05  # a bound of the right size


def test_the_constant_is_attained_by_one_layer_on_one_example() -> None:
    """At margin 0 a logistic loss has curvature R²/4."""
    x, y = torch.tensor([[0.6, 0.8]], dtype=torch.float64) * 3, torch.ones(1).double()
    w = [torch.tensor([[0.8, -0.6]], dtype=torch.float64)]
    size = float(torch.linalg.eigvalsh(hessian(x, y, 0.0, w)).max())
    assert size == pytest.approx(smoothness(1, 1.0, 1.0, 0.0, data_norm=3.0), rel=1e-14)


def test_extreme_arguments_are_infinite_or_finite_but_never_an_error() -> None:
    assert printed_smoothness(50, 1e10, 0.1, 0.1) == math.inf
    assert smoothness(50, 1e10, 0.1, 0.1) == math.inf
    assert printed_smoothness(50, 1.0, 1e-10, 0.1) == math.inf
    assert printed_smoothness(50, 1.0, 1e-10, 0.0) == pytest.approx(1.25 * 2500, rel=1e-14)
    assert np.isfinite(smoothness(50, 1.0, 1e-10, 0.1))


@pytest.mark.parametrize("constant", [smoothness, printed_smoothness])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1.0, 1.0, 0.0), "depth"),
        ((2.5, 1.0, 1.0, 0.0), "depth"),
        ((2, 0.0, 1.0, 0.0), "radius"),
        ((2, math.nan, 1.0, 0.0), "radius"),
        ((2, 1.0, 0.0, 0.0), "floor"),
        ((2, 1.0, 1.0, -0.1), "eps"),
    ],
)
def test_refusals(constant: object, arguments: tuple[float, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        constant(*arguments)  # type: ignore[operator]


def test_the_data_norm_is_checked() -> None:
    with pytest.raises(InputError, match="data_norm"):
        smoothness(2, 1.0, 1.0, 0.1, data_norm=0.0)
