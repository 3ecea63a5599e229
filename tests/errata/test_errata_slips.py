"""Slips of notation: signs, indices, orders and shapes that no conclusion rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from errata_formulas import Sample, draw, fgm, input_gradient, measure
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

from marginflow.alignment import measure_alignment
from marginflow.attacks import FGM, PGD
from marginflow.models import deep_linear, mlp

WEDGE = np.array([[1.0, 3.0], [1.0, -3.0]])


def layers_and_gradients() -> tuple[list[Array], list[Array], Array, float]:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=s) for s in ((3, 4), (2, 3), (1, 2))]
    z, eps = rng.normal(size=(5, 4)), 0.3
    p = product(layers)[0]
    return (
        layers,
        layer_gradients(layers, predictor_gradient(p, z, eps, slopes(margins(p, z, eps)))),
        z,
        eps,
    )


def test_gradients_appear_in_two_shapes() -> None:
    (w1, w2, w3), g, z, eps = layers_and_gradients()
    # (9), (24), (32), (34)–(36) need ∂L̃/∂W_k in the shape of W_k …
    assert [x.shape for x in g] == [w.shape for w in (w1, w2, w3)]
    np.testing.assert_allclose(w2.T @ g[1], g[0] @ w1.T, rtol=1e-13)
    np.testing.assert_allclose(w3.T @ g[2], g[1] @ w2.T, rtol=1e-13)
    # … (16), (17), (75)–(77), (95), (110) its transpose: with one shape in both the product is none
    for k, w in enumerate((w1, w2)):
        with pytest.raises(ValueError, match="mismatch"):
            np.trace(g[k] @ w)
        with pytest.raises(ValueError, match="broadcast"):
            w - 0.1 * g[k].T
    # right, for every shape: ⟨W_k, G_k⟩ = tr(G_kᵀW_k), here −(1/n) Σ |ℓ′| m_i for each layer
    m = margins(product([w1, w2, w3])[0], z, eps)
    for k, w in enumerate((w1, w2, w3)):
        assert float(np.sum(w * g[k])) == pytest.approx(-float((slopes(m) * m).mean()), rel=1e-12)
        assert float(np.trace(g[k].T @ w)) == pytest.approx(float(np.sum(w * g[k])), rel=1e-13)
    # below (56), W_1ᵀ⋯W_LᵀW_L⋯W_2 is again the transpose of (24)'s W_2ᵀ⋯W_LᵀW_L⋯W_1
    printed = w1.T @ w2.T @ w3.T @ w3 @ w2
    assert printed.shape == w1.T.shape
    with pytest.raises(ValueError, match="broadcast"):
        printed * w1
    p = product([w1, w2, w3])[0]
    h = 1e-6
    bump = np.zeros_like(w1)
    bump[1, 2] = h
    difference = float(
        np.linalg.norm(product([w1 + bump, w2, w3])) - np.linalg.norm(product([w1 - bump, w2, w3]))
    ) / (2 * h)
    right = (w2.T @ w3.T @ w3 @ w2 @ w1) / np.linalg.norm(p)
    assert right[1, 2] == pytest.approx(difference, rel=1e-8)
    np.testing.assert_allclose(printed.T / np.linalg.norm(p), right, rtol=1e-13)


def test_eq_14_ends_one_layer_earlier() -> None:
    for depth in (2, 3, 4):
        model = deep_linear(5, *[4] * (depth - 1), 1, seed=0).double()
        assert measure_alignment(model).neighbours.shape == (depth - 1,)


def test_eq_29_is_an_inequality_with_a_gradient_in_it() -> None:
    z, eps, beta = np.array([[0.6, 0.8], [0.3, 0.9]]), 0.0, 0.25
    w = np.array([0.4, -0.2])
    g = predictor_gradient(w, z, eps, slopes(margins(w, z, eps)))
    square = float(g @ g)
    eta = min(1.0, 1 / beta)
    assert eta * beta < 1
    value = logistic(margins(w, z, eps))
    with pytest.raises(ValueError, match="matmul"):  # printed ⟨∇L̃, −ηL̃⟩, a vector and a number
        np.matmul(g, -eta * value)
    middle = -eta * square + beta * eta**2 / 2 * square
    assert middle < -eta / 2 * square - 0.3 * square  # printed "="
    change = logistic(margins(w - eta * g, z, eps)) - value
    assert change <= middle <= -eta / 2 * square
    eta = 1 / beta  # where the two sides do agree
    assert -eta * square + beta * eta**2 / 2 * square == pytest.approx(-eta / 2 * square, rel=1e-14)


def test_eq_33_takes_the_slope_and_a_minus() -> None:
    """W_2ᵀ∂L̃/∂W_2 without and with the adversary; their difference is (33) plus W_2ᵀ∂/∂W_2 of (32)."""
    rng = np.random.default_rng(1)
    w1, w2 = rng.normal(size=(3, 4)), rng.normal(size=(1, 3))
    x, y, eps = rng.normal(size=4), -1.0, 0.3
    p = product([w1, w2])[0]
    m = y * float(x @ p) - eps * float(np.linalg.norm(p))
    slope, value = -float(slopes(np.array(m))), float(np.logaddexp(0, -m))
    by_norm = w2.T @ (w2 @ w1 @ w1.T) / np.linalg.norm(p)  # W_2ᵀ ∂‖W_Π‖/∂W_2
    by_data = w2.T @ (y * x @ w1.T)[None, :]
    a, b = (torch.tensor(w, requires_grad=True) for w in (w1, w2))
    q = (b @ a)[0]
    margin = y * (torch.tensor(x) @ q) - eps * torch.linalg.vector_norm(q)
    (g,) = torch.autograd.grad(torch.nn.functional.softplus(-margin), b)
    found = w2.T @ g.numpy() - slope * by_data
    np.testing.assert_allclose(found, -eps * slope * by_norm, rtol=1e-12)
    printed = y * eps * value * by_norm
    assert np.linalg.norm(printed - found) > 1.5 * np.linalg.norm(found)


def test_eq_53_is_the_transpose_and_has_a_sign() -> None:
    rng = np.random.default_rng(2)
    units = [v / np.linalg.norm(v) for v in (rng.normal(size=s) for s in (4, 3, 2, 1))]
    # rank-one layers in line, two of the three joints with the other sign
    v = [units[0], -units[1], -units[2]]
    u = [units[1], units[2], np.ones(1)]
    layers = [s * np.outer(b, a) for s, b, a in zip((2.0, 3.0, 5.0), u, v, strict=True)]
    scale = math.prod(float(np.linalg.norm(w)) for w in layers)
    w_pi = product(layers) / scale
    printed = np.linalg.multi_dot([np.outer(a, b) for a, b in zip(v, u, strict=True)])
    assert w_pi.shape == (1, 4)
    assert printed.shape == (4, 1)
    np.testing.assert_allclose(printed, w_pi.T, atol=1e-14)  # the order is that of W_Πᵀ
    layers[1] = -layers[1]  # singular vectors still in line up to sign, as (52) has it
    w_pi = product(layers) / scale
    assert [abs(top(w)[1] @ t) for w, t in zip(layers, u, strict=True)] == pytest.approx([1, 1, 1])
    assert np.linalg.norm(w_pi[0] - v[0]) == pytest.approx(2)  # not v_1 but −v_1
    np.testing.assert_allclose(w_pi[0], -v[0], atol=1e-14)


def test_eqs_58_and_59_mean_x_j() -> None:
    z, eps = np.vstack([WEDGE, [[10.0, -8.0]]]), 0.2
    w = np.array([2.0, 1.0])
    weights = slopes(margins(w, z, eps))
    pull = -w[1] * z[:, 1]  # ⟨−P⊥W_Π, P⊥x_iy_i⟩, ū = (1, 0)
    whole = float(weights @ pull)
    j, others = 1, [0]  # the support vector of the greatest pull; those that pull outwards
    assert pull[j] == pull[:2].max()
    rest = float(weights[others] @ pull[others])
    assert whole >= weights[j] * pull[j] + rest  # with x_j
    i = 2
    with_j, with_i = (float(weights[j] * pull[k] + rest) for k in (j, i))
    print(f"\n(58): {whole:.3f}; with x_j {with_j:.3f}, with x_i {with_i:.3f}")
    assert with_i > 2 * whole  # for i = 3


def test_eq_60_has_a_minus_too_many() -> None:
    """Third line: ``e^{−⟨−P⊥W_Π, P⊥x_k⟩}`` for ``e^{−⟨P⊥W_Π, P⊥x_k⟩}``; t = ⟨P⊥W_Π, P⊥x_k⟩ ≥ 0."""
    t = np.linspace(0, 20, 2001)
    assert (np.exp(-t) * -t >= -1 / math.e - 1e-15).all()
    assert np.exp(1.0) * -1.0 < -7 / math.e
    assert (np.exp(t) * -t).min() < -1e9


def test_eq_63_has_the_losses_exchanged() -> None:
    z, eps, eta = WEDGE / 4, 0.1, 0.4
    start = [np.array([[0.5, 0.8], [0.1, -0.3]]), np.array([[0.7, 0.4]])]
    path = descend(start, z, eps, eta, 40)
    missed = 0
    for step in range(40):
        (w1, w2), (next1, _) = path.layers[step], path.layers[step + 1]
        p = product([w1, w2])[0]
        g = layer_gradients([w1, w2], predictor_gradient(p, z, eps, slopes(margins(p, z, eps))))[0]
        inner = float(w1[:, 1] @ g[:, 1])  # ⟨P⊥W_1, ∂L̃/∂W_1⟩
        fall = path.losses[step] - path.losses[step + 1]
        assert fall > 0
        left = float(np.sum(next1[:, 1] ** 2))
        common = float(np.sum(w1[:, 1] ** 2)) - 2 * eta * inner
        assert left <= common + 2 * fall  # as (67) has it
        missed += left > common - 2 * fall + 0.1 * fall
    assert missed == 40


def test_eq_91_takes_the_gradient_where_the_iterate_is() -> None:
    x, y = draw(3, (5, 3))[0], torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    model = mlp(3, 6, 1, activation="squared-relu", seed=1).double()
    weights = [p.detach() for p in model.parameters()]
    s, eps, xi, steps = Sample(x, y, 2), 0.8, 0.2, 10

    def pgd(moving: bool) -> torch.Tensor:
        delta = torch.zeros_like(x)
        for _ in range(steps):
            at = Sample(x + delta, y, 2) if moving else s
            g = input_gradient(at, weights, False)
            g = g / torch.linalg.vector_norm(g, dim=1, keepdim=True)
            delta = delta - xi * y[:, None] * g
            size = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
            delta = delta * (eps / size).clamp(max=1)
        return delta

    printed = pgd(moving=False)
    fgm_delta = FGM(eps=eps)(model, x, y).delta
    # With ∇f(x; W), as printed, every step is the same: PGD is FGM.
    torch.testing.assert_close(printed, fgm_delta, rtol=0, atol=1e-14)
    right = PGD("l2", eps=eps, steps=steps, step_size=xi)(model, x, y).delta
    torch.testing.assert_close(right, pgd(moving=True), rtol=0, atol=1e-12)
    assert float((right - printed).abs().max()) > 0.1
    above = y * s.f(weights, x + printed) - y * s.f(weights, x + right)
    assert float(above.min()) > -1e-12
    assert float((above / (y * s.f(weights, x)).abs()).max()) > 0.05


def test_eqs_109_and_111_miss_the_degree_and_109_has_a_label_too_many() -> None:
    s = Sample(draw(5, (4, 3))[0], torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64), 2)
    weights = [w / 2 for w in draw(6, (5, 3), (1, 5))]
    at = measure(s, weights, fgm(0.3), total=True)
    e = torch.exp(-at.margins)
    k, c = 0, 2  # c_1 = q^{L−1}
    w, norm, n = at.weights[k], at.norms[k], at.n
    unit, velocity = w / norm, -at.gradients[k]
    step = w.numpy() + 1e-30j * velocity.numpy()  # d(w/‖w‖)/dt by a complex step: no cancellation
    rate = torch.from_numpy((step / np.sqrt((step * step).sum())).imag / 1e-30)

    def off(found: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm(found - rate) / torch.linalg.vector_norm(rate))

    # (109)
    assert off((velocity - unit * (s.y * e * at.margins).sum() / (n * norm)) / norm) > 0.1
    assert off((velocity - c * unit * (e * at.margins).sum() / (n * norm)) / norm) < 1e-12
    # (111), with ∂γ̂_j/∂Ŵ_k = (ρ_k/ρ) ∂m_j/∂W_k
    rows, hat = at.rows[k] * norm / at.rho, at.margins / at.rho
    for degree, right in ((1, False), (c, True)):
        inside = rows - degree * hat[:, None] * unit
        found = at.rho / (n * norm**2) * (e @ inside)
        assert (off(found) < 1e-12) if right else (off(found) > 0.1)


def test_eq_138_is_the_square() -> None:
    s = Sample(draw(7, (4, 3))[0], torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64), 1)
    weights = draw(8, (5, 3), (1, 5))

    def nothing(s: Sample, w: object, total: bool) -> torch.Tensor:
        return torch.zeros_like(s.x)

    at = measure(s, weights, nothing, total=False)
    square = sum(float(g @ g) for g in at.gradients)
    h = 1e-6
    losses = []
    for sign in (1, -1):
        moved = [
            w - sign * h * g.reshape(w.shape) for w, g in zip(weights, at.gradients, strict=True)
        ]
        losses.append(measure(s, moved, nothing, total=False).loss)
    fall = (losses[1] - losses[0]) / (2 * h)
    assert fall == pytest.approx(square, rel=1e-7)
    assert abs(fall - math.sqrt(square)) > 0.2 * fall
