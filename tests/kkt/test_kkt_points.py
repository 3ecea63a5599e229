"""Networks that are KKT points by construction: r is 0, and the multipliers are known."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from kkt_oracles import Case, case, naive, naive_fgm, put, simplex
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, Attack, ExactLinear, FiniteSet
from marginflow.models import SquaredReLU
from marginflow.references import max_margin


def separable(seed: int, n: int = 30, d: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((n, d), generator=generator, dtype=torch.float64)
    u = torch.randn(d, generator=generator, dtype=torch.float64)
    y = torch.where(x @ u > 0, 1, -1)
    return x + 0.5 * y.unsqueeze(1) * u / u.norm(), y


def factorised(direction: Tensor, size: float, depth: int) -> nn.Module:
    """A deep linear network with ``W_Π = size · direction``, balanced, of rank one."""
    widths = [len(direction), *([4] * (depth - 1)), 1]
    generator = torch.Generator().manual_seed(depth)
    sides = [direction]
    for width in widths[1:-1]:
        h = torch.randn(width, generator=generator, dtype=torch.float64)
        sides.append(h / h.norm())
    sides.append(torch.ones(1, dtype=torch.float64))
    s = size ** (1 / depth)
    layers = [s * torch.outer(sides[k + 1], sides[k]) for k in range(depth)]
    return put(mf.models.deep_linear(*widths), *layers)


def assert_kkt_point(cert: mf.Certificate, model: nn.Module, degrees: list[float]) -> None:
    """What every KKT point has: r = 0, ``Σλ_i = ‖V‖²/K``, ``‖W_k‖² ∝ c_k``."""
    assert cert.residual <= 1e-10
    assert abs(cert.self_check - 1) <= 1e-10
    v = cert.norm / float(cert.margins.min()) ** (1 / cert.order)
    assert float(cert.multipliers.sum()) == pytest.approx(v**2 / cert.order, rel=1e-9)
    squares = [float(p.detach().square().sum()) for p in model.parameters()]
    shares = [s / c for s, c in zip(squares, degrees, strict=True)]
    assert max(shares) == pytest.approx(min(shares), rel=1e-9)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_the_svm_as_a_deep_linear_network(depth: int, eps: float) -> None:
    """``λ_i = α_i s^{2−2L}`` with the SVM's multipliers α_i and s^L = 1/(γ_m − ε), under exact ℓ2 too."""
    x, y = separable(depth)
    svm = max_margin(x.numpy(), y.numpy())
    size = 1 / (svm.margin - eps)
    model = factorised(torch.from_numpy(svm.direction), size, depth)
    attack = ExactLinear(2, eps) if eps else None
    cert = mf.kkt_certificate(model, x, y, attack, tau=1e-6)
    assert_kkt_point(cert, model, [1.0] * depth)
    assert cert.support.tolist() == svm.support.tolist()
    # The direction is Σ α_i z_i/γ with Σ α_i = 1: with δ subtracted, w = size·Σ α_i z_i/γ = Σ λ (z_i + …).
    alpha = svm.multipliers[svm.support] * size / (svm.margin - eps)
    expected = alpha * size ** ((2 - 2 * depth) / depth)
    assert np.abs(cert.multipliers.numpy() - expected).max() <= 1e-7 * expected.max()


def test_scaling_and_unbalancing_a_kkt_point() -> None:
    x, y = separable(0)
    svm = max_margin(x.numpy(), y.numpy())
    model = factorised(torch.from_numpy(svm.direction), 1 / svm.margin, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    assert mf.kkt_certificate(model, x, y, tau=1e-6).residual <= 1e-10
    first, _second, third = model.parameters()
    with torch.no_grad():  # f stays, ‖W‖² is no longer the least
        first.mul_(1.1)
        third.div_(1.1)
    cert = mf.kkt_certificate(model, x, y, tau=1e-6)
    # Only the balance is wrong, so the best multipliers are a common multiple of the old:
    # with unit layers W = (a, 1, 1/a) against (1/a, 1, a): cos = 3/(a² + 1 + a⁻²).
    cosine = 3 / (1.1**2 + 1 + 1.1**-2)
    assert cert.residual == pytest.approx(math.sqrt(1 - cosine**2), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_relu_unit_for_each_example(n: int) -> None:
    """Points at obtuse angles: unit i answers to x_i alone, ``λ_i = 1/‖x_i‖``."""
    x = simplex(n) if n > 1 else torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    y = torch.arange(n) % 2 * 2 - 1
    lengths = x.norm(dim=1)
    s = lengths ** (-1 / 2)
    model = put(
        mf.models.mlp(x.shape[1], n, 1), (s / lengths).unsqueeze(1) * x, (y * s).unsqueeze(0)
    )
    cert = mf.kkt_certificate(model, x, y, tau=0.0)
    assert_kkt_point(cert, model, [1.0, 1.0])
    assert cert.support.tolist() == list(range(n))
    assert (cert.multipliers - 1 / lengths).abs().max() <= 1e-12
    assert "a KKT point, to the accuracy of r" in str(cert)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_squared_relu_unit_for_each_example(n: int) -> None:
    """Unequal degrees 2, 1: ``a_i³ = 1/(2‖x_i‖²)``, ``λ_i = a_i²·…``, ``‖W_1‖² = 2‖W_2‖²``."""
    x = simplex(n) if n > 1 else torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    y = torch.arange(n) % 2 * 2 - 1
    lengths = x.norm(dim=1)
    a = (2 * lengths**2) ** (-1 / 3)
    s = math.sqrt(2.0) * a
    model = put(
        mf.models.mlp(x.shape[1], n, 1, activation="squared-relu"),
        (s / lengths).unsqueeze(1) * x,
        (y * a).unsqueeze(0),
    )
    cert = mf.kkt_certificate(model, x, y, tau=0.0)
    assert cert.order == 3
    assert_kkt_point(cert, model, [2.0, 1.0])
    assert (cert.multipliers - 1 / (2 * a * lengths**2)).abs().max() <= 1e-12


@pytest.mark.parametrize("angle", [0.4, 1.0, 1.5])
@pytest.mark.parametrize("activation", ["relu", "leaky-relu"])
def test_two_examples_at_each_others_kinks(angle: float, activation: str) -> None:
    """Labels +1 and −1 at an acute angle: each ReLU unit is just silent on the other example.

    With c = cos(angle), ``w_1 ∝ x_1 − c x_2`` and ``λ = 1/sin(angle)``: Clarke's subdifferential takes
    the share c of the unit's slope at its kink. One gradient per example does not see that.
    """
    c, s = math.cos(angle), math.sin(angle)
    x = torch.tensor([[1.0, 0.0], [c, s]], dtype=torch.float64)
    y = torch.tensor([1, -1])
    a = s ** (-1 / 2)
    hidden = (a / s) * torch.stack([x[0] - c * x[1], x[1] - c * x[0]])
    model = put(
        mf.models.mlp(2, 2, 1, activation=activation),
        hidden,
        torch.tensor([[a, -a]], dtype=torch.float64),
    )
    cert = mf.kkt_certificate(model, x, y, tau=0.0)
    assert_kkt_point(cert, model, [1.0, 1.0])
    assert (cert.multipliers - 1 / s).abs().max() <= 1e-12
    assert naive(Case(model, x, y), 2).best(0.0)[2] > 0.01
    # A little off the kink there is one gradient, and it is far from enough.
    off = copy.deepcopy(model)
    with torch.no_grad():
        next(off.parameters()).add_(1e-6 * torch.tensor([[c, s], [1.0, 0.0]]))
    assert mf.kkt_certificate(off, x, y, tau=1e-3).residual > 0.01


def a_unit_in_each_plane(angles: Tensor) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """``x_0 = e_0`` and ``x_j = cos θ_j e_0 + sin θ_j e_j`` of the other label, at the others' kinks.

    ``w_j ∝ e_j``, ``w_0 ∝ e_0 − Σ cot θ_j e_j``. With ``D = 1/(1 + Σ cot² θ_j)`` the multipliers are
    ``λ_0 = D^{−1/2}``, ``λ_j = 1/sin θ_j``; of unit j at x_0 the share ``√D cot θ_j`` of its slope counts, of
    unit 0 at x_j the same, and nothing of the others.
    """
    k, c, s = len(angles), angles.cos(), angles.sin()
    x = torch.eye(k + 1, dtype=torch.float64)
    x[1:, 0], x[1:, 1:] = c, s.diag()
    d = float(1 / (1 + (c / s).square().sum()))
    hidden = torch.eye(k + 1, dtype=torch.float64)
    hidden[0, 1:] = -c / s
    hidden[0] *= d ** (1 / 4)
    hidden[1:] *= s.rsqrt().unsqueeze(1)
    last = torch.cat([s.new_tensor([d ** (-1 / 4)]), -s.rsqrt()])
    y = torch.tensor([1] + [-1] * k)
    multipliers = torch.cat([s.new_tensor([d ** (-1 / 2)]), 1 / s])
    return put(mf.models.mlp(k + 1, k + 1, 1), hidden, last.unsqueeze(0)), x, y, multipliers


@pytest.mark.parametrize("k", [3, 8, 9, 14])
def test_an_example_at_many_kinks(k: int) -> None:
    """Up to eight all sides are rows; beyond, the few of 2^k that the point is made of are looked for."""
    model, x, y, multipliers = a_unit_in_each_plane(
        torch.linspace(0.6, 1.4, k, dtype=torch.float64)
    )
    cert = mf.kkt_certificate(model, x, y, tau=0.0)
    assert_kkt_point(cert, model, [1.0, 1.0])
    assert (cert.multipliers - multipliers).abs().max() <= 1e-9
    assert cert.solver_gap <= 1e-12


def test_a_kink_where_the_perturbation_is_formed() -> None:
    """A unit at 0 on x, not on ``x + δ(W)``: δ jumps, so there is no second piece."""
    generator = torch.Generator().manual_seed(0)
    hidden, middle, last = (
        torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2
        for shape in ((3, 2), (3, 3), (1, 3))
    )
    hidden[1, 0] = 0.0
    linear = [nn.Linear(2, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)]
    model = put(
        nn.Sequential(linear[0], nn.ReLU(), linear[1], SquaredReLU(), linear[2]),
        hidden,
        middle,
        last,
    )
    c = Case(model, torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1]))
    cert = mf.kkt_certificate(model, c.x, c.y, FGM(0.2), tau=0.0)
    expected = naive(c, 5, lambda z, label, i: naive_fgm(model, z, label, 0.2))
    assert cert.residual == pytest.approx(expected.best(0.0)[2], rel=1e-12)


def test_two_perturbations_that_tie() -> None:
    """``min ½‖w‖²`` with ``⟨w, (1, ±e)⟩ ≥ 1``: w = (1, 0), half of the multiplier on each."""
    model = put(nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1])
    attack = FiniteSet(torch.tensor([[0.0, 0.7], [0.0, -0.7]], dtype=torch.float64))
    cert = mf.kkt_certificate(model, x, y, attack)
    assert_kkt_point(cert, model, [1.0])
    assert cert.multipliers.tolist() == pytest.approx([1.0], abs=1e-12)
    half = FiniteSet(torch.tensor([[0.0, 0.7]], dtype=torch.float64))
    alone = mf.kkt_certificate(model, x, y, half)
    assert alone.residual == pytest.approx(0.7 / math.sqrt(1 + 0.7**2), rel=1e-12)


@pytest.mark.parametrize("attack", [ExactLinear("linf", 0.4), FGSM(0.4)], ids=str)
def test_a_sign_that_is_not_determined(attack: Attack) -> None:
    """ℓ∞ and w = (a, 0): x_2 = 0.3 < ε is worth no weight, the free sign s has ``x_2 = ε s``."""
    a = 1 / (1 - 0.4)
    model = put(nn.Linear(3, 1, bias=False), torch.tensor([[a, 0.0, 0.0]], dtype=torch.float64))
    x, y = torch.tensor([[1.0, 0.3, -0.2]], dtype=torch.float64), torch.tensor([1])
    cert = mf.kkt_certificate(model, x, y, attack)
    assert_kkt_point(cert, model, [1.0])
    assert cert.multipliers.tolist() == pytest.approx([a**2], rel=1e-12)
    # Beyond ε it is: the best multiple of (1 − ε, 0.5 − ε), by hand.
    x[0, 1] = 0.5
    x[0, 2] = 0.0
    off = mf.kkt_certificate(model, x, y, attack)
    assert off.residual == pytest.approx(0.1 / math.hypot(0.6, 0.1), rel=1e-9)


def test_two_largest_coordinates_that_tie() -> None:
    """ℓ1, whose perturbation falls on one coordinate: w = (a, a) and x = (1, 1) take half on each."""
    a = 1 / (2 - 0.4)
    model = put(nn.Linear(2, 1, bias=False), torch.tensor([[a, a]], dtype=torch.float64))
    x, y = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([1])
    cert = mf.kkt_certificate(model, x, y, ExactLinear(1, 0.4))
    assert_kkt_point(cert, model, [1.0])
    assert cert.multipliers.tolist() == pytest.approx([2 * a**2], rel=1e-12)


def test_two_rivals_that_tie() -> None:
    """Three classes, one example: ``f_0 = 2/3``, ``f_1 = f_2 = −1/3``, ``λ = 2/3``."""
    weights = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64) / 3
    model = put(nn.Linear(2, 3, bias=False), weights)
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    cert = mf.kkt_certificate(model, x, y)
    assert_kkt_point(cert, model, [1.0])
    assert cert.multipliers.tolist() == pytest.approx([2 / 3], abs=1e-12)


@pytest.mark.parametrize("attack", [None, ExactLinear(2, 0.1)], ids=["clean", "l2"])
def test_complementarity_falls_as_the_weights_grow(attack: Attack | None) -> None:
    """``ξ → 0`` along a fixed direction, below its bound, which falls like ``‖W‖^{−K}``."""
    x, y = separable(3)
    svm = max_margin(x.numpy(), y.numpy())
    xi, bounds = [], []
    for size in (1.0, 2.0, 4.0, 8.0, 16.0):
        model = factorised(torch.from_numpy(svm.direction), size / svm.margin, 2)
        cert = mf.kkt_certificate(model, x, y, attack)
        assert cert.complementarity <= cert.complementarity_bound
        xi.append(cert.complementarity)
        bounds.append(cert.complementarity_bound)
    assert all(later < earlier for earlier, later in pairwise(xi))
    # K = 2 and ‖W‖² ∝ size: ‖W‖²/m^{1+2/K} ∝ 1/size.
    assert [a / b for a, b in pairwise(bounds)] == pytest.approx([2.0] * 4, rel=1e-9)


def test_a_trained_network_is_not_one() -> None:
    c = case("relu", n=40)
    assert mf.kkt_certificate(c.model, c.x, c.y).residual > 0.5
