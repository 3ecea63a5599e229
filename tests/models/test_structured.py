"""Diagonal and convolutional linear networks: naive loops, and the predictors they are known for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import marginflow as mf
from marginflow.alignment import angle
from marginflow.errors import InputError, ModelError, SpecificationError
from marginflow.models import (
    Network,
    build,
    conv_linear,
    deep_linear,
    diagonal_linear,
    linear_layers,
    predictor,
)
from marginflow.references import (
    convolutional_limit,
    diagonal_limit,
    max_margin,
    robust_svm,
)

MAKERS: dict[str, Callable[..., Network]] = {
    "diagonal-linear": diagonal_linear,
    "conv-linear": conv_linear,
}
LIMITS = {"diagonal-linear": diagonal_limit, "conv-linear": convolutional_limit}
every_kind = pytest.mark.parametrize("kind", MAKERS)


def naive(kind: str, weights: list[list[float]], x: list[float]) -> float:
    """One example, one coordinate at a time."""
    h, size = list(x), len(x)
    for w in weights[:-1]:
        if kind == "diagonal-linear":
            h = [w[j] * h[j] for j in range(size)]
        else:
            h = [
                sum(w[k] * h[(j + k) % size] for k in range(size)) / math.sqrt(size)
                for j in range(size)
            ]
    return sum(a * b for a, b in zip(weights[-1], h, strict=True))


def weights_of(network: Network) -> list[list[float]]:
    return [p.detach().reshape(-1).tolist() for p in network.parameters()]


# Outputs


@every_kind
@pytest.mark.parametrize("features", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_outputs_are_the_naive_loops(kind: str, features: int, depth: int) -> None:
    network = MAKERS[kind](features, depth, seed=3).double()
    x = torch.randn(5, features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = network(x)
    assert found.shape == (5, 1)
    weights = weights_of(network)
    assert len(weights) == depth
    expected = [[naive(kind, weights, row)] for row in x.tolist()]
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12, atol=1e-13)


@every_kind
def test_images_are_flattened(kind: str) -> None:
    network = MAKERS[kind](12, 3, seed=0).double()
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(network(x), network(x.reshape(4, 12)))


@every_kind
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_gradients_are_those_of_finite_differences(kind: str, depth: int) -> None:
    network = MAKERS[kind](5, depth, seed=3).double()
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x.requires_grad_()
    network(x).sum().backward()
    for tensor in (x, *network.parameters()):
        flat, gradient = tensor.detach().reshape(-1), tensor.grad
        assert gradient is not None
        for j in range(len(flat)):
            sums = []
            for step in (1e-6, -1e-6):
                flat[j] += step
                sums.append(float(network(x).detach().sum()))
                flat[j] -= step
            slope = (sums[0] - sums[1]) / 2e-6
            assert float(gradient.reshape(-1)[j]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


# What they are


@every_kind
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_layer_has_degree_one(kind: str, depth: int) -> None:
    network = MAKERS[kind](6, depth, seed=1).double()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = mf.measure_homogeneity(network, x)
    assert [layer.degree for layer in found.layers] == [1.0] * depth
    assert found.order == depth
    before = network(x)
    with torch.no_grad():
        for k, p in enumerate(network.parameters()):
            p.mul_(k + 2)
    factor = math.factorial(depth + 1)
    assert torch.allclose(network(x), factor * before, rtol=1e-12)


@every_kind
@pytest.mark.parametrize("features", [1, 4, 5])
def test_the_predictor_is_the_network(kind: str, features: int) -> None:
    network = MAKERS[kind](features, 3, seed=2).double()
    w = predictor(network, features)
    assert w.shape == (features,)
    assert w.dtype == torch.float64
    x = torch.randn(6, features, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(network(x)[:, 0], x @ w, rtol=1e-12, atol=1e-13)
    assert not w.requires_grad
    assert all(p.grad is None for p in network.parameters())


def test_the_predictor_of_a_diagonal_network_is_the_product() -> None:
    network = diagonal_linear(6, 4, seed=5).double()
    expected = np.prod(weights_of(network), axis=0)
    np.testing.assert_allclose(predictor(network, 6), expected, rtol=1e-14)


@pytest.mark.parametrize("features", [4, 5, 8])
def test_the_spectrum_of_a_convolutional_network_is_the_product(features: int) -> None:
    """``|ŵ| = |ŵ_1| ⋯ |ŵ_L|`` in the unitary transform, which makes ‖ŵ‖_{2/L} its penalty."""
    network = conv_linear(features, 3, seed=5).double()
    spectra = np.abs(np.fft.fft(np.array(weights_of(network)), norm="ortho"))
    found = np.abs(np.fft.fft(predictor(network, features).numpy(), norm="ortho"))
    np.testing.assert_allclose(found, spectra.prod(axis=0), rtol=1e-12)


def test_the_predictor_of_a_dense_network_is_its_product() -> None:
    network = deep_linear(6, 4, 3, 1, seed=0).double()
    first, second, third = linear_layers(network)
    assert torch.allclose(predictor(network, 6), (third @ second @ first)[0], rtol=1e-13)


def test_the_initial_weights() -> None:
    diagonal, convolution = diagonal_linear(5000, 2, seed=0), conv_linear(5000, 2, seed=0)
    for network, bound in ((diagonal, 1.0), (convolution, math.sqrt(3.0))):
        first, last = (p.detach() for p in network.parameters())
        assert first.shape == (5000,)
        assert 0.999 * bound < float(first.abs().max()) <= bound
        assert float(first.var()) == pytest.approx(bound**2 / 3, rel=0.05)
        assert float(last.abs().max()) <= 5000**-0.5
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    layer = conv_linear(64, 2, seed=1)[1]
    kept = layer(x).detach().square().sum() / x.square().sum()
    assert float(kept) == pytest.approx(1.0, abs=0.3)  # variance 1 keeps the norm on average


# Specifications


@every_kind
def test_build(kind: str) -> None:
    for spec, depth in ((f"{kind}:depth=3", 3), (kind, 2), (f"{kind}:depth=1", 1)):
        network = build(spec, input_shape=(2, 3), seed=4)
        assert network.config == {"kind": kind, "features": 6, "depth": depth}
        assert len(list(network.parameters())) == depth
        same = MAKERS[kind](6, depth, seed=4)
        again = build(network.config, seed=4)
        for a, b, c in zip(*(n.parameters() for n in (network, same, again)), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@every_kind
def test_a_seed_decides_and_leaves_the_random_state_alone(kind: str) -> None:
    state = torch.get_rng_state()
    one, other = MAKERS[kind](6, 2, seed=1), MAKERS[kind](6, 2, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*(next(iter(n.parameters())) for n in (one, other)))
    MAKERS[kind](6, 2)
    assert not torch.equal(torch.get_rng_state(), state)


@every_kind
@pytest.mark.parametrize(
    ("options", "outputs", "error", "words"),
    [
        (":depth=0", 1, InputError, "depth: expected a whole number of at least 1, got 0"),
        (":depth=2.5", 1, SpecificationError, "expected a whole number, got '2.5'"),
        (":3", 1, SpecificationError, "expected .*:depth=L and data of two classes"),
        (":depth=2", 3, SpecificationError, "data of two classes"),
        (":deep=2", 1, SpecificationError, "did you mean 'depth'"),
    ],
)
def test_bad_specs(
    kind: str, options: str, outputs: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        build(kind + options, input_shape=(4,), outputs=outputs)


@every_kind
def test_misuse(kind: str) -> None:
    with pytest.raises(InputError, match="features: expected a whole number of at least 1"):
        MAKERS[kind](0, 2)
    with pytest.raises(ModelError, match="configuration of the model is damaged"):
        build({"kind": kind, "depth": 2})


# Where training takes them


@pytest.mark.parametrize(
    ("kind", "data", "p", "eps"),
    [
        ("diagonal-linear", "separable:n=8,d=4,margin=0.5,seed=2", 2.0, 0.0),
        ("diagonal-linear", "separable:n=8,d=4,margin=0.5,seed=5", math.inf, 0.05),
        ("diagonal-linear", "separable:n=8,d=5,margin=0.5,seed=8", 2.0, 0.2),
        ("conv-linear", "separable:n=8,d=4,margin=0.5,seed=7", 2.0, 0.0),
        ("conv-linear", "separable:n=8,d=5,margin=0.5,seed=1", math.inf, 0.1),
    ],
)
def test_training_ends_at_the_cheapest_predictor(
    kind: str, data: str, p: float, eps: float
) -> None:
    """And neither at the ℓ2 SVM, nor at the robust ℓ2 one, nor where it would end unattacked."""
    loaded = mf.load(data)
    x, y = loaded.x.numpy(), loaded.y.numpy()
    run = mf.train(
        f"{kind}:depth=2",
        loaded,
        attack=f"exact-linear:p={p},eps={eps}" if eps else None,
        loss="exponential",
        lr="loss-based:fall=10",
        epochs=600,
        schedule=[600],
        dtype="float64",
        seed=1,
    )
    assert run.model is not None
    w = predictor(run.model, loaded.shape[0])
    limit = LIMITS[kind](x, y, depth=2, eps=eps, p=p)
    targets = {"limit": limit.direction, "ℓ2 SVM": max_margin(x, y).direction}
    if eps:
        targets["robust ℓ2 SVM"] = robust_svm(x, y, eps, p=p).direction
    if eps and not (kind == "diagonal-linear" and p == math.inf):  # there it is the same
        targets["limit unattacked"] = LIMITS[kind](x, y, depth=2).direction
    angles = {name: angle(w, torch.from_numpy(np.array(v))) for name, v in targets.items()}
    parts = ", ".join(f"{name} {value:.4f}" for name, value in angles.items())
    print(f"\n{kind}, p = {p:g}, ε = {eps}: {parts} rad at ln(1/L) = {-run.final['log_loss']:.0f}")
    nearest = angles.pop("limit")
    assert nearest < 0.02
    assert min(angles.values()) > 0.1
    assert run.final["normalized_margin"] > 0


def test_an_l_infinity_attack_does_not_turn_a_diagonal_network_of_two_layers() -> None:
    """Its penalty ‖w‖_1 is the attack's dual norm: as ℓ2 for dense networks (Theorem 2)."""
    data = mf.load("separable:n=8,d=4,margin=0.5,seed=5")
    x, y = data.x.numpy(), data.y.numpy()
    clean = diagonal_limit(x, y, depth=2)
    for fraction in (0.3, 0.8):
        hit = diagonal_limit(x, y, depth=2, eps=fraction * clean.margin, p=math.inf)
        np.testing.assert_allclose(hit.direction, clean.direction, atol=1e-7)
        assert hit.margin == pytest.approx((1 - fraction) * clean.margin, rel=1e-8)
