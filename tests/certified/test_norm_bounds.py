"""Bounds by norms: closed forms, exact minima of tiny networks, exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from exact_minima import evaluate, in_l2, in_linf, specifications
from marginflow.certified._operators import _spectral_of_kernel, of_convolution, of_matrix
from marginflow.errors import ModelError

PS = (1.0, 1.5, 2.0, 3.0, math.inf)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequence(seed: int, *widths: int) -> nn.Sequential:
    """A ReLU network with biases, in float64."""
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for a, b in pairwise(widths):
            modules += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*modules[:-1]).double()


def steps(model: nn.Sequential) -> list[object]:
    found: list[object] = []
    for module in model:
        if isinstance(module, nn.Linear):
            found.append((module.weight.detach().numpy(), module.bias.detach().numpy()))
        else:
            found.append("relu")
    return found


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_linear_layer_is_exact(p: float, outputs: int) -> None:
    """``min m = f[y] − f[j] − ε ‖w_y − w_j‖_q``, the closed form."""
    W, x = draw(0, outputs, 5), draw(1, 20, 5)
    model = nn.Sequential(nn.Linear(5, outputs, bias=False)).double()
    model[0].weight.data = W.clone()
    y = torch.arange(20) % 3 if outputs == 3 else torch.arange(20) % 2 * 2 - 1
    attack = mf.attacks.ExactLinear(p, 0.3)
    found = mf.certified_margins(model, x, y, attack, method="norms")
    q = 1.0 if math.isinf(p) else (math.inf if p == 1 else p / (p - 1))
    for i in range(20):
        label = int(y[i])
        exact = min(
            float(c @ W.numpy() @ x[i].numpy()) - 0.3 * float(np.linalg.norm(c @ W.numpy(), q))
            for c in specifications(label, outputs)
        )
        assert float(found.values[i]) <= exact
        assert float(found.values[i]) == pytest.approx(exact, abs=1e-12)
    attacked = mf.adversarial_margins(model, x, y, attack, certified="norms")
    assert float(attacked.width.abs().max()) < 1e-12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_below_the_exact_minimum_in_linf(
    seed: int, outputs: int, bounds: tuple[float, float] | None
) -> None:
    model = sequence(seed, 4, 5, 3, outputs)
    x = draw(seed + 50, 3, 4).sigmoid()
    y = torch.arange(3) if outputs == 3 else torch.tensor([1, -1, 1])
    attack = mf.attacks.PGD("linf", 0.1, steps=40, bounds=bounds)
    margins = mf.adversarial_margins(model, x, y, attack, certified="norms", normalize=False)
    assert margins.certified is not None
    for i in range(3):
        pairs = [
            in_linf(steps(model), x[i].numpy(), c, 0.1, bounds)
            for c in specifications(int(y[i]), outputs)
        ]
        value, attained = (min(pair[k] for pair in pairs) for k in (0, 1))
        assert attained == pytest.approx(value, abs=1e-5)
        assert float(margins.certified.values[i]) <= attained
        assert value <= float(margins.values[i]) + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_below_the_exact_minimum_in_l2(seed: int) -> None:
    model = sequence(seed, 3, 4, 1)
    x, y = draw(seed + 70, 2, 3), torch.tensor([1, -1])
    attack = mf.attacks.PGD("l2", 0.4, steps=40)
    margins = mf.adversarial_margins(model, x, y, attack, certified="norms", normalize=False)
    assert margins.certified is not None
    for i in range(2):
        (c,) = specifications(int(y[i]), 1)
        value, attained = in_l2(steps(model), x[i].numpy(), c, 0.4)
        assert attained == pytest.approx(value, abs=1e-6)
        assert float(margins.certified.values[i]) <= attained
        assert value <= float(margins.values[i]) + 1e-6


def test_where_the_ball_meets_no_kink_the_last_layer_is_exact() -> None:
    """All units on: linear on the ball. The identity below loses nothing."""
    model = sequence(0, 4, 4, 1)
    model[0].weight.data, model[0].bias.data = torch.eye(4).double(), torch.full((4,), 9.0).double()
    x = draw(5, 6, 4)
    found = mf.certified_margins(model, x, torch.ones(6), mf.attacks.FGSM(0.1), method="norms")
    w = model[2].weight.detach()
    exact = model(x).detach()[:, 0] - 0.1 * w.abs().sum()
    torch.testing.assert_close(found.values, exact, rtol=0, atol=1e-12)


def test_rounding_against_exact_arithmetic() -> None:
    """Sums that cancel to nothing, in fractions: never above, and off by no more than is said."""
    generator = torch.Generator().manual_seed(3)
    closest = math.inf
    for _ in range(200):
        size = torch.exp2(torch.randint(-20, 21, (1, 6), generator=generator).double())
        w = torch.randn(1, 6, generator=generator).double() * size
        x = torch.randn(1, 6, generator=generator).double() / size
        x[0, -1] = -float((w[0, :-1] * x[0, :-1]).sum()) / float(w[0, -1])
        model = nn.Sequential(nn.Linear(6, 1, bias=False)).double()
        model[0].weight.data = w
        eps = 2.0**-30
        found = mf.certified_margins(model, x, torch.ones(1), mf.attacks.FGSM(eps), method="norms")
        pairs = [
            (Fraction(a), Fraction(b)) for a, b in zip(w[0].tolist(), x[0].tolist(), strict=True)
        ]
        exact = sum(a * b for a, b in pairs) - Fraction(eps) * sum(abs(a) for a, _ in pairs)
        gap = exact - Fraction(float(found.values))
        assert 0 <= gap <= 3 * Fraction(float(found.rounding))
        closest = min(closest, float(gap / Fraction(float(found.rounding))))
    assert closest < 1  # plain arithmetic would have been above at times


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    norm = nn.BatchNorm2d(3)
    norm.running_mean = torch.tensor([0.1, -0.2, 0.3])
    norm.running_var = torch.tensor([0.5, 2.0, 1.0])
    norm.weight.data, norm.bias.data = (
        torch.tensor([1.5, -1.0, 0.5]),
        torch.tensor([0.1, 0.0, -0.2]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "cnn": (
                mf.models.cnn((1, 6, 6), 3, channels=(2, 3), hidden=5, kernel=3, seed=0),
                (1, 6, 6),
            ),
            "batch norm": (
                nn.Sequential(
                    nn.Conv2d(1, 3, 3, stride=2, padding=1),
                    norm,
                    nn.LeakyReLU(0.1),
                    nn.AvgPool2d(3, stride=1),
                    nn.Dropout(),
                    nn.Flatten(),
                    nn.Linear(3, 3),
                ),
                (1, 6, 6),
            ),
            "overlapping pools": (
                nn.Sequential(
                    nn.Conv1d(2, 4, 3, dilation=2, groups=2),
                    nn.ReLU(),
                    nn.MaxPool1d(3, stride=1),
                    nn.AdaptiveAvgPool1d(1),
                    nn.Flatten(),
                ),
                (2, 9),
            ),
            "squared ReLU": (mf.models.mlp(6, 5, 4, 3, activation="squared-relu", seed=1), (6,)),
            "diagonal": (mf.models.diagonal_linear(6, 3, seed=0), (6,)),
            "circular": (mf.models.conv_linear(6, 3, seed=0), (6,)),
        }


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("p", ["l2", "linf"])
def test_below_strong_attacks_and_random_points(name: str, p: str) -> None:
    model, shape = networks()[name]
    model = model.double().eval()
    x = draw(0, 8, *shape).sigmoid()
    outputs = model(x).shape[1]
    y = torch.arange(8) % outputs if outputs > 1 else torch.arange(8) % 2 * 2 - 1
    attack = mf.attacks.PGD(p, 0.2, steps=50)
    margins = mf.adversarial_margins(model, x, y, attack, certified="norms", normalize=False)
    assert margins.certified is not None
    bound = margins.certified.values
    assert bool((margins.width > 0).all())
    noise = draw(1, 400, 8, *shape)
    size = noise.flatten(2).abs().amax(2) if p == "linf" else noise.flatten(2).norm(dim=2)
    noise = 0.2 * noise / size.reshape(400, 8, *(1 for _ in shape))
    least = mf.adversarial_margins(
        model, (x + noise).flatten(0, 1), y.repeat(400), normalize=False
    ).values.reshape(400, 8)
    assert bool((bound <= least).all())
    # And at ε = 0 it is the clean margin, to a rounding.
    still = mf.certified_margins(model, x, y, mf.attacks.FGSM(0.0), method="norms")
    clean = mf.adversarial_margins(model, x, y, normalize=False).values
    torch.testing.assert_close(still.values, clean, rtol=0, atol=1e-12)
    assert bool((still.values <= clean).all())


def test_operator_norms_of_convolutions() -> None:
    """Against the dense matrix: exact where they are said to be, never below."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = [
            (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
            (nn.Conv2d(2, 4, 3, stride=2, groups=2), (2, 6, 5)),
            (nn.Conv2d(1, 2, 2, dilation=2, padding="same"), (1, 4, 4)),
            (nn.Conv1d(3, 2, 4, stride=3, padding=2), (3, 8)),
        ]
    for module, shape in convolutions:
        module = module.double().requires_grad_(False)
        eye = torch.eye(math.prod(shape), dtype=torch.float64)
        zero = module(torch.zeros(1, *shape).double())
        dense = (module(eye.reshape(-1, *shape)) - zero).flatten(1).T
        found, reference = of_convolution(module, shape), of_matrix(dense)
        for r, s in [(1, 1), (1, 2), (2, math.inf), (math.inf, math.inf), (math.inf, 2), (2, 1)]:
            assert found.norm(r, s) == pytest.approx(reference.norm(r, s), rel=1e-9)
        top = float(torch.linalg.svdvals(dense)[0])
        assert top <= found.norm(2.0, 2.0) <= (1 + 1e-9) * top
        # Without the matrix: the kernel's spectrum, which knows of no strides.
        assert top <= _spectral_of_kernel(module, shape) <= 1.6 * top
        for r, s in [(r, s) for r in (1.0, 2.0, math.inf) for s in (1.0, 2.0, math.inf)]:
            z = draw(2, 200, math.prod(shape))
            grown = (z @ dense.T).norm(s, dim=1) / z.norm(r, dim=1)
            assert float(grown.max()) <= reference.norm(r, s)
        assert float(dense.norm(1, dim=0).max()) == pytest.approx(found.norm(1.0, 1.0), rel=1e-9)
        assert float(dense.norm(1, dim=1).max()) == pytest.approx(
            found.norm(math.inf, math.inf), rel=1e-9
        )


class Twice(nn.Linear):
    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) + 1


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "'1' (GELU)"),
        (Twice(5, 5), "'1' (Twice)"),
        (nn.BatchNorm1d(5, track_running_stats=False), "running statistics"),
        (nn.Softplus(), "'1' (Softplus)"),
    ],
)
def test_what_it_does_not_know_it_refuses_by_name(module: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), module, nn.Linear(5, 1))
    with pytest.raises(ModelError, match=r"bounds by norms") as refused:
        mf.certified_margins(
            model, torch.rand(2, 4), torch.ones(2), mf.attacks.FGSM(0.1), method="norms"
        )
    assert name in str(refused.value)


def test_a_hook_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].register_forward_hook(lambda m, a, out: 2 * out)
    with pytest.raises(ModelError, match="hook"):
        mf.certified_margins(
            model, torch.rand(2, 4), torch.ones(2), mf.attacks.FGSM(0.1), method="norms"
        )


def test_the_oracle_agrees_with_the_network() -> None:
    model = sequence(0, 4, 5, 3, 2)
    z = draw(1, 4)
    np.testing.assert_allclose(evaluate(steps(model), z.numpy()), model(z).detach().numpy())
