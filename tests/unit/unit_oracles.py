"""What several unit tests need: networks with data, and the textbook formulas one example at a time.

Nothing here calls the code under test but to build the networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import settings
from torch import Tensor, nn

import marginflow as mf

laws = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True, eq=False)
class Case:
    """A network with examples and labels that fit it."""

    model: nn.Module
    x: Tensor
    y: Tensor
    linear: bool = False

    @property
    def binary(self) -> bool:
        return bool((self.y < 0).any())


_NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], int]] = {
    "relu": (lambda s: mf.models.mlp(6, 12, 9, 1, seed=s), (6,), 1),
    "leaky": (lambda s: mf.models.mlp(6, 12, 9, 1, activation="leaky-relu", seed=s), (6,), 1),
    "squared": (lambda s: mf.models.mlp(6, 8, 7, 1, activation="squared-relu", seed=s), (6,), 1),
    "classes": (lambda s: mf.models.mlp(6, 12, 9, 4, seed=s), (6,), 4),
    "squared-classes": (
        lambda s: mf.models.mlp(6, 8, 3, activation="squared-relu", seed=s),
        (6,),
        3,
    ),
    "cnn": (
        lambda s: mf.models.cnn((2, 8, 8), 3, channels=(3, 4), hidden=7, kernel=3, seed=s),
        (2, 8, 8),
        3,
    ),
    "cnn-binary": (
        lambda s: mf.models.cnn((1, 8, 8), 1, channels=(3, 4), hidden=7, kernel=3, seed=s),
        (1, 8, 8),
        1,
    ),
    "linear": (lambda s: mf.models.deep_linear(6, 7, 5, 1, seed=s), (6,), 1),
    "linear-classes": (lambda s: mf.models.deep_linear(6, 7, 4, seed=s), (6,), 4),
}
NETWORKS = tuple(_NETWORKS)
LINEAR = ("linear", "linear-classes")


def case(name: str, n: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """The network ``name`` with n Gaussian examples and labels of all classes."""
    make, shape, outputs = _NETWORKS[name]
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn((n, *shape), generator=generator, dtype=torch.float64).to(dtype)
    y = torch.arange(n) % 2 * 2 - 1 if outputs == 1 else torch.arange(n) % outputs
    return Case(make(seed).to(dtype), x, y, name in LINEAR)


def scale_layers(model: nn.Module, factors: Sequence[float]) -> None:
    """Multiply the k-th parameter by ``factors[k]``, in place."""
    with torch.no_grad():
        for parameter, factor in zip(model.parameters(), factors, strict=True):
            parameter.mul_(factor)


def naive_margin(model: nn.Module, z: Tensor, label: int) -> Tensor:
    """``y f(z)``, or ``f[y] − f[j*]`` with j* the runner-up, of one example."""
    f = model(z.unsqueeze(0)).reshape(-1)
    if len(f) == 1:
        return label * f[0]
    runner_up = max((j for j in range(len(f)) if j != label), key=lambda j: f[j].item())
    return f[label] - f[runner_up]


def naive_margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack(
            [naive_margin(model, x[i], int(label)) for i, label in enumerate(y.tolist())]
        )


def naive_gradient(model: nn.Module, z: Tensor, label: int) -> Tensor:
    """``∇_z`` of the margin of one example."""
    z = z.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(naive_margin(model, z, label), z)
    return gradient


def l2(v: Tensor) -> float:
    return math.sqrt(sum(c * c for c in v.reshape(-1).tolist()))


def unit(v: Tensor) -> Tensor:
    """``v/‖v‖₂``; 0 for 0."""
    size = l2(v)
    return v / size if size else torch.zeros_like(v)


def naive_fgm(model: nn.Module, z: Tensor, label: int, eps: float) -> Tensor:
    """Eq. (87)."""
    return -eps * unit(naive_gradient(model, z, label))


def naive_fgsm(model: nn.Module, z: Tensor, label: int, eps: float) -> Tensor:
    """Eq. (89)."""
    return -eps * naive_gradient(model, z, label).sign()


def naive_pgd(
    model: nn.Module,
    z: Tensor,
    label: int,
    *,
    p: str,
    eps: float,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """Eq. (91)."""
    delta = torch.zeros_like(z) if start is None else start.clone()
    for _ in range(steps):
        gradient = naive_gradient(model, z + delta, label)
        if p == "l2":
            delta = delta - step_size * unit(gradient)
            if l2(delta) > eps:
                delta = delta * (eps / l2(delta))
        else:
            delta = (delta - step_size * gradient.sign()).clamp(-eps, eps)
        if bounds is not None:
            delta = (z + delta).clamp(*bounds) - z
    return delta


def numerical_gradient(
    value: Callable[[], float], parameters: Sequence[Tensor], h: float = 3e-6
) -> list[Tensor]:
    """Central differences of ``value()`` by every entry of ``parameters``."""
    result = []
    for parameter in parameters:
        flat = parameter.data.view(-1)
        slopes = torch.empty_like(flat)
        for k in range(len(flat)):
            original = float(flat[k])
            flat[k] = original + h
            up = value()
            flat[k] = original - h
            down = value()
            flat[k] = original
            slopes[k] = (up - down) / (2 * h)
        result.append(slopes.view_as(parameter))
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``max |found − expected|`` in units of ``max |expected|``."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
