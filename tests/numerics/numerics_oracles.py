"""Networks, attacks and certificates in mpmath, by naive loops over single numbers.

Nothing here calls the library: weights, examples and labels come in as lists of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mpmath
import torch
from mpmath import mpf
from torch import Tensor, nn

mpmath.mp.dps = 60

Row = list[mpf]
Matrix = list[Row]

ACTIVATIONS = ("linear", "relu", "squared-relu")


def exact(tensor: Tensor) -> list[mpf]:
    """The numbers of a tensor as they are: floats are fractions."""
    return [mpf(value) for value in tensor.detach().double().reshape(-1).tolist()]


def matrix(tensor: Tensor) -> Matrix:
    return [exact(row) for row in tensor]


def length(v: Sequence[mpf]) -> mpf:
    return mpmath.sqrt(mpmath.fsum(a * a for a in v))


def inner(a: Sequence[mpf], b: Sequence[mpf]) -> mpf:
    return mpmath.fsum(s * t for s, t in zip(a, b, strict=True))


@dataclass(frozen=True, eq=False)
class Exact:
    """``f(x) = W_L σ(… σ(W_1 x))`` with one output."""

    layers: list[Matrix]
    activation: str

    @staticmethod
    def of(model: nn.Module, activation: str) -> Exact:
        return Exact([matrix(p) for p in model.parameters()], activation)

    @property
    def degrees(self) -> list[int]:
        q = 2 if self.activation == "squared-relu" else 1
        return [q**k for k in reversed(range(len(self.layers)))]

    @property
    def order(self) -> int:
        return sum(self.degrees)

    def _sigma(self, u: mpf) -> tuple[mpf, mpf]:
        if self.activation == "linear":
            return u, mpf(1)
        if u <= 0:
            return mpf(0), mpf(0)
        return (u * u, 2 * u) if self.activation == "squared-relu" else (u, mpf(1))

    def margin(self, x: Row, y: int) -> tuple[mpf, Row, list[Matrix]]:
        """``y f(x)``, its gradient by x, and its gradients by the layers."""
        inputs, slopes = [x], []
        for layer in self.layers[:-1]:
            pairs = [self._sigma(inner(row, inputs[-1])) for row in layer]
            inputs.append([value for value, _ in pairs])
            slopes.append([slope for _, slope in pairs])
        value = inner(self.layers[-1][0], inputs[-1])
        signal: Row = [mpf(y)]
        gradients: list[Matrix] = []
        for k in reversed(range(len(self.layers))):
            gradients.insert(0, [[b * a for a in inputs[k]] for b in signal])
            below = [
                mpmath.fsum(b * row[j] for b, row in zip(signal, self.layers[k], strict=True))
                for j in range(len(inputs[k]))
            ]
            signal = below if k == 0 else [s * t for s, t in zip(below, slopes[k - 1], strict=True)]
        return y * value, signal, gradients

    def norms(self) -> Row:
        return [length([a for row in layer for a in row]) for layer in self.layers]

    def rho(self) -> mpf:
        pairs = zip(self.norms(), self.degrees, strict=True)
        return mpmath.fprod(norm**degree for norm, degree in pairs)

    def flat(self) -> Row:
        return [a for layer in self.layers for row in layer for a in row]

    def gradient(self, x: Row, y: int) -> Row:
        return [a for layer in self.margin(x, y)[2] for row in layer for a in row]


Perturb = Callable[[Exact, Row, int], Row]


def dual(g: Row, p: float) -> Row:
    """``argmax_{‖d‖_p ≤ 1} ⟨d, g⟩`` for p = 2, 3 and ∞."""
    if p == float("inf"):
        return [mpf(mpmath.sign(a)) for a in g]
    q = 1 / (1 - 1 / mpf(p))
    size = mpmath.fsum(abs(a) ** q for a in g) ** (1 / mpf(p))
    return [mpmath.sign(a) * abs(a) ** (q - 1) / size for a in g] if size else g


def one_step(p: float, eps: float) -> Perturb:
    """FGM, FGSM, and the exact perturbation of a linear network."""

    def perturb(network: Exact, x: Row, y: int) -> Row:
        g = network.margin(x, y)[1]
        return [a - mpf(eps) * d for a, d in zip(x, dual(g, p), strict=True)]

    return perturb


def steps(p: float, eps: float, size: float, count: int) -> Perturb:
    """PGD from x."""

    def perturb(network: Exact, x: Row, y: int) -> Row:
        delta = [mpf(0)] * len(x)
        for _ in range(count):
            z = [a + b for a, b in zip(x, delta, strict=True)]
            d = dual(network.margin(z, y)[1], p)
            delta = [a - mpf(size) * b for a, b in zip(delta, d, strict=True)]
            if p == 2:
                far = length(delta)
                delta = [a * mpf(eps) / far for a in delta] if far > eps else delta
            else:
                delta = [max(-mpf(eps), min(mpf(eps), a)) for a in delta]
        return [a + b for a, b in zip(x, delta, strict=True)]

    return perturb


def clean(network: Exact, x: Row, y: int) -> Row:
    return x


def times(model: nn.Module, factors: float | Sequence[float]) -> nn.Module:
    """The model, its layers multiplied in place."""
    parameters = list(model.parameters())
    each = [factors] * len(parameters) if isinstance(factors, float) else factors
    with torch.no_grad():
        for p, factor in zip(parameters, each, strict=True):
            p.mul_(factor)
    return model
