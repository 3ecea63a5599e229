from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.svm import SVC

from marginflow.datasets import load, separable
from marginflow.errors import InputError


def max_margin_by_nnls(z: np.ndarray) -> tuple[float, np.ndarray]:
    """min ‖w‖ with ⟨w, z_i⟩ >= 1 by Lawson and Hanson's reduction to non-negative least squares.

    With E = (Zᵀ; 1ᵀ), f = e_{d+1} and the residual r = E a − f of the least a >= 0,
    w = −r_{1..d} / r_{d+1}; the margin is 1/‖w‖.
    """
    n, d = z.shape
    E = np.vstack([z.T, np.ones(n)])
    f = np.zeros(d + 1)
    f[d] = 1
    a, _ = nnls(E, f)
    r = E @ a - f
    w = -r[:d] / r[d]
    return 1 / np.linalg.norm(w), w / np.linalg.norm(w)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_maximum_margin_is_the_promised_one(data):
    n = data.draw(st.integers(1, 80), "n")
    d = data.draw(st.integers(2, 40), "d")
    most = min(n, d)
    supports = data.draw(st.none() | st.integers(min(2, most), most), "supports")
    margin = data.draw(st.floats(1e-3, 10), "margin")
    made = separable(n, d, margin, data.draw(st.integers(0, 2**32), "seed"), supports)
    z = (made.y[:, None] * made.x).numpy()
    u = made.max_margin_direction.numpy()

    assert made.max_margin == margin
    assert np.linalg.norm(u) == pytest.approx(1, abs=1e-14)
    assert (z @ u).min() == pytest.approx(margin, abs=1e-14)
    value, direction = max_margin_by_nnls(z)
    assert value == pytest.approx(margin, rel=1e-6, abs=1e-9)
    assert np.abs(direction - u).max() < 1e-6


@pytest.mark.parametrize("options", [{}, {"n": 200, "d": 5, "margin": 0.5}, {"n": 12, "d": 50}])
def test_against_a_support_vector_machine(options):
    """Doubling every z to (z, +1), (−z, −1) makes the machine's intercept vanish."""
    made = separable(**options)
    z = (made.y[:, None] * made.x).numpy()
    labels = np.repeat([1, -1], len(z))
    machine = SVC(kernel="linear", C=1e8, tol=1e-10).fit(np.vstack([z, -z]), labels)
    w = machine.coef_[0]
    assert abs(machine.intercept_[0]) < 1e-6
    assert 1 / np.linalg.norm(w) == pytest.approx(made.max_margin, rel=1e-6)
    # A relative error δ of the optimal ‖w‖ leaves the direction an error of order √δ.
    assert np.abs(w / np.linalg.norm(w) - made.max_margin_direction.numpy()).max() < 1e-4


@pytest.mark.parametrize("supports", [2, 3, 11, 20])
def test_number_of_support_points(supports):
    made = separable(n=60, d=20, supports=supports)
    heights = (made.y[:, None] * made.x) @ made.max_margin_direction
    places = (heights < made.max_margin + 1e-12).nonzero().flatten().tolist()
    assert len(places) == supports
    assert places != list(range(supports))  # shuffled among the others


@pytest.mark.parametrize(
    ("n", "d", "expected"), [(60, 20, 20), (10, 20, 5), (3, 2, 2), (2, 9, 2), (1, 2, 1)]
)
def test_default_number_of_support_points(n, d, expected):
    made = separable(n=n, d=d)
    heights = (made.y[:, None] * made.x) @ made.max_margin_direction
    assert int((heights < made.max_margin + 1e-12).sum()) == expected


def test_a_single_example_lies_on_the_direction():
    made = separable(n=1, d=3, margin=0.25)
    expected = made.y * 0.25 * made.max_margin_direction
    torch.testing.assert_close(made.x[0], expected, rtol=0, atol=1e-16)


def test_shape_type_and_scale():
    made = separable(n=400, d=100, margin=0.1)
    assert made.x.shape == (400, 100)
    assert made.x.dtype == torch.float64
    assert made.binary
    assert made.test is None
    assert made.bounds is None
    u = made.max_margin_direction
    across = made.x - (made.x @ u)[:, None] * u
    assert across.norm(dim=1).square().mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n", [2, 5, 60, 61])
def test_labels_are_balanced_and_shuffled(n):
    sums = {int(separable(n=n, seed=seed).y.sum()) for seed in range(5)}
    assert sums <= {-1, 0, 1}
    firsts = {int(separable(n=n, seed=seed).y[0]) for seed in range(20)}
    assert firsts == {-1, 1}


def test_the_seed_decides():
    assert separable(seed=3).fingerprint() == separable(seed=3).fingerprint()
    assert separable(seed=3).fingerprint() != separable(seed=4).fingerprint()


def test_the_specification_string_says_the_same():
    made = separable(n=30, d=6, margin=0.25, seed=5, supports=4)
    loaded = load("separable:n=30, d=6, margin=1/4, seed=5, supports=4")
    assert loaded.fingerprint() == made.fingerprint()
    assert loaded.max_margin == 0.25
    assert load(made.name).fingerprint() == made.fingerprint()
    assert load("separable").fingerprint() == load(separable().name).fingerprint()


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": 2.5},
        {"d": 1},
        {"margin": 0},
        {"margin": -1.0},
        {"margin": float("inf")},
        {"margin": float("nan")},
        {"seed": -1},
        {"supports": 1},
        {"supports": 21},
        {"n": 5, "supports": 6},
        {"n": 1, "supports": 2},
    ],
)
def test_refuses_arguments_out_of_range(options):
    with pytest.raises(InputError, match=f"{list(options)[-1]}: expected"):
        separable(**options)
