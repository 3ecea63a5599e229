"""Diagonal and convolutional linear networks: what they compute, and where their direction goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import marginflow as mf
from marginflow.alignment import angle
from marginflow.models import build, predictor
from marginflow.references import convolutional_limit, diagonal_limit, max_margin

LIMITS = {"diagonal-linear": diagonal_limit, "conv-linear": convolutional_limit}


def network(kind: str, features: int, depth: int, seed: int = 0) -> mf.models.Network:
    make = mf.models.diagonal_linear if kind == "diagonal-linear" else mf.models.conv_linear
    return make(features, depth, seed=seed).double()  # type: ignore[return-value]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("features", [1, 2, 5, 6])
def test_the_convolution_is_circular_and_of_full_width(features: int, depth: int) -> None:
    model = network("conv-linear", features, depth)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, features))
    *kernels, last = [p.detach().numpy().reshape(-1) for p in model.parameters()]
    expected = []
    for row in x:
        h = row
        for w in kernels:
            shifted = [
                sum(w[k] * h[(place + k) % features] for k in range(features))
                for place in range(features)
            ]
            h = np.array(shifted) / np.sqrt(features)
        expected.append(h @ last)
    found = model(torch.from_numpy(x)).detach().numpy()[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        x @ predictor(model, features).numpy(), found, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_diagonal_predictor_is_a_product(depth: int) -> None:
    model = network("diagonal-linear", 5, depth)
    product = np.prod([p.detach().numpy().reshape(-1) for p in model.parameters()], axis=0)
    np.testing.assert_allclose(predictor(model, 5).numpy(), product, rtol=1e-15)


@pytest.mark.parametrize("kind", LIMITS)
def test_every_layer_has_degree_one_and_the_recorded_configuration_builds_it(kind: str) -> None:
    model = build(f"{kind}:depth=3", input_shape=(2, 3), seed=4)
    assert mf.measure_homogeneity(model, torch.randn(4, 2, 3)).degrees == (1, 1, 1)
    again = build(model.config, seed=4)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(mf.errors.SpecificationError, match="two classes"):
        build(f"{kind}:depth=3", input_shape=(6,), outputs=3)
    with pytest.raises(mf.errors.InputError, match="depth"):
        build(f"{kind}:depth=0", input_shape=(6,))


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("eps", [0.0, 0.08])
@pytest.mark.parametrize("seed", [0, 2])
def test_the_direction_is_that_of_its_own_penalty(kind: str, eps: float, seed: int) -> None:
    """Depth 2: ``min ‖w‖₁`` (of w, or of its Fourier transform), robustly, and not ``min ‖w‖₂``."""
    data = mf.load(f"separable:n=12,d=6,margin=0.5,seed={seed},supports=3")
    x, y = data.x.numpy(), data.y.numpy()
    oracle = LIMITS[kind](x, y, depth=2, eps=eps, p=np.inf)
    assert oracle.feasible
    assert not oracle.local
    model = network(kind, 6, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)  # a small start: the penalty rules from early on
    attack = mf.attacks.ExactLinear("linf", eps) if eps else None
    mf.train(
        model, data, attack=attack, loss="exponential", lr="loss-based:a=0.1,fall=1", epochs=4000,
        schedule=[4000],
    )  # fmt: skip
    found = predictor(model, 6)
    to_oracle = angle(found, torch.from_numpy(oracle.direction))
    to_svm = angle(found, torch.from_numpy(max_margin(x, y).direction))
    print(f"{kind}, ε = {eps}, seed {seed}: oracle {to_oracle:.4f} rad, SVM {to_svm:.4f} rad")
    assert to_oracle < 0.06
    assert to_oracle < to_svm / 3
