from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from unit_oracles import NETWORKS, case, laws, scale_layers

import marginflow as mf
from marginflow.errors import InputError, ModelError, NotHomogeneousError
from marginflow.homogeneity import (
    Homogeneity,
    Layer,
    evaluation_mode,
    measure_homogeneity,
    normalized_network,
    power,
)

X = torch.randn((9, 6), generator=torch.Generator().manual_seed(0))


def linear(fan_in: int, fan_out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=bias)


# --- degrees


@pytest.mark.parametrize(
    ("activation", "degrees"),
    [
        ("relu", (1, 1, 1)),
        ("leaky-relu", (1, 1, 1)),
        ("identity", (1, 1, 1)),
        ("squared-relu", (4, 2, 1)),
    ],
)
@pytest.mark.parametrize("outputs", [1, 5])
def test_degrees_of_dense_networks(activation: str, degrees: tuple, outputs: int) -> None:
    """``c_k = q^{L−k}`` with q the degree of the activation."""
    model = mf.models.mlp(6, 8, 7, outputs, activation=activation, seed=0)
    found = measure_homogeneity(model, X)
    assert found.degrees == degrees
    assert found.order == sum(degrees)
    assert [layer.name for layer in found.layers] == [n for n, _ in model.named_parameters()]
    assert all(layer.parameters == (layer.name,) for layer in found.layers)


@pytest.mark.parametrize(
    ("activation", "degrees"), [("relu", (1,) * 4), ("squared-relu", (8, 4, 2, 1))]
)
def test_degrees_of_the_cnn(activation: str, degrees: tuple) -> None:
    model = mf.models.cnn((1, 8, 8), 3, channels=(2, 3), hidden=6, kernel=3, activation=activation)
    assert measure_homogeneity(model, torch.rand(4, 1, 8, 8)).degrees == degrees


def test_a_degree_that_is_no_integer() -> None:
    class Power(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return torch.relu(u) ** 1.5

    found = measure_homogeneity(nn.Sequential(linear(6, 9), Power(), linear(9, 1)), X)
    assert found.degrees == pytest.approx((1.5, 1.0), abs=1e-12)


def test_a_bias_of_the_first_layer_joins_it() -> None:
    model = nn.Sequential(linear(6, 8, bias=True), nn.ReLU(), linear(8, 1))
    found = measure_homogeneity(model, X)
    assert found.layers[0] == Layer("0.weight", ("0.weight", "0.bias"), 1)
    assert found.degrees == (1, 1)
    squared = nn.Sequential(linear(6, 8, bias=True), mf.models.SquaredReLU(), linear(8, 1))
    assert measure_homogeneity(squared, X).degrees == (2, 1)
    nn.init.zeros_(model[0].bias)  # an untrained bias as well
    assert measure_homogeneity(model, X).layers[0].parameters == ("0.weight", "0.bias")


def test_a_linear_model_with_a_bias() -> None:
    assert measure_homogeneity(nn.Linear(6, 1), X).degrees == (1,)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), linear(6, 4), nn.ReLU(), linear(4, 1))
    names = [layer.name for layer in measure_homogeneity(model.eval(), X).layers]
    assert names == ["1.weight", "2.weight", "4.weight"]  # batch norm at the input is a layer


def test_the_first_convolution_may_have_a_bias() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(27, 2)
    )
    found = measure_homogeneity(model, torch.rand(3, 1, 8, 8))
    assert [layer.parameters for layer in found.layers] == [("0.weight", "0.bias"), ("4.weight",)]


def test_tied_weights_count_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(6, 6), linear(6, 6)
            self.b.weight = self.a.weight
            self.c = linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    found = measure_homogeneity(Tied(), X)
    assert found.degrees == (2, 1)
    again = nn.Sequential(shared := linear(6, 6), nn.ReLU(), shared, nn.ReLU(), linear(6, 1))
    assert measure_homogeneity(again, X).degrees == (2, 1)


def test_groups() -> None:
    model = mf.models.mlp(6, 8, 7, 1, activation="squared-relu", seed=0)
    names = [n for n, _ in model.named_parameters()]
    found = measure_homogeneity(model, X, groups=[names[1:]])
    assert found.layers[1] == Layer(names[1], (names[1], names[2]), 3)
    assert found.degrees == (4, 3)
    found = measure_homogeneity(model, X, groups=[[names[2], names[0]]])
    assert [layer.parameters for layer in found.layers] == [(names[2], names[0]), (names[1],)]
    whole = measure_homogeneity(model, X, groups=[names])
    assert whole.degrees == (7,)


def test_groups_that_cannot_be() -> None:
    model = mf.models.mlp(6, 8, 1, seed=0)
    with pytest.raises(InputError, match=r"no trainable parameter 'linear9.weight'"):
        measure_homogeneity(model, X, groups=[["linear9.weight"]])
    with pytest.raises(InputError, match=r"'linear1.weight' stands in two groups"):
        measure_homogeneity(model, X, groups=[["linear1.weight"], ["linear1.weight"]])
    model.linear1.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"no trainable parameter 'linear1.weight'"):
        measure_homogeneity(model, X, groups=[["linear1.weight"]])


def test_frozen_parameters_are_no_layer() -> None:
    model = mf.models.mlp(6, 8, 7, 1, activation="squared-relu", seed=0)
    next(model.parameters()).requires_grad_(False)
    assert measure_homogeneity(model, X).degrees == (2, 1)


@pytest.mark.parametrize("size", [0.0, 1e-60, 1e-12, 1e12, 1e60])
def test_degrees_do_not_hang_on_the_size_of_the_data(size: float) -> None:
    model = mf.models.mlp(6, 8, 7, 1, activation="squared-relu", seed=0)
    assert measure_homogeneity(model, size * X.double()).degrees == (4, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_degrees_of_any_dtype(dtype: torch.dtype) -> None:
    model = mf.models.mlp(6, 8, 7, 1, seed=0).to(dtype)
    assert measure_homogeneity(model, X).degrees == (1, 1, 1)
    assert measure_homogeneity(model, (X * 255).to(torch.uint8)).degrees == (1, 1, 1)


def test_one_example_of_one_sign_is_enough() -> None:
    model = mf.models.mlp(6, 1, 1, seed=0)
    with torch.no_grad():
        model.linear1.weight.copy_(-torch.ones(1, 6))
    assert measure_homogeneity(model, torch.ones(1, 6)).degrees == (1, 1)


# --- what is refused, by name


class FunctionalSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = linear(6, 8), linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.outer(torch.relu(self.inner(x))), dim=1)


class FunctionalBias(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.outer = linear(6, 8), linear(8, 1)
        self.shift = nn.Parameter(torch.full((8,), value))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x) + self.shift))


class Residual(nn.Module):
    """A leaf that takes two tensors, and a hidden bias behind it."""

    class Add(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
            return a + b

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = linear(6, 6), linear(6, 6, bias), linear(6, 1)
        self.add, self.act = self.Add(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.add(self.act(h), b=self.second(h)))


class SharedThenGelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(6, 6), linear(6, 6)
        self.b.weight = self.a.weight
        self.act, self.c = nn.GELU(), linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(torch.relu(self.a(x)))))


def zero_bias() -> nn.Module:
    model = nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 7, bias=True), nn.ReLU(), linear(7, 1))
    nn.init.zeros_(model[2].bias)
    return model


def between(module: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(linear(6, 8), module, nn.ReLU(), linear(8, 1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "hidden bias": (
        lambda: nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 7, True), nn.ReLU(), linear(7, 1)),
        "2.bias",
        r"bias '2.bias' of a hidden layer.*Linear\(…, bias=False\)",
    ),
    "zero bias": (zero_bias, "2.bias", "bias '2.bias' of a hidden layer"),
    "last bias": (
        lambda: nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 1, True)),
        "2.bias",
        "bias '2.bias' of a hidden layer",
    ),
    "convolution's bias": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 2, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(2, 2, 1),
            nn.Flatten(),
            linear(12, 1),
        ),
        "3.bias",
        r"Conv2d\(…, bias=False\)",
    ),
    "batch norm, evaluated": (
        lambda: between(nn.BatchNorm1d(8))().eval(),
        "1",
        r"module '1' \(BatchNorm1d\).*measure raw margins only",
    ),
    "batch norm, training": (between(nn.BatchNorm1d(8)), "1", r"\(BatchNorm1d\)"),
    "batch norm without parameters": (
        lambda: nn.Sequential(linear(6, 8), nn.BatchNorm1d(8, affine=False), linear(8, 1)),
        "1",
        r"\(BatchNorm1d\)",
    ),
    "layer norm": (between(nn.LayerNorm(8)), "1", r"\(LayerNorm\).*raw margins only"),
    "group norm": (between(nn.GroupNorm(2, 8)), "1", r"\(GroupNorm\)"),
    "gelu": (between(nn.GELU()), "1", r"module '1' \(GELU\).*use a positively homogeneous one"),
    "sigmoid": (between(nn.Sigmoid()), "1", r"\(Sigmoid\)"),
    "tanh": (between(nn.Tanh()), "1", r"\(Tanh\)"),
    "softplus": (between(nn.Softplus()), "1", r"\(Softplus\)"),
    "softmax": (
        lambda: nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 3), nn.Softmax(dim=1)),
        "3",
        r"module '3' \(Softmax\)",
    ),
    "gelu behind a tied weight": (SharedThenGelu, "act", r"module 'act' \(GELU\)"),
    "functional bias": (lambda: FunctionalBias(0.3), "shift", "scaling 'shift'"),
    "functional bias of zero": (lambda: FunctionalBias(0.0), "shift", "scaling 'shift'"),
    "residual with a hidden bias": (lambda: Residual(True), "second.bias", "'second.bias'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_homogeneous_is_refused_by_name(name: str, dtype: torch.dtype) -> None:
    make, offender, says = REFUSED[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    with pytest.raises(NotHomogeneousError, match=says) as caught:
        measure_homogeneity(model, X.to(dtype))
    assert caught.value.offender == offender
    assert isinstance(caught.value, ModelError)


def test_a_functional_softmax_is_refused_by_the_name_of_a_parameter() -> None:
    with pytest.raises(NotHomogeneousError, match="does not scale the output") as caught:
        measure_homogeneity(FunctionalSoftmax(), X)
    assert caught.value.offender in ("inner.weight", "outer.weight")


def test_a_residual_network_without_biases_is_homogeneous_as_far_as_it_is() -> None:
    """Both branches scale with the first layer, but only one with the second: refused, by name."""
    with pytest.raises(NotHomogeneousError) as caught:
        measure_homogeneity(Residual(False), X)
    assert caught.value.offender == "second.weight"
    grouped = measure_homogeneity(nn.Sequential(linear(6, 6), nn.ReLU()), X)
    assert grouped.degrees == (1,)


def test_an_unused_parameter_is_named() -> None:
    model = nn.Sequential(linear(6, 4), nn.ReLU(), linear(4, 1))
    model.unused = nn.Parameter(torch.ones(3))  # type: ignore[assignment]
    with pytest.raises(NotHomogeneousError, match="unused"):
        measure_homogeneity(model, X)


@pytest.mark.parametrize("seed", range(3))
def test_dropout_is_refused_as_random(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(linear(6, 30), nn.ReLU(), nn.Dropout(0.5), linear(30, 1))
    rng = torch.get_rng_state()
    with pytest.raises(ModelError, match=r"its module '2'.*is random.*model.eval\(\)"):
        measure_homogeneity(model, X)
    assert torch.equal(torch.get_rng_state(), rng)
    assert measure_homogeneity(model.eval(), X).degrees == (1, 1)


def test_functional_noise_is_refused_as_random() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x + torch.randn_like(x))

    with pytest.raises(ModelError, match="is random"):
        measure_homogeneity(Noise(), X)


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (nn.ReLU(), X, "no trainable parameter"),
        (nn.Linear(5, 1), X, r"does not take inputs of shape \(18, 6\)"),
        (nn.LSTM(6, 2), X, "expected a tensor as output, got tuple"),
        (nn.Linear(6, 1), X * math.nan, "not finite"),
        (nn.Linear(6, 1), X * math.inf, "not finite"),
    ],
)
def test_models_that_cannot_be_measured(model: nn.Module, x: Tensor, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        measure_homogeneity(model, x)


def test_a_dead_network_cannot_be_measured() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(-(self.w * x).abs()).sum(1)

    with pytest.raises(ModelError, match=r"0 at every probe.*initialise it anew"):
        measure_homogeneity(Dead(), X)


@pytest.mark.parametrize("x", [torch.zeros(0, 6), torch.tensor(1.0), [[1.0]], None])
def test_probes_that_are_none(x: object) -> None:
    with pytest.raises(InputError, match="expected inputs of shape"):
        measure_homogeneity(mf.models.mlp(6, 1, seed=0), x)  # type: ignore[arg-type]


# --- nothing is left behind


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(training: bool) -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(6),  # at the input: legitimate, and its statistics must not move
        linear(6, 8),
        nn.ReLU(inplace=True),
        linear(8, 1),
    ).train(training)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[3].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    x, rng = X.clone(), torch.get_rng_state()
    measure_homogeneity(model, x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert value.dtype == state[key].dtype
    assert [id(p) for p in model.parameters()] == identities
    assert [m.training for m in model.modules()] == [training] * 5
    assert (model[1].weight.grad == 1).all()
    assert model[0].weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["gelu", "batch norm, training", "hidden bias"])
def test_refusing_leaves_no_trace_either(name: str) -> None:
    model = REFUSED[name][0]()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(NotHomogeneousError):
        measure_homogeneity(model, X)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_measuring_twice_gives_the_same() -> None:
    model = mf.models.mlp(6, 8, 7, 1, activation="squared-relu", seed=0)
    assert measure_homogeneity(model, X) == measure_homogeneity(model, X)


# --- norms


@pytest.mark.parametrize("network", NETWORKS)
def test_norms_against_numpy(network: str) -> None:
    c = case(network)
    found = measure_homogeneity(c.model, c.x)
    rho = [np.linalg.norm(p.detach().numpy().ravel()) for p in c.model.parameters()]
    norms = found.norms(c.model)
    assert norms.dtype == torch.float64
    assert not norms.requires_grad
    np.testing.assert_allclose(norms.numpy(), rho, rtol=1e-15)
    expected = np.prod([r**c for r, c in zip(rho, found.degrees, strict=True)])
    assert found.norm_product(c.model) == pytest.approx(expected, rel=4e-15)
    total = math.sqrt(sum(r * r for r in rho))
    assert found.total_norm(c.model) == pytest.approx(total, rel=1e-15)


def test_the_norm_of_a_group_is_that_of_all_its_parameters() -> None:
    model = nn.Sequential(linear(6, 8, bias=True), nn.ReLU(), linear(8, 1))
    found = measure_homogeneity(model, X).norms(model)
    entries = np.concatenate([p.detach().double().numpy().ravel() for p in model[0].parameters()])
    assert found[0].item() == pytest.approx(np.linalg.norm(entries), rel=1e-15)


def test_norms_of_float32_are_taken_in_float64() -> None:
    model = mf.models.mlp(6, 8, 1, seed=0)
    homogeneity = measure_homogeneity(model, X)
    scale_layers(model, [1e30, 1e-30])
    expected = [np.linalg.norm(p.detach().numpy().astype(float)) for p in model.parameters()]
    np.testing.assert_allclose(homogeneity.norms(model).numpy(), expected, rtol=1e-15)


def test_powers_of_two_are_exact_in_the_norm_product() -> None:
    c = case("squared")
    homogeneity = measure_homogeneity(c.model, c.x)
    before = homogeneity.norm_product(c.model)
    scale_layers(c.model, [2.0, 0.25, 8.0])
    assert homogeneity.norm_product(c.model) == before * 2.0**4 * 0.25**2 * 8


def test_an_overflowing_product_is_infinite() -> None:
    c = case("squared")
    homogeneity = measure_homogeneity(c.model, c.x)
    scale_layers(c.model, [1e100, 1, 1])
    assert homogeneity.norm_product(c.model) == math.inf
    assert power(10.0, 400) == math.inf
    assert power(3.0, 2) == 9


def test_norms_of_another_model() -> None:
    homogeneity = measure_homogeneity(mf.models.mlp(6, 8, 7, 1, seed=0), X)
    with pytest.raises(ModelError, match=r"no parameter 'linear3.weight'.*another model"):
        homogeneity.norms(mf.models.mlp(6, 8, 1, seed=0))


# --- laws


@pytest.mark.parametrize("network", NETWORKS)
def test_normalized_network(network: str) -> None:
    """``f(x; W) = ρ f(x; Ŵ)``, every layer of norm 1."""
    c = case(network)
    homogeneity = measure_homogeneity(c.model, c.x)
    state = {k: v.clone() for k, v in c.model.state_dict().items()}
    unit = normalized_network(c.model, homogeneity)
    assert (homogeneity.norms(unit) - 1).abs().max() <= 1e-12
    with torch.no_grad():
        found, expected = homogeneity.norm_product(c.model) * unit(c.x), c.model(c.x)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert all(torch.equal(v, state[k]) for k, v in c.model.state_dict().items())


def test_a_layer_of_zero_cannot_be_normalised() -> None:
    model = mf.models.mlp(6, 8, 1, seed=0)
    nn.init.zeros_(model.linear2.weight)
    homogeneity = measure_homogeneity(model, X)  # the degree is that of the architecture
    assert homogeneity.degrees == (1, 1)
    with pytest.raises(ModelError, match=r"layer 'linear2.weight' is 0"):
        normalized_network(model, homogeneity)


architectures = st.tuples(
    st.lists(st.integers(2, 9), min_size=0, max_size=3),
    st.sampled_from(sorted(mf.models.ACTIVATIONS)),
    st.integers(1, 3),
    st.integers(0, 2**31),
)


def build(architecture: tuple[list[int], str, int, int]) -> tuple[nn.Module, Tensor]:
    hidden, activation, outputs, seed = architecture
    model = mf.models.mlp(4, *hidden, outputs, activation=activation, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    return model, torch.randn((6, 4), generator=generator, dtype=torch.float64)


def measured(model: nn.Module, x: Tensor) -> Homogeneity | None:
    """None for the rare draw whose units are all dead."""
    try:
        return measure_homogeneity(model, x)
    except ModelError as error:
        if "dead" not in str(error):
            raise
        return None


@laws
@given(architectures)
def test_eulers_identity(architecture: tuple[list[int], str, int, int]) -> None:
    """Lemma 9: ``⟨W_k, ∂f/∂W_k⟩ = c_k f`` for every layer, output and example."""
    model, x = build(architecture)
    homogeneity = measured(model, x)
    if homogeneity is None:
        return
    parameters = list(model.parameters())
    for f in model(x).reshape(-1):
        gradients = torch.autograd.grad(f, parameters, retain_graph=True)
        for parameter, g, degree in zip(parameters, gradients, homogeneity.degrees, strict=True):
            w = parameter.detach()
            size = float((w * g).abs().sum()) + 1e-300
            assert abs(float((w * g).sum()) - degree * f.item()) <= 1e-12 * size


@laws
@given(architectures, st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_scaling_law(architecture: tuple[list[int], str, int, int], factors: list[float]) -> None:
    """``f(x; a_1 W_1, …, a_L W_L) = Π a_k^{c_k} f(x; W)``."""
    model, x = build(architecture)
    homogeneity = measured(model, x)
    if homogeneity is None:
        return
    factors = factors[: len(homogeneity.layers)]
    with torch.no_grad():
        before = model(x)
        rho = homogeneity.norm_product(model)
        scale_layers(model, factors)
        after = model(x)
    expected = math.prod(a**c for a, c in zip(factors, homogeneity.degrees, strict=True))
    assert (after - expected * before).abs().max() <= 1e-11 * expected * before.abs().max()
    assert homogeneity.norm_product(model) == pytest.approx(expected * rho, rel=1e-12)


def test_evaluation_mode_restores_a_mixture_also_after_an_error() -> None:
    model = nn.Sequential(linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    modes = [m.training for m in model.modules()]
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert [m.training for m in model.modules()] == modes
