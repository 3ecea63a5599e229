"""robust_svm against closed forms, a grid, the SVM and its own certificate."""

import math
import time

import numpy as np
import pytest

from marginflow.errors import DataError, InputError
from marginflow.references import _game, largest_feasible_eps, max_margin, robust_svm, svm

EXPONENTS = [1, 1.3, 2, 3, 7.5, math.inf]


def dual(p):
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def check_certificate(x, y, found, tolerance):
    """Feasibility, and both sides of the gap, recomputed one example at a time."""
    penalty = found.eps * np.linalg.norm(found.weights, dual(found.p))
    margins = [yi * float(np.dot(xi, found.weights)) - penalty for xi, yi in zip(x, y, strict=True)]
    assert min(margins) == pytest.approx(1, abs=1e-9)
    assert found.margin == pytest.approx(1 / np.linalg.norm(found.weights), rel=1e-12)
    assert np.linalg.norm(found.direction) == pytest.approx(1, abs=1e-12)
    assert found.multipliers.min() >= 0
    assert found.multipliers.sum() == pytest.approx(1, abs=1e-12)
    assert -1e-12 <= found.gap <= tolerance
    if found.p in (1, 2, math.inf):  # the distance of the hull point to the ball, anew
        point = found.multipliers @ (y[:, None] * x)
        distance = np.linalg.norm(point - nearest_in_ball(point, found.eps, found.p))
        assert distance <= found.dual_value * (1 + 1e-9)
        assert distance >= found.margin * (1 - 1e-12)


def nearest_in_ball(point, radius, p):
    if radius == 0:
        return np.zeros_like(point)
    if p == math.inf:
        return np.clip(point, -radius, radius)
    if p == 2:
        return point * min(1.0, radius / np.linalg.norm(point))
    if np.abs(point).sum() <= radius:
        return point
    sizes = np.sort(np.abs(point))[::-1]
    cuts = (np.cumsum(sizes) - radius) / np.arange(1, len(sizes) + 1)
    cut = cuts[np.flatnonzero(sizes > cuts)[-1]]
    return np.sign(point) * np.maximum(np.abs(point) - cut, 0)


@pytest.mark.parametrize("p", EXPONENTS)
def test_closed_form_scaled_axes(p):
    """z_j = a_j e_j: every constraint holds with equality, w = (1/a)/(1 − ε‖1/a‖_q)."""
    a = np.array([0.7, 2.0, 5.0, 1.1])
    y = np.array([1.0, -1.0, -1.0, 1.0])
    size = np.linalg.norm(1 / a, dual(p))
    for fraction in (0.0, 0.4, 0.9):
        eps = fraction / size
        found = robust_svm(np.diag(a * y), y, eps, p=p)
        assert found.largest_eps == pytest.approx(1 / size, rel=1e-9)
        np.testing.assert_allclose(found.weights, 1 / a / (1 - eps * size), rtol=1e-7)
        assert found.gap < 1e-8


@pytest.mark.parametrize("p", EXPONENTS)
def test_a_grid_of_directions_in_the_plane(p, separable):
    x, y = separable(1, 12, 2)
    angles = np.linspace(0, 2 * np.pi, 200_001)
    grid = np.stack([np.cos(angles), np.sin(angles)])
    eps = 0.5 * largest_feasible_eps(x, y, p=p)
    values = (y[:, None] * (x @ grid)).min(axis=0) - eps * np.linalg.norm(grid, dual(p), axis=0)
    found = robust_svm(x, y, eps, p=p)
    assert values.max() <= found.margin * (1 + 1e-9)
    assert found.margin == pytest.approx(values.max(), rel=2e-4)
    assert np.dot(grid[:, values.argmax()], found.direction) > 1 - 1e-6


@pytest.mark.parametrize(("n", "d"), [(40, 5), (30, 60), (600, 10)])
@pytest.mark.parametrize("p", EXPONENTS)
def test_certificate(n, d, p, separable):
    x, y = separable(2, n, d)
    for fraction in (0.0, 0.5, 0.95):
        eps = fraction * largest_feasible_eps(x, y, p=p)
        check_certificate(x, y, robust_svm(x, y, eps, p=p), 1e-6 if fraction == 0.95 else 1e-8)


def test_an_l2_adversary_leaves_the_direction_alone(separable):
    """w = ū/(γ_m − ε): no other direction, only a longer way."""
    worst = 0.0
    for seed in range(5):
        x, y = separable(seed, 50, 8)
        plain = max_margin(x, y)
        for fraction in (0.0, 0.3, 0.9, 0.99):
            found = robust_svm(x, y, fraction * plain.margin, p=2)
            assert found.margin == pytest.approx(plain.margin * (1 - fraction), rel=1e-8)
            distance = float(np.linalg.norm(found.direction - plain.direction))
            assert distance <= found.angle_bound + plain.angle_bound
            worst = max(worst, distance)
    print(f"\nl2: largest distance of robust and plain direction {worst:.1e}")
    assert worst < 1e-5


def test_another_adversary_turns_it(separable):
    x, y = separable(0, 50, 8)
    for p in (1, math.inf):
        eps = 0.9 * largest_feasible_eps(x, y, p=p)
        turned = robust_svm(x, y, eps, p=p)
        angle = math.acos(np.dot(turned.direction, max_margin(x, y).direction))
        print(f"\nl{p}: the robust direction is {angle:.3f} rad from the SVM's")
        assert angle > 0.05


@pytest.mark.parametrize("p", [1.5, 3])
def test_stationarity(p, separable):
    """w = ‖w‖₂² Σ α_i (z_i − ε ∇‖w‖_q) where the norm is smooth."""
    x, y = separable(4, 30, 6)
    eps = 0.5 * largest_feasible_eps(x, y, p=p)
    found = robust_svm(x, y, eps, p=p)
    w, q = found.weights, dual(p)
    slope = np.sign(w) * (np.abs(w) / np.linalg.norm(w, q)) ** (q - 1)
    pull = found.multipliers @ (y[:, None] * x - eps * slope)
    np.testing.assert_allclose(np.dot(w, w) * pull, w, atol=1e-5 * np.linalg.norm(w))


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_too_large_a_budget_is_a_value_with_advice(p, separable):
    x, y = separable(5, 30, 6)
    largest = largest_feasible_eps(x, y, p=p)
    assert robust_svm(x, y, 0.999 * largest, p=p).feasible
    found = robust_svm(x, y, 1.001 * largest, p=p)
    assert not found.feasible
    assert found.largest_eps == largest
    assert f"{largest:g}, the largest feasible: reduce it" in found.advice
    assert not found.weights.any()
    assert found.angle_bound == math.pi


def test_inseparable_data_have_no_budget():
    found = robust_svm([[1.0, 0.0], [1.0, 0.0]], [1, -1], 0.0, p=2)
    assert not found.feasible
    assert found.largest_eps == 0
    assert "not separable" in found.advice


def test_a_failing_solver_is_a_value_with_a_wide_gap(monkeypatch, separable):
    x, y = separable(6, 30, 6)
    eps = 0.5 * largest_feasible_eps(x, y, p=math.inf)
    for module in (_game, svm):
        monkeypatch.setattr(module, "solved", lambda _: False)
    found = robust_svm(x, y, eps, p=math.inf)  # the largest budget's direction, at least, is known
    assert found.feasible
    assert found.margin > 0
    assert found.gap > 0.01
    lost = robust_svm(x, y, eps, p=3)
    assert not lost.feasible
    assert "solvers failed" in lost.advice


@pytest.mark.parametrize(
    ("eps", "p", "words"),
    [
        (-0.1, 2, "eps: expected a number of at least 0"),
        (math.nan, 2, "eps: expected a finite"),
        (0.1, 0.9, "p: "),
    ],
)
def test_refusals(eps, p, words):
    with pytest.raises(InputError, match=words):
        robust_svm([[1.0]], [1], eps, p=p)
    with pytest.raises(DataError):
        robust_svm([[math.nan]], [1], 0.1, p=2)


@pytest.mark.parametrize("p", [2, math.inf])
def test_mnist_zero_against_one(p, mnist):
    x, y = mnist(0, 1)
    eps = 4 / 255 if p == math.inf else 0.2
    begin = time.process_time()
    found = robust_svm(x, y, eps, p=p)
    seconds = time.process_time() - begin
    print(
        f"\nMNIST 0-vs-1, l{p}, eps = {eps:.5f}: robust l2 margin {found.margin:.10g}, "
        f"gap {found.gap:.1e}, angle bound {found.angle_bound:.1e}, {seconds:.1f} CPU s"
    )
    check_certificate(x, y, found, 1e-8)
    if p == 2:
        plain = max_margin(x, y)
        assert found.margin == pytest.approx(plain.margin - eps, rel=1e-9)
        assert np.linalg.norm(found.direction - plain.direction) < 1e-6
