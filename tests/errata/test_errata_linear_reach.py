"""Section 3.1 and Appendix A: corrections that change what a statement may be applied to."""

from __future__ import annotations

import math

import numpy as np
import pytest
from errata_linear import (
    Array,
    descend,
    layer_gradients,
    logistic,
    margins,
    predictor_gradient,
    product,
    slopes,
)
from scipy.integrate import solve_ivp
from scipy.special import lambertw

from marginflow.references import kappa, max_margin, reduced_flow, robust_svm
from marginflow.training import smoothness

ONE = np.array([[0.6, 0.8]])
"""One signed example of length 1: γ_m = 1 and ū is the example."""
WEDGE = np.array([[1.0, 3.0], [1.0, -3.0]])
"""Two support vectors: ū = (1, 0), γ_m = 1, κ = 3."""


def test_eq_8_and_eq_142_must_be_strict() -> None:
    start = [np.array([[0.6, 0.8], [0.1, -0.2]]), np.array([[0.5, 0.2]])]
    # ε = γ_m, which (8) admits: no weights at all have a positive adversarial margin
    rng = np.random.default_rng(0)
    for w in rng.normal(size=(200, 2)):
        assert margins(w, ONE, 1.0)[0] <= 1e-15
        assert float(ONE[0] @ w) - 0.8 * np.abs(w).sum() <= 1e-15  # (142): γ_{m,1} = 0.8
    stuck = descend(start, ONE, 1.0, 0.5, 3000)
    assert min(stuck.losses) >= math.log(2) - 1e-15  # no loss below ℓ(0), ever
    sizes = [max(float(np.linalg.norm(w)) for w in at) for at in stuck.layers]
    assert max(sizes) == sizes[0]  # Lemma 1 says that they grow without bound
    # ε < γ_m
    free = descend(start, ONE, 0.9, 0.5, 3000)
    assert free.losses[-1] < 0.1 * math.log(2)
    assert float(np.linalg.norm(free.layers[-1][0])) > 5 * sizes[0]
    print(f"\nε = γ: L = {stuck.losses[-1]:.6f}; ε = 0.9 γ: L = {free.losses[-1]:.4f}")


def test_lemma_6_needs_a_small_step() -> None:
    eps, start = 0.5, [np.array([[4.0]]), np.array([[0.5]])]
    z = np.array([[1.0]])

    def excess(eta: float, steps: int) -> float:
        """Left side of Lemma 6 minus its right side, at its worst."""
        path = descend(start, z, eps, eta, steps)
        gaps = [abs(float(np.sum(a**2) - np.sum(b**2))) for a, b in path.layers]
        return max(gaps) - 2 * path.losses[0] - gaps[0]

    large = excess(20.0, 1)
    print(f"\nη = 20: exceeds by {large:.2f}")
    assert large > 50
    # On S(r) around the path, η = min(1, 1/β*)
    eta = min(1.0, 1 / smoothness(2, 5.0, 1.9, eps))
    path = descend(start, z, eps, eta, 2000)
    assert max(float(np.abs(w).max()) for at in path.layers for w in at) <= 5.0
    assert min(float(np.abs(product(at)).max()) for at in path.layers) >= 1.9
    assert excess(eta, 2000) <= 0


def test_theorem_2_assumes_support_vectors_that_span() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3)), np.array([1, -1])  # from a continuous distribution, separable
    found = kappa(x, y)
    # Two examples cannot hold ū in three dimensions: the direction across both is free.
    z = x * y[:, None]
    free = np.cross(z[0], z[1])
    svm = max_margin(x, y)
    assert abs(float(free @ svm.direction)) < 1e-12
    assert np.abs(z @ free).max() < 1e-12  # so κ ≤ 0, and φ = 2n/(eκ) means nothing
    assert found.upper <= 0
    assert not found.spans
    # The theorem's conclusion is seen all the same, so it is the proof that needs κ > 0.
    start = svm.direction + 0.5 * free / np.linalg.norm(free)
    path = reduced_flow(x, y, start, depth=2, eps=0.2 * svm.margin, log_times=[1.0, 1e2, 1e5])
    sines = [
        float(np.linalg.norm(np.cross(w, svm.direction) / np.linalg.norm(w))) for w in path.weights
    ]
    print(f"\nsine of the angle to ū at ln t = 1, 1e2, 1e5: {sines}")
    assert sines[0] > 0.1
    assert sines[-1] < 1e-3
    # With support vectors that span, κ > 0, here by brute force over the circle across ū
    wide = np.array([[1.0, 0.5, 0.2], [1.0, -0.6, 0.3], [1.0, 0.1, -0.7], [3.0, 1.0, 1.0]])
    held = kappa(wide, [1, 1, 1, 1])
    turn = np.linspace(0, 2 * math.pi, 200_001)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    brute = (wide[:3, 1:] @ circle).max(axis=0).min()
    assert brute > 0.1
    assert held.lower == pytest.approx(brute, rel=1e-4)


def push_back(w: Array, z: Array, eps: float) -> float:
    """``⟨P⊥W_1, ∂L̃/∂W_1⟩ = ⟨P⊥W_Π, ∇g(W_Π)⟩`` for ū = (1, 0, …)."""
    across = w.copy()
    across[0] = 0
    return float(across @ predictor_gradient(w, z, eps, slopes(margins(w, z, eps))))


def test_eq_59_needs_separation_but_lemma_8_does_not() -> None:
    n, k, eps = 2, 3.0, 0.9
    phi = 2 * n / (math.e * k)
    w = np.array([0.1, 5.0])
    # ⟨W_Π, ū⟩ ≥ 0 and ‖P⊥W_Π‖ ≥ φ, as Lemma 8 asks
    assert w[0] >= 0
    assert w[1] >= phi
    j = WEDGE[1]
    assert -w[1] * j[1] >= k * w[1]  # x_j, the support vector that the proof chooses …
    assert w[1] * j[1] < 0  # … whose inner product (59) takes to be positive
    weight = float(slopes(margins(w, WEDGE, eps))[1])
    tilt = eps * float(np.linalg.norm(w)) - w[0]
    left = weight * k * w[1] / n
    printed = k / (2 * n) * w[1] * math.exp(tilt)
    print(
        f"\n(59): left {left:.3f}, right {printed:.1f}, Lemma 8's product {push_back(w, WEDGE, eps):.3f}"
    )
    assert printed > 10 * left  # (59) fails: γ⟨W_Π, ū⟩ < ε‖W_Π‖
    far = np.array([60.0, 5.0])
    tilt = eps * float(np.linalg.norm(far)) - far[0]
    assert tilt < 0
    weight = float(slopes(margins(far, WEDGE, eps))[1])
    assert weight >= math.exp(tilt) / 2  # (59), divided by κ‖P⊥W_Π‖/n
    # Lemma 8 itself, and the bound that proves it where (59) fails
    rng, fewest = np.random.default_rng(2), 0
    dip = float(lambertw(1 / math.e).real)  # max_m m/(1 + e^m)
    for _ in range(3000):
        extra = np.stack([1 + rng.exponential(size=3), 5 * rng.normal(size=3)], axis=1)
        z = np.vstack([WEDGE, extra])
        phi, eps = 2 * len(z) / (math.e * k), rng.uniform(0, 1)
        w = np.array([rng.exponential() * 10 ** rng.uniform(-2, 2), 0.0])
        w[1] = phi * (1 + 10 ** rng.uniform(-6, 1)) * rng.choice([-1, 1])
        value = push_back(w, z, eps)
        assert value >= -1e-14
        tilt = eps * float(np.linalg.norm(w)) - w[0]
        if tilt > 0:
            fewest += 1
            bound = ((k * abs(w[1]) + tilt) / 2 - (len(z) - 1) * dip) / len(z)
            assert value >= bound > 0
    assert fewest > 500


def test_eqs_66_to_68_mix_the_product_and_the_first_layer() -> None:
    layers = [np.array([[1.0, 0.2], [0.3, 5.0]]), np.array([[1.0, 0.0]])]
    phi = 4 / (3 * math.e)

    def across(w: Array) -> float:
        return float(np.linalg.norm(w[..., 1]))  # ū = (1, 0)

    assert across(product(layers)) < phi / 2  # and yet
    step = 1 / smoothness(2, 6.0, 0.9, 0.2) * 6.0 * 1.2  # μ
    assert across(layers[0]) > 4 * (phi + step)  # (68) takes ‖P⊥W_1‖ to be at most φ + μ

    # Right: ‖P⊥W_1‖ ≤ ‖P⊥W_Π‖/‖q‖ + ‖(I − q̂ᵀq̂)W_1‖ with q = W_L ⋯ W_2, and Eq. (36) bounds the rest
    def rest(first: Array, second: Array) -> Array:
        unit = second / np.linalg.norm(second)
        return np.asarray(first - unit.T @ (unit @ first))

    balance = layers[1].T @ layers[1] - layers[0] @ layers[0].T

    def flow(_: float, flat: Array) -> Array:
        now = [flat[:4].reshape(2, 2), flat[4:].reshape(1, 2)]
        p = product(now)[0]
        m = margins(p, WEDGE, 0.2)
        weights = slopes(m) / logistic(m)  # the clock ds = L dt
        g = layer_gradients(now, predictor_gradient(p, WEDGE, 0.2, weights))
        return np.concatenate([-w.reshape(-1) for w in g])

    flat = np.concatenate([w.reshape(-1) for w in layers])
    path = solve_ivp(flow, (0, 4), flat, rtol=1e-10, atol=1e-10, method="DOP853")
    assert path.success
    bound = math.sqrt(float(np.abs(np.linalg.eigvalsh(balance)).sum()))
    for flat in path.y.T:
        first, second = flat[:4].reshape(2, 2), flat[4:].reshape(1, 2)
        size = float(np.linalg.norm(rest(first, second)))
        q = float(np.linalg.norm(second))
        assert across(first) <= across(second @ first) / q + size + 1e-12
        assert size <= bound * (1 + 1e-8)
    before, after = (across(w) ** 2 / float(np.sum(w**2)) for w in (layers[0], first))
    print(f"\n‖P⊥W_1‖²/‖W_1‖²: {before:.3f} → {after:.3f} at ‖W_1‖ = {np.linalg.norm(first):.0f}")
    assert after < 0.1 * before


def test_eq_140_is_a_minimum() -> None:
    x = np.array([[2.0, 0.5, -0.3], [1.5, -0.6, 0.4], [-1.0, -0.2, 0.9], [-2.5, 0.3, 0.1]])
    y, eps = np.array([1.0, 1.0, -1.0, -1.0]), 0.3
    z = y[:, None] * x
    found = robust_svm(x, y, eps, p=math.inf)

    def slack(w: Array) -> float:
        return float((z @ w).min() - eps * np.abs(w).sum() - 1)

    w = found.weights
    assert slack(w) == pytest.approx(0, abs=1e-8)
    # The printed problem has no solution: from a feasible point ½‖W‖² grows without bound.
    for scale in (10.0, 1e3, 1e6):
        assert slack(scale * w) > 0
        assert float(np.linalg.norm(scale * w)) == pytest.approx(scale * np.linalg.norm(w))
    # The minimum: no feasible w is shorter …
    rng = np.random.default_rng(3)
    shortest = math.inf
    for direction in np.vstack([rng.normal(size=(4000, 3)), w + 0.05 * rng.normal(size=(4000, 3))]):
        reach = slack(direction) + 1
        if reach > 0:
            shortest = min(shortest, float(np.linalg.norm(direction)) / reach)
    assert np.linalg.norm(w) * (1 - 1e-9) <= shortest <= 1.01 * np.linalg.norm(w)
    # … and over L layers it is the same: min Σ‖W_k‖² = L‖w‖^{2/L}, at equal norms
    size = float(np.linalg.norm(w))
    for depth in (2, 3):
        least = depth * size ** (2 / depth)
        for _ in range(200):
            layers = [rng.normal(size=(3, 3)) for _ in range(depth - 1)] + [rng.normal(size=(1, 3))]
            p = float(np.linalg.norm(product(layers)))
            layers[0] *= size / p
            assert sum(float(np.sum(v**2)) for v in layers) >= least * (1 - 1e-12)
        a = size ** (1 / depth)
        assert depth * a**2 == pytest.approx(least, rel=1e-14)
