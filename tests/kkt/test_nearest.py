"""The nearest KKT point: reached to rounding, feasible, and where another road leads to as well."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from kkt_oracles import Case, case, naive, naive_fgm, put, simplex, vector
from scipy.optimize import nnls
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, Attack, ExactLinear, FiniteSet
from marginflow.kkt._search import _least_distance
from marginflow.models import linear_layers
from marginflow.references import max_margin, robust_svm


def data(seed: int, n: int = 20, d: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(d, generator=generator, dtype=torch.float64)
    x = torch.randn((n, d), generator=generator, dtype=torch.float64)
    y = torch.where(x @ u > 0, 1, -1)
    return x + 0.3 * y.unsqueeze(1) * u / u.norm(), y


def finite_set(seed: int) -> FiniteSet:
    generator = torch.Generator().manual_seed(seed)
    return FiniteSet(0.15 * torch.randn((4, 5), generator=generator, dtype=torch.float64))


def trained(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None, steps: int = 400
) -> Case:
    """Normalised gradient ascent on the smallest margins, in the direction of a limit."""
    model = model.double()
    parameters = list(model.parameters())
    for _ in range(steps):
        delta = 0 if attack is None else attack(model, x, y).delta
        margins = mf.losses.margins_of(model(x + delta), y)
        gradients = torch.autograd.grad(torch.logsumexp(-margins, 0), parameters)
        size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in parameters))
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= min(0.05, 0.01 * norm / size) * g
    return Case(model, x, y)


def assert_found(point: mf.NearestKKTPoint, c: Case, attack: Attack | None) -> None:
    """Feasible, stationary, and of a larger margin than the start."""
    assert point.converged, point.advice
    assert point.residual <= 1e-8
    assert point.advice == ""
    margins = mf.adversarial_margins(point.model, c.x, c.y, attack)
    assert margins.min == pytest.approx(1.0, abs=1e-9)
    assert point.margin == pytest.approx(margins.normalized_min, rel=1e-12)
    start = mf.adversarial_margins(c.model, c.x, c.y, attack)
    assert point.margin_before == pytest.approx(start.normalized_min, rel=1e-12)
    assert float(margins.normalized_by_total.min()) >= float(start.normalized_by_total.min())
    a, b = vector(c.model), vector(point.model)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    kahan = 2 * math.atan2(float(np.linalg.norm(a - b)), float(np.linalg.norm(a + b)))
    assert point.angle == pytest.approx(kahan, rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("widths", [(5, 1), (5, 4, 1), (5, 4, 3, 1)])
def test_deep_linear_networks_end_at_the_svm(widths: tuple[int, ...], seed: int) -> None:
    x, y = data(seed)
    c = trained(mf.models.deep_linear(*widths, seed=seed), x, y, None)
    svm = max_margin(x.numpy(), y.numpy())
    for attack in (None, ExactLinear(2, svm.margin / 3)):
        point = mf.nearest_kkt_point(c.model, x, y, attack)
        assert_found(point, c, attack)
        product = mf.measure_alignment(linear_layers(point.model))
        assert product.angle_to(torch.from_numpy(svm.direction)) <= 1e-6
        assert product.product_gap <= 1e-12
        expected = svm.margin - (0.0 if attack is None else attack.eps)
        assert point.margin == pytest.approx(expected, rel=1e-9)


def test_a_linear_network_against_another_norm_ends_at_the_robust_svm() -> None:
    x, y = data(2)
    c = trained(mf.models.deep_linear(5, 4, 1, seed=2), x, y, None)
    attack = ExactLinear(3, 0.1)
    expected = robust_svm(x.numpy(), y.numpy(), 0.1, p=3)
    point = mf.nearest_kkt_point(c.model, x, y, attack)
    assert_found(point, c, attack)
    angle = mf.measure_alignment(point.model).angle_to(torch.from_numpy(expected.direction))
    assert angle <= max(1e-6, expected.angle_bound)
    assert point.margin == pytest.approx(expected.margin, rel=1e-7)


def test_a_finite_set_on_a_linear_network_is_an_svm_of_all_perturbed_examples() -> None:
    for seed in range(3):
        (x, y), attack = data(seed), finite_set(seed)
        c = trained(mf.models.deep_linear(5, 4, 1, seed=seed), x, y, attack)
        moved = torch.cat([x + delta for delta in attack.deltas])
        svm = max_margin(moved.numpy(), y.repeat(len(attack.deltas)).numpy())
        point = mf.nearest_kkt_point(c.model, x, y, attack)
        assert_found(point, c, attack)
        angle = mf.measure_alignment(point.model).angle_to(torch.from_numpy(svm.direction))
        assert angle <= 1e-6


@pytest.mark.parametrize("seed", [4, 9])
@pytest.mark.parametrize("activation", ["relu", "leaky-relu", "squared-relu"])
@pytest.mark.parametrize("kind", ["clean", "finite set"])
def test_networks_with_an_activation(activation: str, kind: str, seed: int) -> None:
    (x, y), attack = data(seed), finite_set(seed) if kind == "finite set" else None
    model = mf.models.mlp(5, 6, 1, activation=activation, seed=seed)
    c = trained(model, x, y, attack)
    point = mf.nearest_kkt_point(c.model, x, y, attack)
    assert_found(point, c, attack)
    squares = [float(p.detach().square().sum()) for p in point.model.parameters()]
    degree = 2 if activation == "squared-relu" else 1
    assert squares[0] == pytest.approx(degree * squares[1], rel=1e-9)
    assert float(point.certificate.multipliers.sum()) == pytest.approx(sum(squares) / (1 + degree))


def test_three_layers_and_several_classes() -> None:
    x, y = data(10)
    c = trained(mf.models.mlp(5, 8, 6, 1, seed=10), x, y, None, steps=1500)
    assert_found(mf.nearest_kkt_point(c.model, x, y), c, None)
    centres = 2 * simplex(3) @ torch.eye(3, 5, dtype=torch.float64)
    classes = torch.arange(15) % 3
    x = centres[classes] + 0.2 * torch.randn((15, 5), dtype=torch.float64)
    c = trained(mf.models.mlp(5, 12, 3, activation="squared-relu", seed=1), x, classes, None)
    assert_found(mf.nearest_kkt_point(c.model, x, classes), c, None)


def test_squared_relu_under_fgm_by_the_total_derivative() -> None:
    """The residual again by a naive loop through Eq. (87)."""
    for seed in (2, 9):
        (x, y), attack = data(seed), FGM(0.1)
        c = trained(mf.models.mlp(5, 8, 1, activation="squared-relu", seed=seed), x, y, attack)
        point = mf.nearest_kkt_point(c.model, x, y, attack)
        assert_found(point, c, attack)
        found = Case(point.model, x, y)
        expected = naive(found, 3, lambda z, label, i, m=point.model: naive_fgm(m, z, label, 0.1))
        assert expected.best(1e-8)[2] <= 1e-8
        # With δ held fixed it is not a KKT point of anything.
        detached = mf.kkt_certificate(point.model, x, y, attack, tau=1e-8, derivative="detached")
        assert detached.residual > 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_relu_under_fgm_by_the_total_derivative(seed: int) -> None:
    """Units just silent at ``x + δ(W)``: one-sided gradients by a naive loop, with either slope there."""
    (x, y), attack = data(seed), FGM(0.1)
    c = trained(mf.models.mlp(5, 6, 1, seed=seed), x, y, attack, steps=1500)
    point = mf.nearest_kkt_point(c.model, x, y, attack)
    assert_found(point, c, attack)
    first, last = point.model.parameters()
    rows = []
    for xi, yi in zip(x, y, strict=True):
        active = (first.detach() @ xi > 0).double()
        g = yi * (last[0] * active) @ first
        z = xi - 0.1 * g / g.norm()
        u = first @ z
        if float((yi * last[0] @ u.clamp(min=0)).detach()) > 1 + 1e-7:
            continue
        kinks = torch.nonzero(u.abs() <= 1e-9 * u.abs().max()).flatten().tolist()
        for sides in itertools.product((0.0, 1.0), repeat=len(kinks)):
            slopes = (u.detach() > 0).double()
            slopes[kinks] = torch.tensor(sides, dtype=torch.float64)
            m = yi * last[0] @ (slopes * u)
            grads = torch.autograd.grad(m, (first, last), retain_graph=True)
            rows.append(np.concatenate([t.numpy().ravel() for t in grads]))
    w = vector(point.model)
    assert nnls(np.array(rows).T, w, maxiter=10_000)[1] <= 1e-8 * np.linalg.norm(w)


@pytest.mark.parametrize("seed", [0, 2])
def test_signs_that_are_not_determined(seed: int) -> None:
    """Under ℓ∞ the solution is sparse (Appendix B.5): zeros of W_Π, whose signs are free, by two attacks."""
    x, y = data(seed, d=8)
    x = x * torch.linspace(1.5, 0.1, 8, dtype=torch.float64)
    expected = robust_svm(x.numpy(), y.numpy(), 0.1, p=math.inf)
    zeros = int((np.abs(expected.direction) < 1e-6).sum())
    assert zeros > 0
    for attack in (ExactLinear("linf", 0.1), FGSM(0.1)):
        c = trained(mf.models.deep_linear(8, 4, 1, seed=seed), x, y, attack)
        point = mf.nearest_kkt_point(c.model, x, y, attack)
        assert_found(point, c, attack)
        angle = mf.measure_alignment(linear_layers(point.model)).angle_to(
            torch.from_numpy(expected.direction)
        )
        assert angle <= 1e-6
        assert point.margin == pytest.approx(expected.margin, rel=1e-7)


def test_fgsm_on_networks_with_an_activation() -> None:
    """δ is formed anew on the way: the point is one of the attack at the end, not of that at the start."""
    for activation, seed in (("relu", 0), ("relu", 2), ("squared-relu", 1)):
        (x, y), attack = data(seed), FGSM(0.03)
        c = trained(mf.models.mlp(5, 6, 1, activation=activation, seed=seed), x, y, attack, 1500)
        assert_found(mf.nearest_kkt_point(c.model, x, y, attack), c, attack)


def test_a_kkt_point_is_its_own_nearest() -> None:
    """The closed form for one unit an example, and any point found."""
    x = simplex(3)
    y, lengths = torch.tensor([1, -1, 1]), x.norm(dim=1)
    s = lengths ** (-1 / 2)
    model = put(mf.models.mlp(3, 3, 1), (s / lengths).unsqueeze(1) * x, (y * s).unsqueeze(0))
    point = mf.nearest_kkt_point(model, x, y)
    assert point.converged
    assert point.angle <= 1e-9
    x, y = data(4)
    c = trained(mf.models.mlp(5, 6, 1, seed=4), x, y, None)
    first = mf.nearest_kkt_point(c.model, x, y)
    again = mf.nearest_kkt_point(first.model, x, y)
    assert again.converged
    assert again.angle <= 1e-6
    assert again.rounds <= 2  # no unit that belongs to its kink is sent across


def test_from_a_small_step_off_it_comes_back() -> None:
    """Near a strict solution (unique but for rotations) the distance to it is that of the step."""
    x, y = data(1)
    c = trained(mf.models.mlp(5, 6, 1, activation="squared-relu", seed=1), x, y, None)
    first = mf.nearest_kkt_point(c.model, x, y)
    moved = copy.deepcopy(first.model)
    with torch.no_grad():
        for p in moved.parameters():
            p += 1e-4 * torch.randn_like(p) * p.norm() / math.sqrt(p.numel())
    back = mf.nearest_kkt_point(moved, x, y)
    assert back.converged
    assert back.margin == pytest.approx(first.margin, rel=1e-10)
    assert 1e-5 < back.angle < 1e-3


def test_duplicated_examples_and_frozen_layers() -> None:
    x, y = data(3)
    c = trained(mf.models.mlp(5, 6, 1, activation="squared-relu", seed=3), x, y, None)
    single = mf.nearest_kkt_point(c.model, x, y)
    double = mf.nearest_kkt_point(c.model, torch.cat([x, x]), torch.cat([y, y]))
    assert double.converged
    assert double.margin == pytest.approx(single.margin, rel=1e-9)
    next(c.model.parameters()).requires_grad_(False)
    partly = mf.nearest_kkt_point(c.model, x, y)
    assert partly.converged
    assert torch.equal(next(partly.model.parameters()), next(c.model.parameters()))
    # f is linear in what is left: an SVM on the hidden features.
    with torch.no_grad():
        features = nn.Sequential(*list(c.model)[:-1])(x)  # type: ignore[call-overload]
    svm = max_margin(features.numpy(), y.numpy())
    assert partly.certificate.norm == pytest.approx(1 / svm.margin, rel=1e-9)


def test_the_network_is_left_as_it_was() -> None:
    c = case("squared-classes", n=10)
    single = copy.deepcopy(c.model).float().train()
    before = vector(single).copy()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        point = mf.nearest_kkt_point(single, c.x, c.y)
    assert np.array_equal(vector(single), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.dtype == torch.float32 and p.grad is None for p in single.parameters())
    assert all(p.dtype == torch.float64 for p in point.model.parameters())
    assert point.model.training


def test_failing_is_a_value_with_advice() -> None:
    x, y = data(0)
    c = trained(mf.models.mlp(5, 6, 1, seed=0), x, y, FGM(0.1))
    point = mf.nearest_kkt_point(c.model, x, y, FGM(0.1), max_iterations=2)
    assert not point.converged
    assert point.residual > 1e-8
    assert "δ(W) may jump where a ReLU or a sign changes sides" in point.advice
    assert point.certificate.residual == point.residual


def test_the_same_start_gives_the_same_bits() -> None:
    """MKL's least squares on a singular system hung on where its memory lay."""
    x, y = data(10)
    c = trained(mf.models.mlp(5, 8, 6, 1, seed=10), x, y, None, steps=1500)
    rng = np.random.default_rng(0)
    first, *others = [
        (mf.nearest_kkt_point(c.model, x, y), [np.empty(k) for k in rng.integers(1, 5000, 50)])[0]
        for _ in range(3)
    ]
    for other in others:
        assert (other.rounds, other.residual) == (first.rounds, first.residual)
        for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_model_that_no_constraint_bounds_ends_the_search_and_not_the_process() -> None:
    generator = torch.Generator().manual_seed(0)
    data = mf.load("digits:3,8")
    x = data.x[:40]
    model = mf.models.build("mlp:8", input_shape=data.shape, seed=0)
    y = model(x).detach().reshape(-1).sign()  # fitted by a network that was never trained
    point = mf.nearest_kkt_point(model, x, y)
    assert not point.converged
    assert "start nearer to a KKT point" in point.advice
    assert point.margin >= point.margin_before
    w = torch.randn(6, generator=generator, dtype=torch.float64)
    for rows in (0, 2):
        nothing = torch.zeros(rows, 6, dtype=torch.float64)
        assert _least_distance(w, nothing, torch.ones(rows, dtype=torch.float64), None) is None
