"""Theorem 5: multipliers, stationarity and complementarity of Appendix B.3.2, from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from errata_formulas import Sample, State, draw, fgm, measure
from scipy.special import lambertw
from torch import Tensor


def state(seed: int = 0, eps: float = 0.2) -> tuple[Sample, list[Tensor], State]:
    """A separated squared-ReLU network under FGM, total derivative; degrees (2, 1), K = 3."""
    found = seed
    while True:
        x = draw(found + 10_000, (5, 3))[0]
        weights = draw(found, (6, 3), (1, 6))
        s = Sample(x, torch.ones(5).double(), 2)
        s = Sample(x, torch.sign(s.f(weights, x)), 2)
        at = measure(s, weights, fgm(eps), total=True)
        if bool(torch.isfinite(at.margins).all()) and at.smoothed > 0:
            return s, weights, at
        found += 1


def norms(at: State) -> tuple[float, float, float, float]:
    """‖W‖, ‖∇L‖, cos = ⟨W, ∇L⟩/(‖W‖‖∇L‖), K."""
    w, g = torch.cat(at.weights), torch.cat(at.gradients)
    size, steep = float(torch.linalg.vector_norm(w)), float(torch.linalg.vector_norm(g))
    return size, steep, float(w @ g) / (size * steep), float(sum(at.degrees))


def stationarity(
    s: Sample, weights: list[Tensor], at: State, multipliers: Tensor, eps: float
) -> float:
    """``‖V − Σ λ_i ∂γ̃_i(V)/∂V‖`` at ``V = W/m_min^{1/K}``, from the network at V."""
    scale = float(at.margins.min()) ** (-1 / norms(at)[3])
    v = measure(s, [w * scale for w in weights], fgm(eps), total=True)
    rows = torch.cat(v.rows, dim=1)
    return float(torch.linalg.vector_norm(torch.cat(v.weights) - multipliers @ rows))


def test_eq_130_lacks_one_over_n() -> None:
    for seed in (0, 100, 200):
        s, weights, at = state(seed)
        size, steep, cosine, k = norms(at)
        m = float(at.margins.min())
        printed = size * m ** ((k - 2) / k) * torch.exp(-at.margins) / steep
        predicted = size * m ** (-1 / k) * math.sqrt(2 * (1 + cosine))
        found = [stationarity(s, weights, at, lam, 0.2) for lam in (printed, printed / at.n)]
        print(f"\nχ predicted {predicted:.4f}; with (130) {found[0]:.4f}, with 1/n {found[1]:.4f}")
        assert found[0] > 2 * predicted
        assert found[1] == pytest.approx(predicted, rel=1e-11)


def test_eq_131_has_the_other_sign_a_stray_square_and_no_root() -> None:
    for seed in (0, 100, 200):
        s, weights, at = state(seed)
        size, steep, cosine, k = norms(at)
        m = float(at.margins.min())
        lam = size * m ** ((k - 2) / k) * torch.exp(-at.margins) / (at.n * steep)
        chi = stationarity(s, weights, at, lam, 0.2)
        # (Π ρ_k^{2c_k})^{1/K} γ̂_m^{2/K} = m^{2/K}
        front = 2 * size**2 / (at.rho ** (2 / k) * (m / at.rho) ** (2 / k))
        assert front == pytest.approx(2 * size**2 / m ** (2 / k), rel=1e-12)
        printed = front * (1 - cosine / steep)
        assert printed > 1.3 * chi**2  # an equality in print
        assert front * (1 - cosine) > 1.3 * chi**2  # without the stray square too
        assert front * (1 + cosine) == pytest.approx(chi**2, rel=1e-11)
        # χ of Definition 3 bounds the norm, so it is the root
        assert math.sqrt(front * (1 + cosine)) == pytest.approx(chi, rel=1e-11)
    # One linear example, W along it: cos = −1 and V is a KKT point, χ = 0; printed 4‖W‖²/m² and more
    z = np.array([0.6, 0.8])
    w = 3 * z
    m, g = float(w @ z), -math.exp(-float(w @ z)) * z
    steep, size = float(np.linalg.norm(g)), float(np.linalg.norm(w))
    lam = size / m * math.exp(-m) / steep
    assert float(np.linalg.norm(w / m - lam * z)) < 1e-15
    cosine = float(w @ g) / (size * steep)
    assert 2 * size**2 / m**2 * (1 + cosine) == pytest.approx(0, abs=1e-14)
    assert 2 * size**2 / m**2 * (1 - cosine / steep) > 4 * size**2 / m**2


def one_dimension(apart: np.ndarray, least: float) -> tuple[np.ndarray, float, float]:
    """n examples on a line under a linear classifier: margins, ‖W‖ and ‖∇L‖; K = 1, cos = −1."""
    m = np.concatenate([[least], least + apart])
    w = 2.0
    steep = float((np.exp(-m) * m / w).mean())
    return m, w, steep


def test_eq_134_loses_signs_sums_and_a_hat() -> None:
    n, k = 21, 1
    t = float(lambertw((n - 1) / math.e).real)
    m, size, steep = one_dimension(np.full(n - 1, 1 + t), 40.0)
    least = float(m[0])
    inner = -steep * size  # ⟨W, ∂L̃/∂W⟩
    lam = size * least ** ((k - 2) / k) * np.exp(-m) / steep  # (130) as printed
    total = float((lam * (m / least - 1)).sum())
    # a: the inner product is negative, so the printed right side is too
    assert inner < 0 < total
    assert inner == pytest.approx(-float((np.exp(-m) * m).mean()), rel=1e-14)
    # b: Σ e^{−γ̃_j}γ̃_j is not at least e^{−γ̃_m} Σ γ̃_j; it is at least e^{−γ̃_m} γ̃_m
    assert float((np.exp(-m) * m).sum()) < 0.2 * math.exp(-least) * float(m.sum())
    assert float((np.exp(-m) * m).sum()) >= math.exp(-least) * least
    # d: the sum over i is lost; ρ^{1+2/K}γ̃_m^{1+2/K}, read as printed, has ρ twice
    front = size**2 / (k * least ** (1 + 2 / k))
    printed = n / math.e * front
    print(
        f"\nΣ λ_i(γ̃_i/γ̃_m − 1) {total:.5f}, (134) {printed:.5f}, read with γ̃ {printed / size**3:.5f}"
    )
    assert total > 3.5 * printed
    assert total > 3.5 * printed / size ** (1 + 2 / k)
    # Right, with λ_i/n: the largest term at most 1/e, the sum at most (n − 1)/e …
    terms = lam / n * (m / least - 1)
    assert terms.max() <= front / math.e
    assert terms.sum() <= (n - 1) / math.e * front
    # … and, sharper, W₀(1/e) = 0.278… and W₀((n − 1)/e), Lambert's function; here nearly attained
    assert terms.sum() == pytest.approx(t * front, rel=0.05)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        n = int(rng.integers(2, 30))
        m, size, steep = one_dimension(rng.exponential(size=n - 1) * rng.uniform(0.1, 5), 40.0)
        terms = size * 40.0 ** (k - 2) * np.exp(-m) / (n * steep) * (m / 40.0 - 1)
        front = size**2 / 40.0**3
        assert terms.max() <= float(lambertw(1 / math.e).real) * front
        assert terms.sum() <= float(lambertw((n - 1) / math.e).real) * front


def test_complementarity_of_a_network_is_within_the_corrected_bound() -> None:
    for seed in range(0, 600, 100):
        _, _, at = state(seed)
        size, steep, _, k = norms(at)
        m, least = at.margins.numpy(), float(at.margins.min())
        terms = size * least ** ((k - 2) / k) * np.exp(-m) / (at.n * steep) * (m / least - 1)
        front = size**2 / (k * least ** (1 + 2 / k))
        assert 0 < terms.max() <= float(lambertw(1 / math.e).real) * front < front / math.e
        assert terms.sum() <= float(lambertw((at.n - 1) / math.e).real) * front
