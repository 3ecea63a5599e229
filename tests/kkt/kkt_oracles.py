"""Networks with positive margins, and the certificate's quantities by a naive loop over examples.

Nothing here calls the code under test: margins and gradients are those of torch.autograd, one
example at a time, and the multipliers are scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import Attack

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    model: nn.Module
    x: Tensor
    y: Tensor


class Tied(nn.Module):
    """``v · relu(W relu(W x))``: one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(torch.relu(self.hidden(x)))))


class FunctionallyTied(nn.Module):
    """A linear layer whose weight is used once as a module and once as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(torch.relu(self.hidden(x)) @ self.hidden.weight))


def _with_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 1, bias=False))


def _strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=2, padding=1),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(4, 3, 2, dilation=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 3, bias=False),
    )


_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: mf.models.mlp(6, 12, 9, 1), (6,)),
    "leaky": (lambda: mf.models.mlp(6, 12, 1, activation="leaky-relu"), (6,)),
    "squared": (lambda: mf.models.mlp(6, 8, 7, 1, activation="squared-relu"), (6,)),
    "classes": (lambda: mf.models.mlp(6, 12, 9, 4), (6,)),
    "squared-classes": (lambda: mf.models.mlp(6, 8, 3, activation="squared-relu"), (6,)),
    "linear": (lambda: mf.models.deep_linear(6, 7, 5, 1), (6,)),
    "first-bias": (_with_bias, (6,)),
    "cnn": (lambda: mf.models.cnn((2, 8, 8), 3, channels=(3, 4), hidden=7, kernel=3), (2, 8, 8)),
    "cnn-strided": (_strided, (2, 7, 7)),
    "conv-linear": (lambda: mf.models.conv_linear(6, 3), (6,)),
    "tied": (Tied, (6,)),
    "functionally-tied": (FunctionallyTied, (6,)),
}
NETWORKS = tuple(_NETWORKS)
LAYERED = [
    "relu",
    "leaky",
    "squared",
    "classes",
    "squared-classes",
    "linear",
    "first-bias",
    "cnn",
    "cnn-strided",
]


def case(
    name: str, n: int = 20, seed: int = 0, attack: Attack | None = None, like: int = 0
) -> Case:
    """A network with Gaussian examples, labelled so that (nearly) all margins are positive; the others go.

    Args:
        name: of the network.
        n: examples to begin with.
        seed: of the network and the examples.
        attack: positive under this attack too.
        like: the first so many examples appear twice.
    """
    make, shape = _NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = make().double()
        x = torch.randn((n, *shape), dtype=torch.float64)
    x = torch.cat([x, x[:like]])
    with torch.no_grad():
        f = model(x)
    y = torch.where(f[:, 0] > 0, 1, -1) if f.shape[1] == 1 else f.argmax(dim=1)
    z = x
    if attack is not None:
        z = x + attack(model, x, y, generator=torch.Generator().manual_seed(0)).delta
    margins = torch.stack([naive_margin(model, z[i], int(y[i])).detach() for i in range(len(y))])
    keep = margins > 1e-6
    return Case(model, x[keep], y[keep])


def naive_margin(model: nn.Module, z: Tensor, label: int) -> Tensor:
    """``y f(z)``, or ``f[y] − max f[j]``, of one example."""
    f = model(z.unsqueeze(0)).reshape(-1)
    if len(f) == 1:
        return label * f[0]
    return f[label] - torch.stack([f[j] for j in range(len(f)) if j != label]).max()


def naive_fgm(model: nn.Module, x: Tensor, label: int, eps: float) -> Tensor:
    """``x + δ(W)`` of Eq. (87), through which autograd differentiates."""
    z = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(naive_margin(model, z, label), z, create_graph=True)
    return x - eps * g / g.square().sum().sqrt()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def vector(model: nn.Module) -> Array:
    return np.concatenate([p.detach().numpy().ravel() for p in trainable(model)])


def gradient(value: Tensor, model: nn.Module) -> Array:
    found = torch.autograd.grad(value, trainable(model), materialize_grads=True)
    return np.concatenate([g.detach().numpy().ravel() for g in found])


@dataclass(frozen=True, eq=False)
class Naive:
    """The certificate by the naive loop."""

    margins: Array
    gradients: Array
    weights: Array
    order: float

    def best(self, tau: float) -> tuple[Array, Array, float]:
        """The support, its multipliers in the units of V, and r(τ), by scipy's NNLS."""
        m = self.margins.min()
        support = np.flatnonzero(self.margins <= (1 + tau) * m)
        found, residual = nnls(self.gradients[support].T, self.weights, maxiter=10_000)
        scale = m ** ((self.order - 2) / self.order)
        return support, found * scale, residual / float(np.linalg.norm(self.weights))

    def paper(self, slopes: Callable[[Array], Array]) -> tuple[Array, float, float]:
        """Eq. (130) with 1/n for ``|ℓ′|``, χ of Definition 3 from its own definition, and cos β."""
        n, K, m = len(self.margins), self.order, self.margins.min()
        loss_gradient = -(slopes(self.margins) @ self.gradients) / n
        size, norm = float(np.linalg.norm(loss_gradient)), float(np.linalg.norm(self.weights))
        multipliers = norm * m ** ((K - 2) / K) * slopes(self.margins) / (n * size)
        v = self.weights / m ** (1 / K)
        gradients_at_v = self.gradients / m ** ((K - 1) / K)
        chi = float(np.linalg.norm(v - multipliers @ gradients_at_v))
        return multipliers, chi, -float(self.weights @ loss_gradient) / (norm * size)


def naive(
    c: Case,
    order: float,
    perturbed: Callable[[Tensor, int, int], Tensor] = lambda x, label, index: x,
) -> Naive:
    """Margins and gradients at ``perturbed(x_i, y_i, i)``, one example after the other."""
    margins, gradients = [], []
    for i, label in enumerate(c.y.tolist()):
        m = naive_margin(c.model, perturbed(c.x[i], label, i), label)
        margins.append(float(m.detach()))
        gradients.append(gradient(m, c.model))
    return Naive(np.array(margins), np.array(gradients), vector(c.model), order)


def exponential(m: Array) -> Array:
    return np.exp(-m)


def logistic(m: Array) -> Array:
    return 1 / (1 + np.exp(m))


def simplex(n: int) -> Tensor:
    """n points in n dimensions with negative inner products, of lengths that differ."""
    corners = torch.eye(n, dtype=torch.float64) - 1 / n
    corners = corners / corners.norm(dim=1, keepdim=True)
    return corners * torch.linspace(0.7, 1.6, n, dtype=torch.float64).unsqueeze(1)


def put(model: nn.Module, *weights: Tensor) -> nn.Module:
    """The model in float64 with these weights, in the order of its parameters."""
    model = model.double()
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    return model


def relative(found: float, expected: float) -> float:
    return math.inf if expected == 0 else abs(found - expected) / abs(expected)
