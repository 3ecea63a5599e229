"""The other linear networks' limits against closed forms, enumeration and the networks' flow."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import linprog

from marginflow.errors import InputError
from marginflow.references import (
    convolutional_limit,
    diagonal_limit,
    largest_feasible_eps,
    robust_svm,
)
from marginflow.references.predictor_space import real_fourier

EXPONENTS = [1, 1.5, 2, 3, math.inf]
BOTH = pytest.mark.parametrize("limit", [diagonal_limit, convolutional_limit])


def dual(p):
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def quasi_norm(limit, w, depth):
    moduli = np.abs(w if limit is diagonal_limit else np.fft.fft(w, norm="ortho"))
    return float(np.sum(moduli ** (2 / depth)) ** (depth / 2))


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_the_real_fourier_basis_is_the_unitary_transform(d):
    basis, groups = real_fourier(d)
    np.testing.assert_allclose(basis @ basis.T, np.eye(d), atol=1e-14)
    w = np.random.default_rng(d).normal(size=d)
    spectrum = np.abs(np.fft.fft(w, norm="ortho"))
    moduli = [np.linalg.norm(basis[rows] @ w) / math.sqrt(len(rows)) for rows in groups]
    np.testing.assert_allclose(moduli, spectrum[: len(groups)], atol=1e-14)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("p", EXPONENTS)
def test_closed_form_scaled_axes(p, depth):
    """z_j = a_j e_j: the least w is least in every coordinate, hence for every depth."""
    a = np.array([0.7, 2.0, 1.1])
    size = np.linalg.norm(1 / a, dual(p))
    eps = 0.5 / size
    found = diagonal_limit(np.diag(a), np.ones(3), depth=depth, eps=eps, p=p)
    np.testing.assert_allclose(found.weights, 2 / a, rtol=1e-6)
    assert found.quasi_norm == pytest.approx(quasi_norm(diagonal_limit, 2 / a, depth), rel=1e-6)
    assert found.local == (depth > 2)


@BOTH
@pytest.mark.parametrize("p", EXPONENTS)
def test_one_layer_is_the_robust_svm(limit, p, separable):
    x, y = separable(1, 12, 5)
    eps = 0.5 * largest_feasible_eps(x, y, p=p)
    found = limit(x, y, depth=1, eps=eps, p=p)
    np.testing.assert_allclose(found.weights, robust_svm(x, y, eps, p=p).weights, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("p", EXPONENTS)
def test_certificate(limit, p, depth, separable):
    """Feasible; the norm is what it says; and nearby feasible predictors cost no less."""
    x, y = separable(2, 15, 6)
    eps = 0.4 * largest_feasible_eps(x, y, p=p)
    found = limit(x, y, depth=depth, eps=eps, p=p)
    q = dual(p)
    z = y[:, None] * x
    assert (z @ found.weights).min() - eps * np.linalg.norm(found.weights, q) == pytest.approx(1)
    assert found.quasi_norm == pytest.approx(quasi_norm(limit, found.weights, depth), rel=1e-5)
    assert -1e-12 <= found.gap < 1e-8
    rng = np.random.default_rng(0)
    for size in 10.0 ** rng.uniform(-6, 0 if depth == 2 else -2, size=300):
        w = found.weights + size * rng.normal(size=6)
        margin = (z @ w).min() - eps * np.linalg.norm(w, q)
        if margin > 0:
            assert quasi_norm(limit, w / margin, depth) >= found.quasi_norm * (1 - 1e-8)


def test_two_layers_diagonal_is_a_linear_program(separable):
    """ε = 0: basis pursuit, by HiGHS. ε > 0 and p = ∞: ``<w, z> − ε‖w‖_1 >= 1`` is linear too."""
    for seed, eps in itertools.product(range(4), (0.0, 0.1)):
        x, y = separable(seed, 10, 6)
        z = y[:, None] * x
        table = np.hstack([-z + eps, z + eps])
        solution = linprog(np.ones(12), A_ub=table, b_ub=-np.ones(10))
        found = diagonal_limit(x, y, depth=2, eps=eps, p=math.inf)
        assert found.quasi_norm == pytest.approx(solution.fun, rel=1e-8)
        np.testing.assert_allclose(found.weights, solution.x[:6] - solution.x[6:], atol=1e-6)


def test_two_layers_convolutional_in_two_dimensions_is_a_linear_program(separable):
    """d = 2: ŵ = (w_0 ± w_1)/√2 is real."""
    turn = np.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    x, y = separable(3, 10, 2)
    found = convolutional_limit(x, y)
    turned = diagonal_limit(x @ turn, y)
    np.testing.assert_allclose(found.weights, turn @ turned.weights, rtol=1e-7)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_circular_shift_of_the_data_shifts_the_filter(depth, separable):
    x, y = separable(4, 10, 7)
    found = convolutional_limit(x, y, depth=depth, eps=0.1)
    shifted = convolutional_limit(np.roll(x, 2, axis=1), y, depth=depth, eps=0.1)
    np.testing.assert_allclose(shifted.weights, np.roll(found.weights, 2), atol=1e-5)


def test_how_often_the_local_solution_is_the_best(separable):
    """ε = 0, d = 4: a cost concave on orthants is least at a vertex, and there are few."""
    hits = 0
    for seed in range(8):
        x, y = separable(seed, 6, 4)
        walls = np.vstack([y[:, None] * x, np.eye(4)])
        heights = np.append(np.ones(6), np.zeros(4))
        costs = []
        for chosen in itertools.combinations(range(10), 4):
            w = np.linalg.lstsq(walls[list(chosen)], heights[list(chosen)])[0]
            if (walls[:6] @ w).min() > 1 - 1e-9:
                costs.append(quasi_norm(diagonal_limit, w, 4))
        found = diagonal_limit(x, y, depth=4)
        nearest = min(costs, key=lambda cost: abs(cost - found.quasi_norm))
        assert found.quasi_norm == pytest.approx(nearest, rel=1e-3)  # a vertex
        assert found.quasi_norm >= min(costs) * (1 - 1e-6)
        hits += found.quasi_norm <= min(costs) * (1 + 1e-3)
    print(f"\ndiagonal, L = 4: the local solution is the global one in {hits} of 8")
    assert hits >= 3


def parameter_flow(limit, x, y, factors, eps, log_times):
    """The flow of the factors u_1 … u_L themselves, ``w = u_1 ⊙ … `` or ``u_1 ⋆ …``, ℓ2 attack."""
    z, (depth, d) = y[:, None] * x, factors.shape
    circulant = (np.arange(d)[:, None] - np.arange(d)[None]) % d

    def matrix(u):
        """The matrix of multiplication by u: diagonal, or circulant."""
        return np.diag(u) if limit is diagonal_limit else u[circulant]

    def others(u, k):
        result = np.eye(d)
        for j in range(depth):
            if j != k:
                result = result @ matrix(u[j])
        return result

    def product(flat):
        u = flat.reshape(depth, d)
        return others(u, 0) @ u[0]

    def field(s, flat):
        u, w = flat.reshape(depth, d), product(flat)
        r = np.linalg.norm(w)
        pull = np.exp(np.minimum(s - (z @ w - eps * r), 600.0)) / len(z)
        move = pull @ (z - eps * w / r)
        return np.concatenate([others(u, k).T @ move for k in range(depth)])

    solution = solve_ivp(
        field, (0, log_times[-1]), factors.ravel(), t_eval=log_times, method="BDF",
        rtol=1e-7, atol=1e-9,
    )  # fmt: skip
    assert solution.success, solution.message
    return np.array([product(column) for column in solution.y.T])


@pytest.mark.parametrize(
    ("limit", "eps", "seed"),
    [
        (diagonal_limit, 0.0, 36),
        (diagonal_limit, 0.3, 44),
        (convolutional_limit, 0.0, 40),
        (convolutional_limit, 0.3, 26),
    ],
)
def test_the_networks_go_there(limit, eps, seed, separable):
    """Two layers, trained by gradient flow under the exact ℓ2 adversary."""
    x, y = separable(seed, 8, 4)
    factors = np.random.default_rng(0).normal(size=(2, 4)) * 0.5
    weights = parameter_flow(limit, x, y, factors, eps, np.array([1e2, 1e3, 1e4]))
    directions = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    found = limit(x, y, depth=2, eps=eps)
    away = np.linalg.norm(directions - found.direction, axis=1)
    plain = np.linalg.norm(found.direction - robust_svm(x, y, eps, p=2).direction)
    print(f"\n{limit.__name__}, eps = {eps}: distance {away}; of the l2 SVM {plain:.3f}")
    assert plain > 0.25
    assert np.all(away[1:] < away[:-1] / 3)
    assert away[-1] < 5e-4


@pytest.mark.parametrize(
    ("limit", "eps", "seed"),
    [(diagonal_limit, 0.0, 11), (diagonal_limit, 0.3, 11), (convolutional_limit, 0.0, 16)],
)
def test_what_is_off_the_support_dies_at_a_power_of_log_t(limit, eps, seed, separable):
    """Like (ln t)^{−(1 − g)}, g the largest dual modulus off the support over that on it."""
    x, y = separable(seed, 8, 4)
    found = limit(x, y, depth=2, eps=eps)
    pull = found.multipliers @ (y[:, None] * x) - eps * found.direction
    moduli = np.abs(pull if limit is diagonal_limit else np.fft.rfft(pull, norm="ortho"))
    g = np.delete(moduli / moduli.max(), found.active).max()
    assert 0.1 < g < 0.9
    factors = np.random.default_rng(0).normal(size=(2, 4)) * 0.5
    log_times = np.array([1e3, 1e4])
    weights = parameter_flow(limit, x, y, factors, eps, log_times)
    directions = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    away = np.linalg.norm(directions - found.direction, axis=1)
    slope = math.log(away[1] / away[0]) / math.log(10)
    print(f"\n{limit.__name__}, eps = {eps}: exponent {slope:.4f}, predicted {g - 1:.4f}")
    assert slope == pytest.approx(g - 1, abs=0.015)


@BOTH
def test_three_layers_go_to_a_stationary_point(limit, separable):
    x, y = separable(5, 5, 4)
    factors = np.random.default_rng(1).normal(size=(3, 4)) * 0.5
    weights = parameter_flow(limit, x, y, factors, 0.2, np.array([1e4]))[0]
    found = limit(x, y, depth=3, eps=0.2, start=weights)
    distance = np.linalg.norm(weights / np.linalg.norm(weights) - found.direction)
    print(f"\n{limit.__name__}, L = 3: distance to the stationary point below it {distance:.1e}")
    assert found.gap < 1e-8
    assert distance < 0.05


def test_infeasible_is_a_value():
    found = diagonal_limit(np.eye(2), [1, 1], eps=2.0)
    assert not found.feasible
    assert found.margin == 0
    assert "reduce it" in found.advice


@BOTH
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 0}, "depth"),
        ({"eps": -0.1}, "eps"),
        ({"p": 0.5}, "p:"),
        ({"depth": 2, "start": [1.0, 1.0]}, "depth > 2"),
        ({"depth": 3, "start": [-1.0, 1.0]}, "positive adversarial margins"),
    ],
)
def test_refusals(limit, options, words):
    with pytest.raises(InputError, match=words):
        limit(np.eye(2), [1, 1], **options)
