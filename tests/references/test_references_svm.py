"""max_margin against closed forms, a grid, other libraries and its own certificate."""

import math
import time

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from sklearn.svm import SVC

from marginflow.errors import DataError, InputError
from marginflow.references import max_margin, svm

EXPONENTS = [1, 1.3, 2, 3, 7.5, math.inf]


def dual(p):
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def check_certificate(x, y, found, tolerance):
    """Both sides of the answer, recomputed one example at a time."""
    q = dual(found.p)
    margins = [float(np.dot(yi * xi, found.direction)) for xi, yi in zip(x, y, strict=True)]
    point = sum(a * yi * xi for a, xi, yi in zip(found.multipliers, x, y, strict=True))
    scale = max(np.linalg.norm(xi, found.p) for xi in x)
    assert found.multipliers.min() >= 0
    assert found.multipliers.sum() == pytest.approx(1, abs=1e-12)
    assert np.linalg.norm(point, found.p) == pytest.approx(found.dual_value, abs=1e-13 * scale)
    assert -1e-12 <= found.gap <= tolerance
    if found.separable:
        assert np.linalg.norm(found.direction, q) == pytest.approx(1, abs=1e-12)
        assert min(margins) == pytest.approx(found.margin, abs=1e-13 * scale)
        assert found.margin > 0
        nearest = np.flatnonzero(np.array(margins) <= found.margin * (1 + 1e-7))
        np.testing.assert_array_equal(found.support, nearest)
    else:
        assert found.margin == 0
        assert not found.direction.any()


@pytest.mark.parametrize("p", EXPONENTS)
def test_closed_form_scaled_axes(p):
    """z_j = a_j e_j: u_j ∝ 1/a_j and γ = 1/‖1/a‖_q."""
    a = np.array([0.7, 2.0, 5.0, 1.1])
    y = np.array([1.0, -1.0, -1.0, 1.0])
    found = max_margin(np.diag(a * y), y, p=p)
    q = dual(p)
    assert found.margin == pytest.approx(1 / np.linalg.norm(1 / a, q), rel=1e-10)
    if p != 1:  # for p = 1 the larger examples leave slack, and u is not unique
        unit = 1 / a / np.linalg.norm(1 / a, q)
        np.testing.assert_allclose(found.direction, unit, atol=1e-6)
    check_certificate(np.diag(a * y), y, found, 1e-9)


@pytest.mark.parametrize("p", EXPONENTS)
def test_closed_form_single_example(p):
    x = np.array([[3.0, -4.0, 0.0]])
    found = max_margin(x, [-1], p=p)
    assert found.margin == pytest.approx(np.linalg.norm(x[0], p), rel=1e-10)
    np.testing.assert_array_equal(found.support, [0])


@pytest.mark.parametrize("p", EXPONENTS)
def test_a_grid_of_directions_in_the_plane(p, separable):
    x, y = separable(1, 12, 2)
    angles = np.linspace(0, 2 * np.pi, 200_001)
    grid = np.stack([np.cos(angles), np.sin(angles)])
    grid /= np.linalg.norm(grid, dual(p), axis=0)
    best = float((y[:, None] * (x @ grid)).min(axis=0).max())
    found = max_margin(x, y, p=p)
    assert best <= found.margin * (1 + 1e-9)
    assert found.margin == pytest.approx(best, rel=2e-4)


@pytest.mark.parametrize(("n", "d"), [(40, 5), (30, 60), (3000, 20)])
@pytest.mark.parametrize("p", EXPONENTS)
def test_certificate(n, d, p, separable):
    if n == 3000 and p not in (1, 2, math.inf):
        n = 600
    x, y = separable(2, n, d)
    check_certificate(x, y, max_margin(x, y, p=p), 1e-10 if p in (1, 2, math.inf) else 1e-7)


def test_euclidean_gap_is_rounding(separable):
    gaps = [max_margin(*separable(seed, 50, 8)).gap for seed in range(20)]
    print(f"\nlargest gap of 20 SVMs (n = 50, d = 8): {max(gaps):.1e}")
    assert max(gaps) < 1e-13


def test_two_other_libraries_agree(separable):
    for seed in range(5):
        x, y = separable(seed, 40, 6)
        found = max_margin(x, y)
        w = cp.Variable(6)
        cp.Problem(cp.Minimize(cp.sum_squares(w)), [cp.multiply(y, x @ w) >= 1]).solve(
            solver="CLARABEL"
        )
        assert found.margin == pytest.approx(1 / np.linalg.norm(w.value), rel=1e-7)
        # scikit-learn's machine has a bias; mirrored data make it vanish
        machine = SVC(kernel="linear", C=1e9, tol=1e-8)
        machine.fit(np.vstack([x, -x]), np.concatenate([y, -y]))
        weights = machine.coef_[0]
        assert abs(machine.intercept_[0]) < 1e-6
        assert found.margin == pytest.approx(1 / np.linalg.norm(weights), rel=1e-5)
        assert np.dot(weights, found.direction) / np.linalg.norm(weights) > 1 - 1e-9


def test_the_angle_bound_holds():
    x = np.array([[1.0, 2.0], [1.0, -0.5]])
    found = max_margin(x, [1, 1])
    angle = math.acos(min(found.direction[0], 1.0))  # the exact direction is e_1
    assert angle <= found.angle_bound <= 1e-7
    assert max_margin(x, [1, 1], p=1).angle_bound == math.pi


@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), d=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_separability_is_what_a_linear_program_says(seed, n, d):
    """Small integers: repeated, zero and collinear examples, and many that are not separable."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, size=(n, d)).astype(float)
    y = rng.choice([-1.0, 1.0], size=n)
    margins_of_one = linprog(
        np.zeros(d), A_ub=-y[:, None] * x, b_ub=-np.ones(n), bounds=[(None, None)] * d
    )
    for p in (1, 2, math.inf):
        found = max_margin(x, y, p=p)
        assert found.separable == (margins_of_one.status == 0)
        if x.any():
            check_certificate(x, y, found, 1e-10)


@given(seed=st.integers(0, 10_000), power=st.integers(-60, 60))
@settings(max_examples=30, deadline=None)
def test_laws(seed, power):
    """Scaling x scales the margin, rotating x turns u, repeating x changes nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(15, 3)) + 2.0
    y = np.ones(15)
    x[:5] *= -1
    y[:5] *= -1
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    found = max_margin(x, y)
    if not found.separable:
        return
    scaled = max_margin(x * 2.0**power, y)
    assert scaled.margin == pytest.approx(found.margin * 2.0**power, rel=1e-12)
    turned = max_margin(x @ rotation.T, y)
    assert turned.margin == pytest.approx(found.margin, rel=1e-11)
    np.testing.assert_allclose(turned.direction, rotation @ found.direction, atol=1e-9)
    twice = max_margin(np.vstack([x, x]), np.concatenate([y, y]))
    assert twice.margin == pytest.approx(found.margin, rel=1e-12)


def test_inseparable_data_are_a_value():
    found = max_margin([[1.0, 0.0], [1.0, 0.0]], [1, -1])
    assert not found.separable
    assert found.margin == 0
    assert found.gap < 1e-15
    nothing = max_margin(np.zeros((2, 2)), [1, -1])
    assert not nothing.separable
    assert nothing.gap == 0


def test_a_cycling_least_squares_solver_is_replaced(monkeypatch, separable):
    x, y = separable(3, 30, 4)
    expected = max_margin(x, y).margin

    def cycles(*_, **__):
        raise RuntimeError("too many iterations")

    monkeypatch.setattr(svm, "nnls", cycles)
    assert max_margin(x, y).margin == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "p", "error", "words"),
    [
        ([[1.0, math.nan]], [1], 2, DataError, "x: expected finite"),
        ([[1.0, math.inf]], [1], 2, DataError, "x: expected finite"),
        ([1.0, 2.0], [1], 2, DataError, "flatten each example"),
        (np.empty((0, 3)), [], 2, DataError, "got \\(0, 3\\)"),
        ([["a"]], [1], 2, DataError, "real numbers"),
        ([[1.0]], [1, 1], 2, DataError, "one label a row"),
        ([[1.0], [2.0]], [0, 1], 2, DataError, "got 0 at position 0; map"),
        ([[1.0]], [math.nan], 2, DataError, "y: expected finite"),
        ([[1.0]], [1], 0.5, InputError, "at least 1"),
        ([[1.0]], [1], math.nan, InputError, "finite"),
        ([[1.0]], [1], "2", InputError, "expected a number"),
    ],
)
def test_refusals(x, y, p, error, words):
    with pytest.raises(error, match=words):
        max_margin(x, y, p=p)


def test_mnist_zero_against_one(mnist):
    x, y = mnist(0, 1)
    assert x.shape == (12665, 784)
    known = {2: (0.36387, 0.36430), math.inf: (8.245 / 255, 8.255 / 255)}
    for p in (2, math.inf, 1):
        begin = time.process_time()
        found = max_margin(x, y, p=p)
        seconds = time.process_time() - begin
        print(
            f"\nMNIST 0-vs-1, l{p}: margin {found.margin:.12g} ({found.margin * 255:.6g}/255), "
            f"gap {found.gap:.1e}, {len(found.support)} support vectors, {seconds:.1f} CPU s"
        )
        assert found.gap < 1e-11
        if p in known:
            assert known[p][0] <= found.margin <= known[p][1]
        assert seconds < 60


def test_mnist_three_against_eight_is_not_separable(mnist):
    """485 of the images have integer rank 484, and their one relation has positive weights."""
    found = max_margin(*mnist(3, 8))
    print(f"\nMNIST 3-vs-8: a hull point of norm {found.dual_value:.1e}, separable: no")
    assert not found.separable
    assert found.dual_value < 1e-12


def test_mnist_two_against_seven(mnist):
    x, y = mnist(2, 7)
    for p, low, high in ((2, 0.0203013, 0.0203014), (math.inf, 0.325 / 255, 0.335 / 255)):
        found = max_margin(x, y, p=p)
        print(f"\nMNIST 2-vs-7, l{p}: margin {found.margin:.10g} ({found.margin * 255:.6g}/255)")
        assert low <= found.margin <= high
        assert found.gap < 1e-9
