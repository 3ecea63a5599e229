"""The fused engine against autograd: the same numbers to rounding, for every network and attack it serves."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear, FiniteSet
from marginflow.engine import (
    AutogradEngine,
    DenseNetwork,
    FusedEngine,
    build,
    choose_products,
    multiplying,
)
from marginflow.engine import _products as products_module
from marginflow.errors import DataError, InputError, ModelError, SpecificationError
from marginflow.losses import get_loss
from marginflow.margins import clean_and_adversarial
from marginflow.models import deep_linear, mlp

SHAPE = (3, 4)
BOUNDS = (-2.0, 2.0)

NETWORKS: dict[str, Any] = {
    "relu": lambda: mlp(12, 9, 7, 1, seed=1),
    "leaky": lambda: mlp(12, 9, 7, 1, activation="leaky-relu", seed=1),
    "squared": lambda: mlp(12, 9, 7, 1, activation="squared-relu", seed=1),
    "linear": lambda: deep_linear(12, 5, 4, 1, seed=1),
    "one-layer": lambda: mlp(12, 1, seed=1),
    "classes": lambda: mlp(12, 9, 7, 4, seed=1),
    "two-outputs": lambda: mlp(12, 9, 2, activation="squared-relu", seed=1),
}
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "fgm": FGM(0.3),
    "fgm-bounds": FGM(0.3, bounds=BOUNDS),
    "fgsm": FGSM(0.1),
    "fgsm-bounds": FGSM(0.1, bounds=BOUNDS),
    "fgsm-loss": FGSM(0.1, objective="loss"),
    "pgd-linf": PGD("linf", 0.1, steps=4),
    "pgd-linf-bounds": PGD("linf", 0.1, steps=3, step_size=0.07, bounds=BOUNDS),
    "pgd-linf-random": PGD("linf", 0.1, steps=3, random_start=True, bounds=BOUNDS),
    "pgd-one-step": PGD("linf", 0.1, steps=1, step_size=0.2, bounds=BOUNDS),
    "pgd-l2": PGD("l2", 0.4, steps=3),
    "pgd-l2-random": PGD("l2", 0.4, steps=3, random_start=True, bounds=BOUNDS),
    "finite": FiniteSet(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5)) / 9),
    "nothing": FGSM(0.0),
}


def batch(network: str, n: int = 11, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64) * 0.8).clamp(*BOUNDS)
    outputs = list(NETWORKS[network]().parameters())[-1].shape[0]
    y = torch.randint(max(outputs, 2), (n,), generator=generator)
    return x.to(dtype), 2 * y - 1 if outputs == 1 else y


def engines(
    network: str, attack: str, loss: str, dtype: torch.dtype
) -> tuple[AutogradEngine, FusedEngine]:
    one = NETWORKS[network]().to(dtype)
    two = copy.deepcopy(one)
    scorer = get_loss(loss)
    return (
        AutogradEngine(one, scorer, ATTACKS[attack]),
        FusedEngine(two, scorer, ATTACKS[attack], shape=SHAPE),
    )


def loss_for(network: str, binary: str = "logistic") -> str:
    return "cross-entropy" if network in ("classes", "two-outputs") else binary


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_gradient_in_float64(network: str, attack: str, loss: str) -> None:
    """Loss, margins, outputs and every layer's gradient to 1e-12."""
    loss = loss_for(network, loss)
    slow, fast = engines(network, attack, loss, torch.float64)
    x, y = batch(network)
    a, b = slow(x, y, generator()), fast(x, y, generator())
    assert apart(b.loss, a.loss) < 1e-12
    assert apart(b.margins, a.margins) < 1e-12
    assert apart(b.outputs, a.outputs.reshape(b.outputs.shape)) < 1e-12
    assert len(a.gradients) == len(b.gradients)
    for expected, found in zip(a.gradients, b.gradients, strict=True):
        assert found.shape == expected.shape
        assert apart(found, expected) < 1e-12
    assert apart(fast.scores(x, y, generator()), slow.scores(x, y, generator())) < 1e-12
    assert fast.log_loss(x, y, generator(), batch_size=4) == pytest.approx(
        slow.log_loss(x, y, generator(), batch_size=4), rel=1e-12
    )


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_margins(network: str, attack: str) -> None:
    """Margins, dead inputs and ln L of both engines, in batches of 4."""
    x, y = batch(network)
    x[2] = 0
    loss = loss_for(network)
    a, b = (
        mf.adversarial_margins(
            NETWORKS[network]().double(), x, y, ATTACKS[attack], batch_size=4, loss=loss, engine=e
        )
        for e in ("autograd", "fused")
    )
    assert apart(b.values, a.values) < 1e-12
    assert torch.equal(a.dead_inputs, b.dead_inputs)
    assert b.log_loss == pytest.approx(a.log_loss, rel=1e-12)
    model = NETWORKS[network]().double()
    clean, hit = clean_and_adversarial(
        model, x, y, ATTACKS[attack], batch_size=4, loss=loss, engine="fused"
    )
    alone = mf.adversarial_margins(model, x, y, None, batch_size=4, loss=loss, engine="fused")
    assert torch.equal(hit.values, b.values)
    assert torch.equal(clean.values, alone.values)
    assert clean.log_loss == alone.log_loss
    assert not bool(clean.dead_inputs.any())


@pytest.mark.parametrize("network", ["relu", "classes"])
def test_margins_refuse_the_same_inputs(network: str) -> None:
    x, y = batch(network)
    for engine in ("autograd", "fused"):
        model = NETWORKS[network]().double()
        with pytest.raises(DataError, match="labels: expected"):
            mf.adversarial_margins(model, x, y + 7, FGSM(0.1), engine=engine)
        with pytest.raises(DataError, match="bounds"):
            mf.adversarial_margins(model, x + 3, y, FGSM(0.1, bounds=BOUNDS), engine=engine)
    with pytest.raises(ModelError, match="ExactLinear"):
        mf.adversarial_margins(model, x, y, ExactLinear(2, 0.1), engine="fused")


@pytest.mark.parametrize("attack", ["none", "fgsm-bounds", "pgd-linf", "fgm"])
@pytest.mark.parametrize("network", ["relu", "squared", "classes"])
def test_the_same_gradient_in_float32(network: str, attack: str) -> None:
    """To 2e-5: some twenty roundings of float32 in sums of a dozen terms."""
    slow, fast = engines(network, attack, loss_for(network), torch.float32)
    x, y = batch(network, dtype=torch.float32)
    a, b = slow(x, y, generator()), fast(x, y, generator())
    for expected, found in zip(a.gradients, b.gradients, strict=True):
        assert found.dtype == torch.float32
        assert apart(found, expected) < 2e-5


@pytest.mark.parametrize("attack", ["none", "fgsm", "pgd-linf-random", "pgd-l2"])
@pytest.mark.parametrize("network", NETWORKS)
def test_descend_is_a_step_along_the_gradient(network: str, attack: str) -> None:
    slow, fast = engines(network, attack, loss_for(network), torch.float64)
    x, y = batch(network)
    expected = [
        p.detach() - 0.3 * g
        for p, g in zip(slow.parameters, slow(x, y, generator()).gradients, strict=True)
    ]
    with pytest.raises(RuntimeError):
        fast.last_gradients()
    gradients = slow(x, y, generator()).gradients
    result = fast.descend(x, y, 0.3, generator())
    assert result.gradients == ()
    for formed, g in zip(fast.last_gradients(), gradients, strict=True):
        assert apart(formed, g) < 1e-12
    for found, value in zip(fast.parameters, expected, strict=True):
        assert apart(found.detach(), value) < 1e-13
    fast.scores(x, y, generator())
    with pytest.raises(RuntimeError):
        fast.last_gradients()


@pytest.mark.parametrize("network", ["relu", "classes"])
def test_count_and_reference(network: str) -> None:
    """``count`` replaces n in the mean; ``log_reference`` divides the gradient by e^r."""
    slow, fast = engines(network, "fgsm", loss_for(network), torch.float64)
    x, y = batch(network)
    plain = fast(x, y).gradients
    for engine in (slow, fast):
        counted = engine(x, y, count=44)
        assert float(counted.loss) == pytest.approx(float(engine(x, y).loss) / 4, rel=1e-14)
        scaled = engine(x, y, None, 1.5).gradients
        for g, quarter, shrunk in zip(plain, counted.gradients, scaled, strict=True):
            assert apart(4 * quarter, g) < 1e-12
            assert apart(shrunk * torch.e**1.5, g) < 1e-12


def test_a_reference_where_the_loss_underflows() -> None:
    """At margins in the thousands L is 0 in float64 and the gradient of L/e^r is not."""
    model = mlp(12, 5, 1, seed=1).double()
    with torch.no_grad():
        model.get_parameter("linear2.weight").mul_(1e5)
    x, _ = batch("relu", n=30)
    f = model(x).detach().squeeze(1)
    x, y = x[f.abs() > 1000], torch.sign(f[f.abs() > 1000]).long()
    slow = AutogradEngine(model, get_loss("exponential"), None)
    fast = FusedEngine(model, get_loss("exponential"), None, shape=SHAPE)
    reference = fast.log_loss(x, y)
    assert reference < -800
    for expected, found in zip(
        slow(x, y, None, reference).gradients, fast(x, y, None, reference).gradients, strict=True
    ):
        assert float(expected.abs().max()) > 0
        assert apart(found, expected) < 1e-10


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    model = mlp(12, 5, 1, seed=1)
    with torch.no_grad():
        model.get_parameter("linear1.weight").mul_(1e25)
        model.get_parameter("linear2.weight").mul_(-1e25)
    before = copy.deepcopy(model.state_dict())
    x, y = batch("relu", dtype=torch.float32)
    fast = FusedEngine(model, get_loss("exponential"), None, shape=SHAPE)
    result = fast.descend(x, y, 0.1)
    assert not bool(torch.isfinite(result.loss))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_results_survive_the_next_call() -> None:
    """Buffers are used again; gradients, margins, loss and scores are the caller's own."""
    slow, fast = engines("relu", "fgsm", "logistic", torch.float64)
    x, y = batch("relu")
    first, scores = fast(x, y), fast.scores(x, y)
    kept = [g.clone() for g in first.gradients], first.margins.clone(), scores.clone()
    fast(x.flip(0) / 2, y.flip(0))
    fast.descend(x.flip(0), y, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first.gradients, kept[0], strict=True))
    assert torch.equal(first.margins, kept[1])
    assert torch.equal(scores, kept[2])
    del slow


def test_many_batch_sizes_in_bounded_memory() -> None:
    network = DenseNetwork.of(mlp(12, 9, 1, seed=1), SHAPE)
    assert network is not None
    for n in range(1, 200):
        network.forward(torch.zeros(12, n))
    assert sum(network._buffers) <= 8192


class Skip(nn.Sequential):
    """A Sequential by name only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x)
        return out + x[:, :1]


def hooked() -> nn.Module:
    model = mlp(12, 5, 1, seed=1)
    model.get_submodule("linear1").register_forward_hook(lambda m, i, o: 2 * o)
    return model


def patched() -> nn.Module:
    model = mlp(12, 5, 1, seed=1)
    model.get_submodule("linear1").forward = lambda x: x[:, :5]  # type: ignore[method-assign]
    return model


def shared() -> nn.Module:
    layer = nn.Linear(12, 12, bias=False)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(12, 1, bias=False))


def frozen() -> nn.Module:
    model = mlp(12, 5, 1, seed=1)
    model.get_parameter("linear1.weight").requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 1, bias=False)),
        nn.Sequential(nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False)),
        nn.Sequential(nn.Linear(12, 5, bias=False), nn.Dropout(0.5), nn.Linear(5, 1, bias=False)),
        nn.Sequential(nn.ReLU(), nn.Linear(12, 1, bias=False)),
        nn.Sequential(nn.Linear(12, 1, bias=False), nn.ReLU()),
        nn.Sequential(nn.Linear(12, 5, bias=False), nn.Linear(4, 1, bias=False)),
        Skip(nn.Linear(12, 1, bias=False)),
        nn.Sequential(),
        mf.models.cnn((1, 8, 8), 1, channels=(2, 2), hidden=4, kernel=3, seed=0),
        mf.models.diagonal_linear(12, 2, seed=0),
        hooked(),
        patched(),
        shared(),
        frozen(),
    ],
    ids=[
        *("bias", "tanh", "dropout", "activation-first", "activation-last", "shapes", "skip"),
        *("empty", "cnn", "diagonal", "hook", "patched", "shared", "frozen"),
    ],
)
def test_other_networks_are_left_to_autograd(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="engine='autograd'"):
        FusedEngine(model, get_loss("logistic"), None, shape=(12,))
    found = build(model, get_loss("logistic"), None, shape=(12,), batch_size=5)
    assert found.name == "autograd"


def test_one_activation_module_used_twice() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(nn.Linear(12, 6, bias=False), relu, nn.Linear(6, 5, bias=False)),
        nn.Identity(),
        relu,
        nn.Linear(5, 1, bias=False),
    ).double()
    network = DenseNetwork.of(model, (12,))
    assert network is not None
    x = torch.randn(4, 12, dtype=torch.float64)
    assert apart(network.forward(x.T).T, model(x).detach()) < 1e-14


def test_examples_that_are_not_flattened() -> None:
    """A linear layer acts on the last axis of an image: not what the products do."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    assert DenseNetwork.of(model, (3, 4)) is None
    assert DenseNetwork.of(model, (4,)) is not None


def test_flattening_the_batch_is_no_dense_network() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Flatten(0))
    assert model(torch.zeros(3, 4)).shape == (6,)
    assert DenseNetwork.of(model, (4,)) is None


def test_which_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MARGINFLOW_ENGINE", raising=False)
    model, loss = mlp(12, 5, 1, seed=1), get_loss("logistic")

    def name(attack: Attack | None = None, **options: Any) -> str:
        derivative = options.pop("derivative", "detached")
        return build(model, loss, attack, derivative, shape=SHAPE, batch_size=4, **options).name

    assert name() == name(FGSM(0.1)) == "fused"
    assert name(FGM(0.1), derivative="total") == "autograd"
    assert name(ExactLinear(2, 0.1)) == "autograd"
    assert name(engine="autograd") == "autograd"
    with pytest.raises(ModelError, match="derivative='detached'"):
        name(FGM(0.1), derivative="total", engine="fused")
    with pytest.raises(SpecificationError, match="fused"):
        name(engine="fuse")
    with pytest.raises(SpecificationError, match="bf16"):
        name(perturbation_precision="bf61")
    with pytest.raises(InputError, match="needs the fused engine"):
        name(FGSM(0.1), engine="autograd", perturbation_precision="bf16")
    with pytest.raises(InputError, match="float32"):
        build(
            mlp(12, 5, 1, seed=1).double(),
            loss,
            None,
            shape=SHAPE,
            batch_size=4,
            perturbation_precision="bf16",
        )
    monkeypatch.setenv("MARGINFLOW_ENGINE", "autograd")
    assert name() == "autograd"
    assert name(engine="fused") == "fused"
    monkeypatch.setenv("MARGINFLOW_ENGINE", "quick")
    with pytest.raises(SpecificationError, match="MARGINFLOW_ENGINE"):
        name()


def test_data_are_checked_once() -> None:
    _, fast = engines("relu", "fgsm-bounds", "logistic", torch.float64)
    x, y = batch("relu")
    fast.check(x, y)
    with pytest.raises(DataError, match="−1 and \\+1"):
        fast.check(x, y.clamp_min(0))
    with pytest.raises(DataError, match="bounds"):
        fast.check(x + 3, y)


def test_bf16_perturbs_inside_the_ball_and_trains_in_float32() -> None:
    """The perturbed inputs differ by a flipped sign here and there; the step at them is float32's."""
    model = mlp(12, 64, 32, 1, seed=1)
    attack = FGSM(0.1, bounds=BOUNDS)
    fast = FusedEngine(
        model, get_loss("logistic"), attack, shape=SHAPE, perturbation_precision="bf16"
    )
    x, y = batch("relu", n=200, dtype=torch.float32)
    for _ in range(3):
        fast.descend(x, y, 0.1)  # the low precision copy follows the weights
    z = fast.perturbed(x, y)
    exact = x + attack(model, x, y).delta
    assert float((z - x).abs().max()) <= 0.1 * (1 + 1e-6)
    assert bool(((z >= BOUNDS[0]) & (z <= BOUNDS[1])).all())
    agree = float(((z - exact).abs() < 1e-6).float().mean())
    assert 0.95 < agree < 1
    assert z.dtype == torch.float32
    f = model(z).squeeze(1)
    assert apart(fast.scores(x, y), (f * y).detach()) < 2e-6


def test_the_products_setting_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()

    def fail() -> None:
        with multiplying("onednn"):
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_float32_matmul_precision() == before


def test_the_chosen_products_have_the_accuracy_of_float32() -> None:
    weight = torch.randn(512, 784, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    products = choose_products(weight, 80)
    assert torch.get_float32_matmul_precision() == before
    x = torch.randn(80, 784, generator=torch.Generator().manual_seed(1))
    with multiplying(products):
        found = x @ weight.T
    exact = x.double() @ weight.double().T
    assert float((found - exact).abs().max() / exact.abs().max()) < 2e-6
    assert choose_products(weight.double(), 80) == "default"
    assert choose_products(weight[:4, :4], 4) == "default"


@pytest.mark.parametrize(
    ("seconds", "spoiled", "expected"),
    [(2.0, False, "onednn"), (1.2, False, "default"), (2.0, True, "default")],
    ids=["faster", "hardly faster", "faster and of lower precision"],
)
def test_onednn_is_chosen_for_speed_and_never_at_a_loss_of_accuracy(
    seconds: float, spoiled: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which the default takes ``seconds`` and oneDNN 1, whatever this processor has."""
    clock, kind = [0.0], ["default"]

    @contextlib.contextmanager
    def with_products(products: str) -> Iterator[None]:
        kind[0] = products
        yield

    multiply = torch.mm

    def timed(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        clock[0] += seconds if kind[0] == "default" else 1.0
        if spoiled and kind[0] == "onednn":
            a = a.bfloat16().float()
        return multiply(a, b, out=out)

    monkeypatch.setattr(products_module, "multiplying", with_products)
    monkeypatch.setattr(products_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(products_module, "_chosen", {})
    monkeypatch.setattr(torch, "mm", timed)
    assert choose_products(torch.zeros(128, 256), 64) == expected
