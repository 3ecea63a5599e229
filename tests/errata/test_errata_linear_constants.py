"""Section 3.1 and Appendix A: constants and rates."""

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
    top,
)
from scipy.integrate import solve_ivp

from marginflow.training import printed_smoothness, smoothness

UNIT = np.array([[0.6, 0.8]])


def test_eq_23_drops_a_factor_one_plus_eps() -> None:
    """``|ℓ′(W_Π) − ℓ′(V_Π)| ≤ β‖W_Π − V_Π‖``: the margin moves by (1 + ε)‖W_Π − V_Π‖."""
    eps, beta = 0.9, 0.25
    w, v = -0.01 * UNIT[0], -0.2 * UNIT[0]
    moved = float(np.linalg.norm(w - v))
    change = abs(float((slopes(margins(w, UNIT, eps)) - slopes(margins(v, UNIT, eps)))[0]))
    assert change > 1.8 * beta * moved
    assert change <= beta * (1 + eps) * moved
    rng = np.random.default_rng(0)
    for w, v in rng.normal(size=(500, 2, 2)):
        change = abs(float((slopes(margins(w, UNIT, eps)) - slopes(margins(v, UNIT, eps)))[0]))
        assert change <= beta * (1 + eps) * float(np.linalg.norm(w - v))


def test_eqs_25_and_26_write_a_power_of_the_floor_and_a_beta_too_many() -> None:
    # 1/‖W_Π‖ ≤ 1/r̄ on S(r), not 1/r̄^L: too small above r̄ = 1, far too large below
    for low, ratio in ((2.0, 2.0), (0.1, 0.1)):
        layers = [math.sqrt(low) * np.eye(2), math.sqrt(low) * UNIT]
        found = 1 / float(np.linalg.norm(product(layers)))
        assert found == pytest.approx(1 / low, rel=1e-14)
        assert found == pytest.approx(ratio / low**2, rel=1e-14)  # 1/r̄^L, L = 2
    # the last term, |1/‖W_Π‖ − 1/‖V_Π‖| |ℓ′|, is bounded with α (25), not αβ (26)
    w, v, alpha, beta = -5.0 * UNIT[0], -5.01 * UNIT[0], 1.0, 0.25
    slope = float(slopes(margins(w, UNIT, 0.9))[0])
    assert slope > 0.9999
    term = abs(1 / np.linalg.norm(w) - 1 / np.linalg.norm(v)) * slope
    moved = float(np.linalg.norm(w - v))
    assert term > 3.9 * alpha * beta / 5.0**2 * moved
    assert term <= alpha / 5.0**2 * moved


def test_eq_12_is_no_bound_for_every_loss_and_a_smaller_one_is() -> None:
    """``ℓ(m) = c softplus(−s(m + m₀))/s``: Assumptions 1 and 3 with α = c, β = cs/4."""
    c, s, eps, low = 0.1, 40.0, 0.9, 0.99
    alpha, beta = c, c * s / 4

    def gradient(w: Array) -> Array:
        m = margins(w, UNIT, eps)
        return predictor_gradient(w, UNIT, eps, c * slopes(s * (m + 1.9 * 0.995)))

    w, v = -0.99 * UNIT[0], -1.0 * UNIT[0]  # in S(1), r̄ = 0.99
    quotient = float(np.linalg.norm(gradient(w) - gradient(v)) / np.linalg.norm(w - v))
    printed = printed_smoothness(1, 1.0, low, eps, alpha=alpha, beta=beta)
    corrected = smoothness(1, 1.0, low, eps, alpha=alpha, beta=beta)
    print(f"\nL = 1: quotient {quotient:.3f}, printed {printed:.3f}, corrected {corrected:.3f}")
    assert quotient > 1.4 * printed
    assert 0.9 * corrected < quotient <= corrected
    # For the logistic loss the printed constant is a bound, and a useless one.
    assert smoothness(3, 2, 0.3, 0.2) == pytest.approx(54.08, rel=1e-12)
    assert printed_smoothness(3, 2, 0.3, 0.2) == pytest.approx(398_609.38, rel=1e-7)
    # The corrected one holds between any two points of S(r), convex or not.
    rng = np.random.default_rng(1)
    z = rng.normal(size=(4, 3))
    z /= np.linalg.norm(z, axis=1).max()
    r, low, eps, largest = 1.5, 0.4, 0.3, 0.0
    bound = smoothness(2, r, low, eps)

    def at(layers: list[Array]) -> Array:
        p = product(layers)[0]
        g = predictor_gradient(p, z, eps, slopes(margins(p, z, eps)))
        return np.concatenate([x.reshape(-1) for x in layer_gradients(layers, g)])

    def inside() -> list[Array]:
        while True:
            layers = [rng.normal(size=(2, 3)), rng.normal(size=(1, 2))]
            layers = [r * rng.uniform(0.3, 1) * w / np.linalg.norm(w) for w in layers]
            if np.linalg.norm(product(layers)) >= low:
                return layers

    for trial in range(1500):
        one = inside()
        two = [w + 1e-4 * rng.normal(size=w.shape) for w in one] if trial % 2 else inside()
        apart = math.sqrt(sum(float(np.sum((a - b) ** 2)) for a, b in zip(one, two, strict=True)))
        if trial % 2 and not (
            max(float(np.linalg.norm(w)) for w in two) <= r and np.linalg.norm(product(two)) >= low
        ):
            continue
        largest = max(largest, float(np.linalg.norm(at(one) - at(two))) / apart)
    print(f"L = 2: largest quotient {largest:.3f}, β* {bound:.3f}")
    assert 0.1 * bound < largest <= bound


def test_eq_31_is_not_needed_for_mu_and_fails_for_a_large_floor() -> None:
    """Layers in line, all of norm r, against an example that they get wrong: ‖G_k‖ is largest."""
    depth, r, eps = 20, 1.02, 0.95
    layers = [r * np.array([[1.0, 0.0], [0.0, 0.0]]) for _ in range(depth - 1)]
    layers = [r * np.array([[-0.6, -0.8], [0.0, 0.0]]), *layers[1:], r * np.array([[1.0, 0.0]])]
    p = product(layers)[0]
    low = float(np.linalg.norm(p))
    assert low == pytest.approx(r**depth, rel=1e-12)
    m = margins(p, UNIT, eps)
    sizes = [
        float(np.linalg.norm(g))
        for g in layer_gradients(layers, predictor_gradient(p, UNIT, eps, slopes(m)))
    ]
    printed = (1 + eps / low**depth) * r ** (2 * depth)
    stated = r ** (depth - 1) * (1 + eps)  # as in the statement of Lemma 2
    print(f"\n‖G_k‖ {max(sizes):.3f}, Eq. (31) {printed:.3f}, Lemma 2's {stated:.3f}")
    assert max(sizes) > 1.2 * printed
    assert 0.94 * stated < max(sizes) <= stated
    # For a small r̄ (31) is true, and of no use: L = 3, r = 2, r̄ = 0.1, ε = 0.5.
    assert (1 + 0.5 / 0.1**3) * 2.0**6 > 5000 * 2.0**2 * (1 + 0.5)


def test_alignment_is_faster_than_eq_51() -> None:
    """``1 − ⟨u_1, v_2⟩² = O(σ⁻⁴)``, where (51) has O(σ⁻²), along the flow of two layers."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=(6, 3)) * 0.3 + np.array([1.0, 0.3, -0.2])
    start = [rng.normal(size=(3, 3)), rng.normal(size=(1, 3))]

    def flow(_: float, flat: Array) -> Array:
        layers = [flat[:9].reshape(3, 3), flat[9:].reshape(1, 3)]
        p = product(layers)[0]
        m = margins(p, z, 0.1)
        weights = len(m) * np.exp(-np.logaddexp(0, m) - np.log(np.sum(np.logaddexp(0, -m))))
        g = layer_gradients(layers, predictor_gradient(p, z, 0.1, weights))
        return np.concatenate([-w.reshape(-1) for w in g])

    flat = np.concatenate([w.reshape(-1) for w in start])
    reached = [lambda _, f, s=s: float(np.linalg.norm(f[9:])) - s for s in (8.0, 12.0, 18.0)]
    reached[-1].terminal = True  # type: ignore[attr-defined]
    path = solve_ivp(flow, (0, 50), flat, rtol=1e-11, atol=1e-12, method="DOP853", events=reached)
    points = []
    for found in path.y_events:
        f = found[0]
        _, u, _ = top(f[:9].reshape(3, 3))
        sigma = float(np.linalg.norm(f[9:]))
        v = f[9:] / sigma
        points.append((sigma, float(np.sum((u - (u @ v) * v) ** 2))))
    (s0, g0), _, (s1, g1) = points
    slope = math.log(g1 / g0) / math.log(s1 / s0)
    print(f"\nexponent of 1 − ⟨u, v⟩² in σ: {slope:.3f}; at σ = {s1:.0f}: {g1:.2e}")
    assert slope == pytest.approx(-4, abs=0.15)
    assert g1 * s1**2 < 0.25 * g0 * s0**2  # no Θ(σ⁻²)
    assert logistic(margins(product([f[:9].reshape(3, 3), f[9:].reshape(1, 3)])[0], z, 0.1)) < 1e-9


DELTA_START = [
    np.array([[0.3, 0.1, -0.1], [0.05, 0.2, 0.1]]),
    np.array([[1.0, 0.2], [-0.1, 0.4]]),
    np.array([[3.0, 0.5]]),
]
"""Three layers of unequal size, where the signs matter."""


def test_eqs_46_48_50_and_51_have_signs_turned() -> None:
    z = np.array([[2.0, 0.5, 0.3], [1.5, -0.6, 0.2], [2.5, 0.2, -0.8]])
    eps, start = 0.1, DELTA_START
    eta = min(1.0, 1 / smoothness(3, 4.0, 0.1, eps, data_norm=2.7))
    path = descend(start, z, eps, eta, 1500)
    loss, worst = (
        path.losses[0],
        {"46": -math.inf, "48": -math.inf, "50": -math.inf, "51": -math.inf},
    )
    for step in range(0, 1501, 25):
        at, A, B = path.layers[step], path.A[step], path.B[step]
        svd = [top(w) for w in at]
        turned, gaps = {}, {}
        for k in (0, 1):
            delta = start[k] @ start[k].T - start[k + 1].T @ start[k + 1]
            sigma, u, _ = svd[k]
            after, _, v = svd[k + 1]
            turned[k] = float(v @ delta @ v)
            gaps[k] = (sigma**2, after**2, float(u @ v) ** 2)
        for k in (0, 1):
            now, after, cosine = gaps[k]
            bounded = np.linalg.norm(start[k], 2) ** 2
            # (46)
            worst["46"] = max(worst["46"], after - turned[k] - float(np.trace(B[k])) - now)
            assert now >= after + turned[k] - float(np.trace(A[k + 1])) - 1e-12
            # (48), (49): ‖W_k‖₂² − ‖W_k‖_F² is at least M − 2L·L(0), right: M′ − 2L(0)
            gap = float(np.linalg.norm(at[k], 2) ** 2 - np.sum(at[k] ** 2))
            ends = float(np.sum(start[2] ** 2) - np.sum(start[k] ** 2))
            along = sum(turned[j] for j in range(k, 2))
            worst["48"] = max(worst["48"], ends - along - 6 * loss - gap)
            assert gap >= ends + along - 2 * loss - 1e-12
            # (50)
            worst["50"] = max(worst["50"], 1 - (turned[k] + 2 * loss) / after - now / after)
            assert now / after >= 1 + (turned[k] - 2 * loss) / after - 1e-12
            # (51); M is the least over the layers, 0 for the last
            spans = [float(np.sum(start[2] ** 2) - np.sum(w**2)) for w in start]
            sums = [sum(turned[i] for i in range(j, 2)) for j in range(3)]
            printed = min(e - t for e, t in zip(spans, sums, strict=True))
            right = min(e + t for e, t in zip(spans, sums, strict=True))
            top_printed = bounded + 10 * loss - printed + turned[k]
            top_right = bounded + 6 * loss - right - turned[k]
            worst["51"] = max(worst["51"], 1 - top_printed / after - cosine)
            assert cosine >= 1 - top_right / after - 1e-12
    print(
        "\nthe printed inequalities are missed by "
        + str({k: round(v, 3) for k, v in worst.items()})
    )
    assert min(worst.values()) > 0.1
