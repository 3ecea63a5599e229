from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from marginflow.errors import InputError, ModelError, SpecificationError
from marginflow.models import (
    ACTIVATIONS,
    Network,
    SquaredReLU,
    build,
    cnn,
    deep_linear,
    load_weights,
    mlp,
)

FACTORIES: dict[str, tuple[Callable[[int | None], Network], tuple[int, ...]]] = {
    "mlp": (lambda s: mlp(12, 8, 5, 2, seed=s), (12,)),
    "mlp of images": (lambda s: mlp(12, 8, 1, activation="squared-relu", seed=s), (3, 2, 2)),
    "one layer": (lambda s: mlp(12, 1, seed=s), (12,)),
    "deep linear": (lambda s: deep_linear(12, 8, 5, 2, seed=s), (12,)),
    "cnn": (
        lambda s: cnn((2, 9, 12), 4, channels=(3, 5), hidden=7, kernel=3, seed=s),
        (2, 9, 12),
    ),
}
every_model = pytest.mark.parametrize("name", FACTORIES)


@every_model
def test_networks_have_no_biases_and_the_right_shapes(name: str) -> None:
    make, shape = FACTORIES[name]
    model = make(0)
    assert all(n.endswith("weight") for n, _ in model.named_parameters())
    assert not list(model.buffers())
    outputs = model(torch.randn(6, *shape))
    assert outputs.shape == (6, model.config["widths"][-1] if "widths" in model.config else 4)
    assert torch.equal(model(torch.zeros(1, *shape)), torch.zeros(1, outputs.shape[1]))


@every_model
def test_a_seed_decides_the_weights_and_leaves_the_random_state_alone(name: str) -> None:
    make, _ = FACTORIES[name]
    rng = torch.get_rng_state()
    first, second, other = make(3), make(3), make(4)
    assert torch.equal(torch.get_rng_state(), rng)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    make(None)
    assert not torch.equal(torch.get_rng_state(), rng)


@every_model
def test_the_initialisation_is_pytorchs(name: str) -> None:
    """Uniform in ±1/√fan_in, every entry."""
    for parameter in FACTORIES[name][0](0).parameters():
        bound = parameter[0].numel() ** -0.5
        assert parameter.abs().max() <= bound
        if parameter.numel() > 30:
            assert parameter.abs().max() > 0.8 * bound


@every_model
def test_a_configuration_builds_the_network_again(name: str) -> None:
    make, shape = FACTORIES[name]
    model = make(3)
    again = build(model.config, seed=3)
    assert again.config == model.config
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    x = torch.randn(2, *shape)
    assert torch.equal(again(x), model(x))


def test_the_formula_of_a_dense_network() -> None:
    model = mlp(4, 5, 3, activation="squared-relu", seed=0).double()
    v, w = (p.detach() for p in model.parameters())
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = (x @ v.T).clamp(min=0) ** 2 @ w.T
    assert torch.allclose(model(x), expected, rtol=1e-14)
    linear = deep_linear(4, 5, 3, seed=0).double()
    assert torch.allclose(linear(x), x @ v.T @ w.T, rtol=1e-13)


def test_activations() -> None:
    u = torch.tensor([-2.0, 0.0, 3.0])
    found = {name: make()(u).tolist() for name, make in ACTIVATIONS.items()}
    assert found == {
        "identity": [-2.0, 0.0, 3.0],
        "leaky-relu": [pytest.approx(-0.02), 0.0, 3.0],
        "relu": [0.0, 0.0, 3.0],
        "squared-relu": [0.0, 0.0, 9.0],
    }
    assert isinstance(ACTIVATIONS["squared-relu"](), SquaredReLU)


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ("mlp:8,5", ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]),
        ("mlp", ["Flatten", "Linear"]),
        ("mlp:8,activation=squared-relu", ["Flatten", "Linear", "SquaredReLU", "Linear"]),
        ("deep-linear:8,5", ["Flatten", "Linear", "Linear", "Linear"]),
        (
            "cnn:2,3,hidden=4,kernel=3",
            [
                *("Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d"),
                *("Flatten", "Linear", "ReLU", "Linear"),
            ],
        ),
    ],
)
def test_build(spec: str, kinds: list[str]) -> None:
    model = build(spec, input_shape=(1, 8, 8), outputs=3, seed=0)
    assert [type(module).__name__ for module in model] == kinds
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("mpl:8", SpecificationError, "unknown model 'mpl'; did you mean 'mlp'"),
        ("mlp:x", SpecificationError, "expected a whole number, got 'x'"),
        (
            "mlp:8,activation=rlu",
            SpecificationError,
            "unknown activation 'rlu'; did you mean 'relu'",
        ),
        ("mlp:8,act=relu", SpecificationError, "'act'; did you mean 'activation'"),
        ("mlp:8,0", InputError, "at least 1, got 0"),
        ("mlp:-3", InputError, "at least 1, got -3"),
        ("deep-linear:8,activation=relu", SpecificationError, "unknown option of 'deep-linear'"),
        ("cnn:3", SpecificationError, "expected two numbers of channels"),
        ("cnn:3,4,kernel=4", InputError, "expected an odd kernel, got 4"),
        ("cnn:3,4,hidden=0", InputError, "at least 1, got 0"),
        ("", SpecificationError, "model: expected a specification"),
    ],
)
def test_bad_specs(spec: str, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        build(spec, input_shape=(1, 8, 8))


def test_misuse_of_the_factories() -> None:
    with pytest.raises(InputError, match="at least an input and an output width"):
        mlp(5)
    with pytest.raises(InputError, match=r"width: expected a whole number, got 2\.5"):
        mlp(5, 2.5, 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed: expected a whole number"):
        mlp(5, 1, seed=-1)
    for shape in ((8, 8), (1, 3, 8), (1, 8, 8, 8)):
        with pytest.raises(InputError, match=r"inputs of shape \(channels, height, width\)"):
            cnn(shape, 1)
    with pytest.raises(InputError, match="two numbers of channels"):
        cnn((1, 8, 8), 1, channels=(1, 2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config", [{}, {"kind": "vgg"}, {"kind": "mlp"}, {"kind": "cnn"}, {"kind": "mlp", "width": 3}]
)
def test_damaged_configurations(config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="recorded"):
        build(config)


def test_load_weights_takes_all_or_none() -> None:
    model, other = mlp(4, 3, 1, seed=0), mlp(4, 3, 1, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    good = {k: v.clone() for k, v in other.state_dict().items()}
    bad_shape = {**good, "linear2.weight": torch.zeros(2, 3)}
    missing = {k: v for k, v in good.items() if k != "linear2.weight"}
    for weights in (bad_shape, missing, {**good, "linear3.weight": torch.zeros(1)}):
        with pytest.raises(ModelError, match="checkpoint is of another model"):
            load_weights(model, weights)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_weights(model, good)
    assert all(torch.equal(v, good[k]) for k, v in model.state_dict().items())
    assert isinstance(model, nn.Module)
