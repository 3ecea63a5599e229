"""κ of Lemma 7 in closed form, by sampling, by linear programs, and where it vanishes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize

import marginflow as mf
from marginflow.errors import DataError, InputError
from marginflow.references import kappa, max_margin

Array = NDArray[np.float64]


def raised(points: Array, margin: float = 0.7, seed: int = 0) -> tuple[Array, Array]:
    """Support vectors margin·ū + p for points p around 0 across ū, turned, with random labels."""
    rng = np.random.default_rng(seed)
    d = points.shape[1] + 1
    turn, _ = np.linalg.qr(rng.normal(size=(d, d)))
    z = np.column_stack([np.full(len(points), margin), points]) @ turn.T
    y = np.where(rng.random(len(points)) < 0.5, 1.0, -1.0)
    return y[:, None] * z, y


def projected(x: Array, y: Array) -> tuple[Array, Array]:
    """The support vectors across ū, (|S|, d), and ū, by the SVM alone."""
    svm = max_margin(x, y)
    z = (y[:, None] * x)[svm.support]
    return z - np.outer(z @ svm.direction, svm.direction), svm.direction


def worst(points: Array, u: Array, xi: Array) -> float:
    """``max_i ⟨ξ, z_i⟩`` with ξ made orthogonal to ū and of length 1."""
    xi = xi - (xi @ u) * u
    return float((points @ xi).max() / np.linalg.norm(xi))


# Closed forms


@pytest.mark.parametrize(("b", "c"), [(1.0, 1.0), (0.3, 2.5), (4.0, 1e-3)])
def test_two_dimensions(b: float, c: float) -> None:
    """Across ū there are two directions: κ is the nearer of the two support vectors."""
    found = kappa([[0.7, b], [-0.7, c], [5.0, 3.0]], [1, -1, 1])
    assert found.exact
    assert found.spans
    assert found.lower == found.upper == pytest.approx(min(b, c), rel=1e-12)
    np.testing.assert_array_equal(found.support, [0, 1])


@pytest.mark.parametrize("corners", [3, 4, 5, 8, 25])
def test_a_regular_polygon(corners: int) -> None:
    """Across ū a polygon around 0: κ is the radius of the circle inside it."""
    turns = 2 * np.pi * np.arange(corners) / corners
    x, y = raised(2.0 * np.column_stack([np.cos(turns), np.sin(turns)]), seed=corners)
    found = kappa(x, y)
    assert found.exact
    assert found.lower == pytest.approx(2.0 * math.cos(math.pi / corners), rel=1e-7)


@pytest.mark.parametrize("d", [2, 3, 5, 12])
def test_a_regular_simplex(d: int) -> None:
    """d + 1 points of norm 1 with equal angles: the sphere inside has radius 1/d."""
    corners = np.eye(d + 1) - 1 / (d + 1)
    basis = np.linalg.svd(corners)[2][:d]
    points = corners @ basis.T
    x, y = raised(points / np.linalg.norm(points[0]), seed=d)
    found = kappa(x, y)
    assert found.exact
    assert found.lower == pytest.approx(1 / d, rel=1e-7)


@pytest.mark.parametrize("d", [2, 4, 7])
def test_a_cross_polytope(d: int) -> None:
    """±e_j across ū: κ = 1/√d, at the diagonals."""
    x, y = raised(np.vstack([np.eye(d), -np.eye(d)]), seed=d)
    found = kappa(x, y)
    assert found.exact
    assert found.lower == pytest.approx(1 / math.sqrt(d), rel=1e-7)


def test_bounds_where_the_facets_are_too_many() -> None:
    x, y = raised(np.vstack([np.eye(12), -np.eye(12)]), seed=1)
    found = kappa(x, y)
    assert not found.exact
    assert 0 < found.lower <= 1 / math.sqrt(12) <= found.upper * (1 + 1e-12)
    print(f"\n12 dimensions: {found.lower:.4f} ≤ κ = {1 / math.sqrt(12):.4f} ≤ {found.upper:.4f}")
    assert found.upper < 1.0 + 1e-9


# Against brute force


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("d", [3, 4, 6])
def test_sampling_never_finds_less_and_a_descent_finds_it(d: int, seed: int) -> None:
    data = mf.load(f"separable:n=14,d={d},margin=0.3,seed={seed}")
    x, y = data.x.numpy(), data.y.double().numpy()
    found = kappa(x, y)
    assert found.exact
    points, u = projected(x, y)
    assert len(points) == len(found.support) == d
    rng = np.random.default_rng(seed)
    sampled = [worst(points, u, xi) for xi in rng.normal(size=(3000, d))]
    assert min(sampled) >= found.lower * (1 - 1e-9)
    # max_i is piecewise linear on a sphere: its minima lie where d − 1 of the pieces meet.
    best = math.inf
    for left_out in range(d):
        rows = np.vstack([np.delete(points, left_out, axis=0), u])
        xi = np.linalg.lstsq(rows, np.append(np.ones(d - 1), 0.0))[0]
        best = min(best, worst(points, u, xi), worst(points, u, -xi))
    assert found.lower == pytest.approx(best, rel=1e-7)
    if d == 3:  # a circle can be searched to the end
        first, second = np.linalg.svd(u[None])[2][1:]
        turns = np.linspace(0, 2 * np.pi, 20_001)
        circle = np.outer(np.cos(turns), first) + np.outer(np.sin(turns), second)
        least = float((circle @ points.T).max(axis=1).min())
        assert 0 <= least - found.lower < 2e-3


@pytest.mark.parametrize("seed", range(4))
def test_more_support_vectors_than_dimensions(seed: int) -> None:
    """Eight points in three dimensions across ū: Qhull against a polished search."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(8, 3))
    points -= points.mean(axis=0)  # 0 inside, with multipliers 1/8
    x, y = raised(points, seed=seed)
    found = kappa(x, y)
    assert len(found.support) == 8
    across, u = projected(x, y)
    starts = rng.normal(size=(400, 4))
    starts = starts[np.argsort([worst(across, u, s) for s in starts])[:25]]
    polished = min(
        minimize(
            lambda xi: worst(across, u, xi), s, method="Nelder-Mead",
            options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000},
        ).fun
        for s in starts
    )  # fmt: skip
    print(f"\nκ = {found.lower:.8f}, search {polished:.8f}")
    assert found.lower == pytest.approx(polished, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_bounds_contain_the_exact_value(seed: int) -> None:
    """The linear programs of the ∞-norm, written here, sandwich the enumeration."""
    data = mf.load(f"separable:n=14,d=5,margin=0.3,seed={seed}")
    x, y = data.x.numpy(), data.y.double().numpy()
    found = kappa(x, y)
    across, u = projected(x, y)
    basis = np.linalg.svd(u[None])[2][1:]
    points = across @ basis.T
    least = math.inf
    for j in range(4):
        for sign in (-1.0, 1.0):
            bounds = [(-1.0, 1.0)] * 4 + [(None, None)]
            bounds[j] = (sign, sign)
            table = np.column_stack([points, -np.ones(len(points))])
            solved = linprog([0, 0, 0, 0, 1], A_ub=table, b_ub=np.zeros(len(points)), bounds=bounds)
            least = min(least, float(solved.fun))
    # ‖ξ‖_∞ ≤ ‖ξ‖₂ ≤ 2 ‖ξ‖_∞ in four dimensions
    assert least / 2 - 1e-9 <= found.lower <= least + 1e-9


# What it does under changes of the data


def test_scale_rotation_and_labels() -> None:
    data = mf.load("separable:n=14,d=4,margin=0.3")
    x, y = data.x.numpy(), data.y.double().numpy()
    value = kappa(x, y).lower
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    assert kappa(3 * x, y).lower == pytest.approx(3 * value, rel=1e-8)
    assert kappa(x @ turn.T, y).lower == pytest.approx(value, rel=1e-8)
    assert kappa(-x, -y).lower == pytest.approx(value, rel=1e-8)
    more = np.vstack([x, 10 * (y @ x)[None]])  # far from the margin: it holds nothing up
    assert kappa(more, np.append(y, 1.0)).lower == pytest.approx(value, rel=1e-8)


# Where it is 0, or not defined


def test_too_few_support_vectors() -> None:
    found = kappa([[1.0, 0.5, 0.0], [1.0, -0.5, 0.0]], [1, 1])
    assert not found.spans
    assert found.lower == -math.inf
    assert found.upper <= 0.0


def test_a_support_vector_without_multiplier_leaves_nothing() -> None:
    found = kappa([[1.0, 0.0], [1.0, 1.0]], [1, 1])
    assert found.lower == pytest.approx(0.0, abs=1e-9)


def test_one_dimension_has_no_orthogonal_direction() -> None:
    assert kappa([[1.0], [-2.0]], [1, -1]).lower == math.inf


def test_refusals() -> None:
    with pytest.raises(InputError, match="separable"):
        kappa([[1.0, 0.0], [1.0, 0.0]], [1, -1])
    with pytest.raises(DataError, match="labels"):
        kappa([[1.0, 0.0]], [2])
