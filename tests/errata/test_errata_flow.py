"""Section 3.2: the assumption of a start, Theorems 3, 4 and 5 along the gradient flow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from errata_formulas import Sample, State, clean, draw, fgm, fgsm, measure, worst_of
from scipy.integrate import solve_ivp
from scipy.optimize import nnls, root
from torch import Tensor

from marginflow.margins import Margins
from marginflow.references import reduced_flow, two_layer_norm, w_perp


def test_eq_105_has_the_inequality_reversed() -> None:
    m = np.array([1.0, 1.2, 3.0])
    loss = float(np.exp(-m).mean())
    assert math.log(1 / loss) > m.min() + 0.3  # printed: γ̃_m ≥ ln(1/L̃)
    assert math.exp(-m.min()) > loss + 0.1  # from: e^{−γ̃_m} ≤ L̃
    smoothed = math.log(1 / (len(m) * loss))
    assert smoothed <= m.min() <= math.log(1 / loss)
    values = torch.from_numpy(m)
    found = Margins(values, 1.0, 1.0, 1.0, torch.zeros(3, dtype=torch.bool))
    assert found.smoothed == pytest.approx(smoothed, rel=1e-14)
    rng = np.random.default_rng(0)
    for m in rng.normal(size=(200, 5)) * 3:
        loss = float(np.exp(-m).mean())
        assert -math.log(5 * loss) <= m.min() + 1e-14
        assert m.min() <= -math.log(loss) + 1e-14


def linear_flow(z: np.ndarray, start: Sequence[float], until: float) -> np.ndarray:
    """Margins along ``dw/ds = −∇ ln L`` of one linear layer, exponential loss: (times, n)."""

    def field(_: float, w: np.ndarray) -> np.ndarray:
        weights = np.exp(-(z @ w) - np.logaddexp.reduce(-(z @ w)))
        return np.asarray(weights @ z)

    path = solve_ivp(field, (0, until), start, rtol=1e-10, atol=1e-12, max_step=until / 400)
    assert path.success
    return np.asarray(path.y.T @ z.T)


def one_unit(scale: float, z: np.ndarray, until: float) -> tuple[np.ndarray, np.ndarray]:
    """The flow in raw time t of ``f = v relu(⟨w, x⟩)²`` from (w, v) times ``scale``: margins, losses."""

    def margins(state: np.ndarray) -> np.ndarray:
        return np.asarray(state[2] * np.maximum(z @ state[:2], 0) ** 2)

    def field(_: float, state: np.ndarray) -> np.ndarray:
        on = np.maximum(z @ state[:2], 0)
        e = np.exp(-state[2] * on**2) / len(z)
        return np.concatenate([2 * state[2] * (e * on) @ z, [float(e @ on**2)]])

    start = scale * np.array([0.5, 0.4, 1.0])
    ticks = np.concatenate([[0.0], np.logspace(-3, math.log10(until), 400)])
    path = solve_ivp(field, (0, until), start, t_eval=ticks, rtol=1e-10, atol=1e-13, method="LSODA")
    assert path.success
    m = np.stack([margins(s) for s in path.y.T])
    return m, np.exp(-m).mean(axis=1)


def test_assumption_4_needs_a_loss_below_one_over_n() -> None:
    # All margins positive, and then one is not: a linear classifier, no adversary
    z = np.array([[4.0, 0.0], [-1.5, 0.2]])
    m = linear_flow(z, [0.0125, 0.34375], 80.0)
    assert m[0] == pytest.approx([0.05, 0.05], rel=1e-12)
    assert float(np.exp(-m[0]).mean()) > 1 / 2
    print(f"\nlinear: least margin {m[0].min():.2f} → {m.min():.2f}")
    assert m.min() < -0.15
    assert m[-1].min() > 1
    # Theorem 3 fails: f = v relu(⟨w, x⟩)² loses the second example for ever, and L → 1/2, not 0.
    z = np.array([[2.0, 0.0], [-1.5, 2.0]])
    m, losses = one_unit(1.0, z, 1e6)
    print(f"one squared ReLU: margins {m[0]} → {m[-1]}, L {losses[0]:.3f} → {losses[-1]:.6f}")
    assert m[0].min() > 0
    assert m[-1, 1] == 0.0
    assert losses[-1] == pytest.approx(0.5, abs=1e-4)
    # the same start, three times as large: L < 1/n, and then L → 0 and no margin is lost
    m, losses = one_unit(3.0, z, 1e6)
    assert losses[0] < 1 / 2
    assert m.min() >= -math.log(2 * losses[0]) > 0
    assert losses[-1] < 1e-4
    assert (np.diff(losses) < 0).all()


def setting(eps: float, seed: int) -> tuple[Sample, list[Tensor]]:
    """Two layers, squared ReLU, three examples with the labels of the clean network."""
    weights, x = draw(seed, (4, 2), (1, 4)), draw(seed + 10_000, (3, 2))[0]
    s = Sample(x, torch.ones(3).double(), 2)
    return Sample(x, torch.sign(s.f(weights, x)), 2), weights


def weighted(at: State, velocity: Sequence[Tensor]) -> float:
    """``Σ e^{−m_i} dγ̂_i/dt``."""
    return float(torch.exp(-at.margins) @ at.normalized_rates(velocity))


def tangential_square(at: State) -> float:
    return sum(float(t.square().sum()) for t in at.tangential(at.gradients))


def test_eqs_18_and_121_need_the_total_derivative() -> None:
    s, weights = setting(0.5, 510)
    total = measure(s, weights, fgm(0.5), total=True)
    detached = measure(s, weights, fgm(0.5), total=False)
    assert float(total.margins.min()) > 0.7
    assert total.smoothed > 0  # L < 1/n
    # Eq. (16) with the gradient of Algorithm 1; the margins move with δ(W)
    found = weighted(total, [-g for g in detached.gradients])
    right = weighted(total, [-g for g in total.gradients])
    print(f"\nΣ e^(−m) dγ̂/dt: detached {found:.4f}, total {right:.4f}")
    assert found < -0.2 * right
    # exact identity, of which (121) says that the sides are proportional
    assert right == pytest.approx(total.n / total.rho * tangential_square(total), rel=1e-12)
    # The derivatives agree for an exact inner maximum (Danskin) and for FGSM off its sign changes.
    ball = 0.3 * torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    for perturb in (worst_of(ball), fgsm(0.3)):
        one, other = (measure(s, weights, perturb, total=t) for t in (False, True))
        for a, b in zip(one.rows, other.rows, strict=True):
            assert torch.equal(a, b)
    # What holds for both: Lemma 4, hence Lemmas 9 and 11
    for at in (total, detached):
        for w, g, c in zip(at.weights, at.gradients, at.degrees, strict=True):
            assert float(w @ g) == pytest.approx(-c * at.nu, rel=1e-12)


def test_eq_103_needs_the_total_derivative() -> None:
    s, weights = setting(0.5, 510)
    total = measure(s, weights, fgm(0.5), total=True)
    detached = measure(s, weights, fgm(0.5), total=False)

    def rate(velocity: Sequence[Tensor]) -> float:
        """dL/dt by a central difference."""
        h = 1e-6
        ahead, behind = (
            [w + sign * h * v.reshape(w.shape) for w, v in zip(weights, velocity, strict=True)]
            for sign in (1, -1)
        )
        losses = [measure(s, w, fgm(0.5), total=False).loss for w in (ahead, behind)]
        return (losses[0] - losses[1]) / (2 * h)

    for at, rises in ((detached, True), (total, False)):
        square = sum(float(g @ g) for g in at.gradients)
        found = rate([-g for g in at.gradients])
        if rises:  # the loss increases along dW/dt = −∂L/∂W taken at fixed δ
            assert found > 0.3 * square
        else:
            assert found == pytest.approx(-square, rel=1e-6)


def test_theorem_5_needs_the_total_derivative() -> None:
    """Where normalised descent with the detached gradient ends is no KKT point of (19)."""
    weights, x = draw(11, (3, 2), (1, 3)), draw(10_011, (3, 2))[0]
    x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    s, rule = Sample(x, torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64), 2), fgm(0.3)
    shapes, sizes = [w.shape for w in weights], [w.numel() for w in weights]

    def unpack(flat: np.ndarray) -> list[Tensor]:
        parts = torch.split(torch.from_numpy(flat[: sum(sizes)].copy()), sizes)
        return [p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)]

    def pack(at: State) -> tuple[np.ndarray, np.ndarray]:
        return torch.cat(at.weights).numpy(), torch.cat(at.rows, dim=1).numpy()

    def residual(at: State) -> float:
        """``min_{λ ≥ 0} ‖W − Σ λ_i ∂m_i‖/‖W‖``, all examples on the margin."""
        w, rows = pack(at)
        return float(nnls(rows.T, w / np.linalg.norm(w))[1])

    def kkt_point(start: list[Tensor], total: bool) -> list[Tensor]:
        """``W = Σ λ_i ∂m_i``, ``m_i = 1``, near ``start``."""
        at = measure(s, start, rule, total=total)
        start = [w / float(at.margins.min()) ** (1 / 3) for w in start]
        w, rows = pack(measure(s, start, rule, total=total))
        multipliers = nnls(rows.T, w)[0]

        def equations(flat: np.ndarray) -> np.ndarray:
            now = measure(s, unpack(flat), rule, total=total)
            w, rows = pack(now)
            return np.concatenate([w - flat[len(w) :] @ rows, now.margins.numpy() - 1])

        found = root(equations, np.concatenate([w, multipliers]), method="lm", tol=1e-13)
        assert np.abs(found.fun).max() < 1e-12
        assert (found.x[len(w) :] > 0.1).all()
        return unpack(found.x)

    for step in range(
        300
    ):  # ascent of the smoothed normalised margin, sharper and shorter as it goes
        at = measure(s, weights, rule, total=False)
        pull = torch.softmax(-at.margins * (20 + step) / at.margins.abs().max(), dim=0)
        g = [pull @ r for r in at.rows]
        length = math.sqrt(sum(float(v @ v) for v in g))
        size = math.sqrt(sum(n**2 for n in at.norms))
        rate = 0.1 / (1 + step / 100) * size / length
        weights = [w + rate * v.reshape(w.shape) for w, v in zip(weights, g, strict=True)]
        weights = [w / size for w in weights]
    end = kkt_point(weights, total=False)
    assert residual(measure(s, end, rule, total=False)) < 1e-12
    missed = residual(measure(s, end, rule, total=True))
    print(f"\nresidual of (122) at the detached end: {missed:.4f}")
    assert missed > 0.02
    right = kkt_point(end, total=True)
    assert residual(measure(s, right, rule, total=True)) < 1e-12
    norms = [math.sqrt(sum(float(w.square().sum()) for w in at)) for at in (end, right)]
    assert norms[1] < norms[0] - 1e-4  # a smaller norm at margin 1: a larger normalised margin


def middle_term(z: np.ndarray, w: np.ndarray) -> float:
    """(C) of Eq. (115) for one linear layer."""
    unit = w / np.linalg.norm(w)
    rows, m = z - np.outer(z @ unit, unit), z @ w
    apart = m[:, None] - m[None, :]
    return float(((rows @ rows.T) * (np.exp(apart) + np.exp(-apart))).sum())


def growth_of_117(z: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Both sides of (117) for one linear layer, ζ the sum of the γ̂_i at this moment."""
    m = z @ w
    velocity = (np.exp(-m)[:, None] * z).mean(axis=0)
    return float((np.exp(m) * (z @ velocity)).mean()), (float(m.sum()) / len(m)) ** 2 / float(w @ w)


def test_eqs_116_and_117_are_false_and_theorem_3_has_another_proof() -> None:
    w = np.array([2.0, 0.0])
    z = np.array([[2.0, 1.0], [1.0, -1.0]])
    assert float(np.exp(-(z @ w)).mean()) < 1 / 2  # separated, and L < 1/n
    assert middle_term(z, w) == pytest.approx(4 - 4 * math.cosh(2), rel=1e-14)
    assert middle_term(z, w) == pytest.approx(-11.05, abs=0.005)  # (116): ≥ 0
    # (117) too, with the same margins
    z = np.array([[2.0, 3.0], [1.0, -3.0]])
    left, right = growth_of_117(z, w)
    print(f"\n(116) −11.05; (117): left {left:.2f}, right {right:.2f}")
    assert left < -7 < 2 < right
    # Right: d ln(ℓ/ρ)/dt ≥ (1/ν) Σ ‖P_kG_k‖², here on 60 networks under FGM
    checked, closest = 0, math.inf
    for seed in range(400):
        s, weights = setting(0.3, seed)
        at = measure(s, [1.5 * v for v in weights], fgm(0.3), total=True)
        if not (bool(torch.isfinite(at.margins).all()) and at.smoothed > 0):
            continue
        checked += 1
        rate_ell = sum(float(g @ g) for g in at.gradients) / at.loss / at.smoothed
        rate_rho = sum(
            -c * float(w @ g) / n**2
            for c, w, g, n in zip(at.degrees, at.weights, at.gradients, at.norms, strict=True)
        )
        bound = tangential_square(at) / at.nu
        scale = rate_ell + bound
        assert rate_ell - rate_rho >= bound - 1e-12 * scale
        closest = min(closest, (rate_ell - rate_rho - bound) / scale)
        if checked == 60:
            break
    assert checked == 60
    # Rates (the paper has ρ = Ω(ln t)): ρ = Θ(ln t), L = Θ(1/(t (ln t)^{2−2/K})), in closed form for K = 2
    ln_t = np.array([1e3, 1e4, 1e5, 1e6])
    g = 0.7
    m = g * two_layer_norm(ln_t, slope=g, start=1.0)
    np.testing.assert_allclose(m / ln_t, 1, atol=0.01)
    np.testing.assert_allclose(ln_t - m + np.log(ln_t), -math.log(2 * g), atol=0.01)


def test_theorem_4_does_not_make_the_smallest_margin_monotone() -> None:
    # Its hypothesis, γ̂_i − γ̂_m = ω(1/ρ), fails between support vectors: ρ(γ̂_2 − γ̂_1) → ln(c/b)
    b, c = 0.7, 2.5
    x, y = np.array([[1.0, b], [-1.0, c]]), np.array([1.0, -1.0])
    path = reduced_flow(x, y, [1.0, 0.2], depth=1, log_times=[1e2, 1e3, 1e4])
    m = path.weights @ (y[:, None] * x).T
    gaps = np.abs(m[:, 1] - m[:, 0])  # = ρ|γ̂_2 − γ̂_1|
    print(f"\nρ times the gap at ln t = 1e2, 1e3, 1e4: {gaps}")
    np.testing.assert_allclose(gaps, math.log(c / b), rtol=1e-3)
    residual = w_perp(x, y).vector
    assert abs(residual @ (x[0] + x[1])) == pytest.approx(math.log(c / b), rel=1e-12)
    # Its conclusion does not follow from a large gap at a time: w = (a, −β), gap·ρ = a + β
    z = np.array([[1.0, 0.0], [2.0, -1.0]])
    for a in (5.0, 10.0, 20.0):
        w = np.array([a, -a * math.exp(-a) / 4])
        margins = z @ w
        e = np.exp(-margins)
        unit = w / np.linalg.norm(w)
        velocity = e @ z / 2
        rows = z - np.outer(z @ unit, unit)
        rates = rows @ velocity / np.linalg.norm(w)
        assert margins[1] - margins[0] >= a
        assert rates[0] < -0.5 * abs(e[1] * (rows[0] @ z[1])) / 2 / np.linalg.norm(w)  # dγ̂_m/dt < 0
        assert float(e @ rates) > 0  # (18)
    # Along a whole flow γ̂_m falls and ℓ/ρ does not
    m = linear_flow(z, [3.0, 0.0], 3.0)
    # w from its margins: a = m_1, b = 2 m_1 − m_2
    norm = np.hypot(m[:, 0], 2 * m[:, 0] - m[:, 1])
    least, smooth = m.min(axis=1) / norm, -np.logaddexp.reduce(-m, axis=1) / norm
    print(f"γ̂_m: 1 → {least.min():.6f}; steps on which it falls: {(np.diff(least) < 0).sum()}")
    assert least[0] == pytest.approx(1, rel=1e-14)
    assert least.min() < 1 - 1e-5
    assert (np.diff(smooth) > -1e-13).all()


def test_clean_and_worst_case_margins_obey_the_identity_of_theorem_4() -> None:
    """On a ReLU network too, where the inner maximum is exact."""
    ball = 0.3 * torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    weights, x = draw(31, (6, 2), (1, 6)), draw(32, (4, 2))[0]
    s = Sample(x, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64), 1)
    for perturb in (clean, worst_of(ball)):
        at = measure(s, weights, perturb, total=False)
        found = weighted(at, [-g for g in at.gradients])
        assert found == pytest.approx(at.n / at.rho * tangential_square(at), rel=1e-11)
