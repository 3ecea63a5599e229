"""Bounds by the real auto-LiRPA: exact minima of tiny networks, and what it leaves behind."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from exact_minima import evaluate, in_l2, in_linf, specifications
from marginflow.errors import ModelError

pytestmark = pytest.mark.extras

METHODS: tuple[mf.certified.Method, ...] = ("crown", "interval", "norms")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relu_network(seed: int, *widths: int, bias: bool = True) -> nn.Sequential:
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for a, b in pairwise(widths):
            modules += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def as_steps(model: nn.Sequential, shape: tuple[int, ...]) -> list[Any]:
    """The network of nested sequences for the oracle, by the matrices that its layers are."""
    found: list[Any] = []
    for module in model:
        side = math.prod(shape)
        zero = torch.zeros(1, *shape, dtype=torch.float64)
        if isinstance(module, nn.ReLU):
            found.append("relu")
        elif isinstance(module, nn.MaxPool2d):
            places = torch.arange(side).double().reshape(1, *shape)
            k = int(module.kernel_size)  # type: ignore[arg-type]
            groups = torch.nn.functional.unfold(
                places.reshape(shape[0], 1, *shape[1:]), k, stride=k
            )
            found.append(groups.permute(0, 2, 1).reshape(-1, k * k).long().tolist())
        elif not isinstance(module, nn.Flatten):
            with torch.no_grad():
                b = module(zero).flatten()
                eye = torch.eye(side, dtype=torch.float64).reshape(-1, *shape)
                W = (module(eye).flatten(1) - b).T
            found.append((W.numpy(), b.numpy()))
        shape = tuple(module(zero).shape[1:])
    return found


def sandwich(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    attack: mf.attacks.Attack,
    exact: list[tuple[float, float]],
    method: mf.certified.Method,
) -> mf.Margins:
    """Certified ≤ exact ≤ attacked, example by example: the bound itself, before any adjustment."""
    alone = mf.certified_margins(model, x, y, attack, method=method)
    assert alone.method == method
    both = mf.adversarial_margins(model, x, y, attack, certified=method, normalize=False)
    rounding = 1e-5 if next(model.parameters()).dtype == torch.float32 else 1e-6
    for i, (value, attained) in enumerate(exact):
        assert attained == pytest.approx(value, abs=2e-5)  # the solver's tolerance
        assert float(alone.values[i]) <= attained
        assert value <= float(both.values[i]) + rounding
    assert bool((both.width >= 0).all())
    return both


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_exact_minima_in_linf(seed: int, outputs: int, bounds: tuple[float, float] | None) -> None:
    """By mixed-integer programs; in float32 on odd seeds, without biases on every third."""
    dtype = torch.float32 if seed % 2 else torch.float64
    widths = [(4, 6, outputs), (3, 5, 4, outputs), (6, 8, outputs)][seed % 3]
    model = relu_network(seed, *widths, bias=seed % 3 > 0).to(dtype)
    x = draw(seed + 20, 3, widths[0]).sigmoid().to(dtype)
    y = torch.arange(3) if outputs == 3 else torch.tensor([1, -1, 1])
    eps = (0.02, 0.1, 0.4)[seed % 3]
    attack = mf.attacks.PGD("linf", eps, steps=40, bounds=bounds)
    steps = as_steps(model.double(), (widths[0],))
    exact = []
    for xi, yi in zip(x.double(), y, strict=True):
        pairs = [
            in_linf(steps, xi.numpy(), c, eps, bounds) for c in specifications(int(yi), outputs)
        ]
        exact.append((min(p[0] for p in pairs), min(p[1] for p in pairs)))
    model = model.to(dtype)
    found = {name: sandwich(model, x, y, attack, exact, name) for name in METHODS}
    crown, interval = (found[name].certified for name in ("crown", "interval"))
    assert crown is not None
    assert interval is not None
    assert bool((crown.values >= interval.values).all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outputs", [1, 2])
def test_exact_minima_in_l2(seed: int, outputs: int) -> None:
    """By a cone program for every activation pattern."""
    model = relu_network(seed, 3, 4, outputs).double()
    x, y = draw(seed + 40, 2, 3), torch.tensor([0, 1]) if outputs == 2 else torch.tensor([1, -1])
    eps = 0.1 * (seed + 1)
    attack = mf.attacks.PGD("l2", eps, steps=40)
    exact = []
    for xi, yi in zip(x, y, strict=True):
        (c,) = specifications(int(yi), outputs)
        exact.append(in_l2(as_steps(model, (3,)), xi.numpy(), c, eps))
    for name in METHODS:
        sandwich(model, x, y, attack, exact, name)


@pytest.mark.parametrize("seed", range(3))
def test_exact_minima_of_convolutions_batch_norm_and_max_pools(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(2)
        norm.running_mean, norm.running_var = torch.randn(2), torch.rand(2) + 0.5
        norm.weight.data, norm.bias.data = torch.randn(2), torch.randn(2)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 2),
            norm,
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 2, 2, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(3) if seed else nn.Identity(),
            nn.Flatten(),
            nn.Linear(2 if seed else 18, 3),
        ).double()
    model.eval()
    x, y = draw(seed, 3, 1, 5, 5).sigmoid(), torch.arange(3)
    attack = mf.attacks.PGD("linf", 0.05, steps=40, bounds=(0, 1))
    steps = as_steps(model, (1, 5, 5))
    np.testing.assert_allclose(
        evaluate(steps, x[0].flatten().numpy()), model(x[:1])[0].detach().numpy(), atol=1e-12
    )
    exact = []
    for xi, yi in zip(x, y, strict=True):
        pairs = [
            in_linf(steps, xi.flatten().numpy(), c, 0.05, (0.0, 1.0))
            for c in specifications(int(yi), 3)
        ]
        exact.append((min(p[0] for p in pairs), min(p[1] for p in pairs)))
    for name in METHODS:
        sandwich(model, x, y, attack, exact, name)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_exact_where_the_ball_meets_no_kink(p: float) -> None:
    """A network that is linear on the ball: ``m − ε ‖w‖_q``; crown and interval reach it."""
    model = relu_network(1, 5, 4, 1).double()
    linear, last = model[0], model[2]
    assert isinstance(linear, nn.Linear)
    assert isinstance(last, nn.Linear)
    linear.bias.data = torch.full((4,), 20.0).double()
    x = draw(3, 6, 5)
    w = (last.weight @ linear.weight)[0].detach().numpy()
    q = 1.0 if math.isinf(p) else (math.inf if p == 1 else p / (p - 1))
    exact = model(x)[:, 0].detach() - 0.1 * float(np.linalg.norm(w, q))
    attack = mf.attacks.ExactLinear(p, 0.1)
    found = mf.certified_margins(model, x, torch.ones(6), attack, method="crown")
    assert bool((found.values <= exact).all())
    torch.testing.assert_close(found.values, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
def test_on_deep_linear_networks_all_three_coincide(p: float) -> None:
    model = mf.models.deep_linear(6, 5, 4, 1, seed=0).double()
    x, y = draw(0, 30, 6), torch.arange(30) % 2 * 2 - 1
    attack = mf.attacks.ExactLinear(p, 0.2)
    found = mf.adversarial_margins(model, x, y, attack, certified="crown")
    assert float(found.width.max()) < 1e-11
    assert float(found.width.min()) >= 0


def test_the_demo_network() -> None:
    """The network of ``marginflow demo``, trained less long: certified ≤ attacked for every example."""
    data = mf.load("digits:3,8")
    attack = mf.attacks.FGSM(0.1)
    run = mf.train("mlp:128,32", data, attack=attack, lr=0.1, batch_size=64, epochs=40, seed=0)
    model = run.model
    assert model is not None
    for eps in (0.01, 0.05, 0.1):
        pgd = mf.attacks.PGD("linf", eps, steps=20, bounds=data.bounds)
        for name in METHODS:
            alone = mf.certified_margins(model, data.x, data.y, pgd, method=name)
            found = mf.adversarial_margins(model, data.x, data.y, pgd, certified=name)
            assert bool((alone.values <= found.values).all())
            relative = float(found.width.median() / found.values.median())
            print(
                f"ε = {eps}, {name}: {found.certified_accuracy:.3f} certified, "
                f"{found.accuracy:.3f} attacked, median width {relative:.2g} of the median margin"
            )
            if eps == 0.01 and name == "crown":
                assert found.certified_accuracy > 0.9  # a bound that says something


def test_auto_takes_crown_where_it_can_and_says_why_where_not() -> None:
    attack = mf.attacks.FGSM(0.05)
    x, y = draw(0, 5, 6), torch.ones(5)
    plain = mf.certified_margins(mf.models.mlp(6, 4, 1, seed=0), x, y, attack)
    assert (plain.method, plain.reason) == ("crown", "auto-LiRPA takes this model")
    squared = mf.models.mlp(6, 4, 1, activation="squared-relu", seed=0)
    other = mf.certified_margins(squared, x, y, attack)
    assert other.method == "norms"
    assert "operation 'square'" in other.reason
    # Matrices of 16,384 × 16,384 for an example are for those who ask for them.
    large = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)), nn.Flatten())
    image = torch.rand(1, 1, 128, 128)
    found = mf.certified_margins(
        nn.Sequential(large, nn.Linear(128 * 128, 1)), image, y[:1], attack
    )
    assert found.method in ("interval", "norms")
    assert "GiB an example" in found.reason
    with pytest.raises(ModelError, match="'square'"):
        mf.certified_margins(squared, x, y, attack, method="crown")
    # An activation at the inputs: there the library takes an ℓ2 ball for a point.
    first = nn.Sequential(nn.ReLU(), nn.Linear(6, 1))
    with pytest.raises(ModelError, match="'relu'"):
        mf.certified_margins(first, x, y, mf.attacks.FGM(0.1), method="interval")
    assert mf.certified_margins(first, x, y, attack, method="interval").method == "interval"


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, stride=1), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, ceil_mode=True)],
    ids=["overlap", "dilation", "ceil"],
)
def test_pools_that_the_library_misreads_are_refused(pool: nn.Module) -> None:
    """Release 0.3 ignores dilation and ceil_mode."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(1))
    x = torch.rand(2, 1, 6, 6)
    model(x)
    with pytest.raises(ModelError, match="'max_pool2d' with padding, overlap or other options"):
        mf.certified_margins(model, x, torch.ones(2), mf.attacks.FGSM(0.1), method="crown")


class Residual(nn.Module):
    """One output (n,), a constant taken off, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("mean", torch.full((1, 4), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 2
        x = x + torch.relu(self.first(x))
        found: Tensor = self.second(x).squeeze(1)
        return found


def test_networks_with_a_forward_of_their_own() -> None:
    torch.manual_seed(0)
    model = Residual()
    x, y = torch.rand(70, 4), torch.arange(70) % 2 * 2 - 1
    attack = mf.attacks.PGD("linf", 0.1, steps=30)
    crown = mf.certified_margins(model, x, y, attack, method="crown", batch_size=32)
    attacked = mf.adversarial_margins(model.double(), x.double(), y, attack, normalize=False)
    width = attacked.values - crown.values
    assert bool((width >= 0).all())
    assert float(width.median()) < 0.02
    one = mf.certified_margins(model, x[:3], y[:3], attack, method="crown")
    torch.testing.assert_close(one.values, crown.values[:3], rtol=0, atol=1e-12)


def test_nothing_of_the_bridge_is_left() -> None:
    """Other users of torch.onnx, of warnings and of logging see what they saw before."""
    code = (
        "import logging, sys, warnings, torch, torch.onnx.symbolic_helper\n"
        "import marginflow as mf\n"
        "from torch.onnx._internal.torchscript_exporter._globals import GLOBALS\n"
        "def seen():\n"
        "    return (hasattr(torch._C.Node, '__getitem__'), GLOBALS.export_onnx_opset_version,\n"
        "        hasattr(torch.onnx.symbolic_helper, '_set_opset_version'), torch.get_default_dtype(),\n"
        "        'numpy.lib.arraysetops' in sys.modules, list(warnings.filters),\n"
        "        list(logging.getLogger().handlers), logging.getLogger().level,\n"
        "        torch.is_grad_enabled(), torch.get_rng_state().sum().item())\n"
        "before = seen()\n"
        "m = mf.models.mlp(4, 3, 1, seed=0)\n"
        "mf.certified_margins(m, torch.ones(2, 4), torch.ones(2), mf.attacks.FGSM(0.1), method='crown')\n"
        "assert 'auto_LiRPA' in sys.modules\n"
        "assert seen() == before, (seen(), before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mf.certified_margins(
            nn.Linear(4, 1), torch.ones(2, 4), torch.ones(2), mf.attacks.FGSM(0.1), method="crown"
        )


def test_patches_that_release_0_3_cannot_carry_are_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()
    x, y = draw(0, 8, 2, 6, 6).sigmoid(), torch.arange(8) % 3
    attack = mf.attacks.PGD("linf", 0.03, steps=30)
    crown, interval = (
        mf.certified_margins(model, x, y, attack, method=name).values for name in METHODS[:2]
    )
    attacked = mf.adversarial_margins(model, x, y, attack, normalize=False).values
    assert bool((interval <= crown).all())
    assert bool((crown <= attacked).all())
    assert float((attacked - crown).median()) < 0.3 * float((attacked - interval).median())


def test_a_network_that_the_library_refuses_prints_nothing(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Release 0.3 logs the weights of the node that it does not know."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 1)
    )
    attack = mf.attacks.FGSM(0.05)
    with pytest.raises(ModelError, match=r"auto-LiRPA .* cannot bound this network"):
        mf.certified_margins(model, draw(0, 5, 6), torch.ones(5), attack, method="crown")
    said = capsys.readouterr()
    assert (said.out, said.err, caplog.text) == ("", "", "")
