"""The paper's networks, perturbations and margins as plain formulas, for the tests of the errata.

Nothing here calls the package. Weights are lists of float64 tensors, ``z ↦ relu(z)^q`` is the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Sequence[Tensor]
Perturb = Callable[["Sample", Weights, bool], Tensor]
"""(sample, weights, whether to differentiate through δ) ↦ δ."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Examples with labels −1/+1, and the degree q of the network's activation."""

    x: Tensor
    y: Tensor
    q: int

    @property
    def n(self) -> int:
        return len(self.y)

    def f(self, weights: Weights, x: Tensor) -> Tensor:
        """``f(x; W) = W_L φ(W_{L−1} ⋯ φ(W_1 x))``, (n,). Eq. (2)."""
        h = x
        for w in weights[:-1]:
            h = torch.relu(h @ w.T) ** self.q
        return (h @ weights[-1].T)[:, 0]

    def degrees(self, weights: Weights) -> list[int]:
        """``c_k = q^{L−k}``."""
        return [self.q ** (len(weights) - k) for k in range(1, len(weights) + 1)]


def input_gradient(s: Sample, weights: Weights, total: bool) -> Tensor:
    x = s.x.clone().requires_grad_()
    (g,) = torch.autograd.grad(s.f(weights, x).sum(), x, create_graph=total)
    return g


def fgm(eps: float) -> Perturb:
    """Eq. (87)."""

    def perturb(s: Sample, weights: Weights, total: bool) -> Tensor:
        g = input_gradient(s, weights, total)
        return -eps * s.y[:, None] * g / torch.linalg.vector_norm(g, dim=1, keepdim=True)

    return perturb


def fgsm(eps: float) -> Perturb:
    """Eq. (89)."""
    return lambda s, weights, total: (
        -eps * s.y[:, None] * torch.sign(input_gradient(s, weights, total))
    )


def worst_of(deltas: Tensor) -> Perturb:
    """The exact inner maximum over a finite set, (m, d)."""

    def perturb(s: Sample, weights: Weights, total: bool) -> Tensor:
        with torch.no_grad():
            found = torch.stack([s.y * s.f(weights, s.x + d) for d in deltas])
        return deltas[found.argmin(dim=0)]

    return perturb


def clean(s: Sample, weights: Weights, total: bool) -> Tensor:
    return torch.zeros_like(s.x)


@dataclass(frozen=True, eq=False)
class State:
    """One set of weights: margins, their derivatives by the weights, the exponential loss.

    Attributes:
        margins: m_i, (n,).
        rows: ``∂m_i/∂W_k``, one (n, ·) matrix a layer, differentiated through δ if asked for.
        weights: the flattened layers.
        degrees: c_k.
    """

    margins: Tensor
    rows: list[Tensor]
    weights: list[Tensor]
    degrees: list[int]

    @property
    def n(self) -> int:
        return len(self.margins)

    @property
    def loss(self) -> float:
        return float(torch.exp(-self.margins).mean())

    @property
    def nu(self) -> float:
        """``ν = (1/n) Σ e^{−m_i} m_i``."""
        return float((torch.exp(-self.margins) * self.margins).mean())

    @property
    def smoothed(self) -> float:
        """``ℓ = ln(1/(nL))``."""
        return -float(torch.logsumexp(-self.margins, dim=0))

    @property
    def gradients(self) -> list[Tensor]:
        """``G_k = −(1/n) Σ e^{−m_i} ∂m_i/∂W_k``."""
        return [-(torch.exp(-self.margins) @ r) / self.n for r in self.rows]

    @property
    def norms(self) -> list[float]:
        return [float(torch.linalg.vector_norm(w)) for w in self.weights]

    @property
    def rho(self) -> float:
        """``ρ = Π ρ_k^{c_k}``."""
        value = 1.0
        for norm, c in zip(self.norms, self.degrees, strict=True):
            value *= norm**c
        return value

    def tangential(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """``P_k`` of each part; the last dimension is that of the layer."""
        found = []
        for part, w in zip(parts, self.weights, strict=True):
            unit = w / torch.linalg.vector_norm(w)
            found.append(part - (part @ unit)[..., None] * unit)
        return found

    def margin_rates(self, velocity: Sequence[Tensor]) -> Tensor:
        """``dm_i/dt`` along ``dW_k/dt``, (n,)."""
        return sum(r @ v for r, v in zip(self.rows, velocity, strict=True))  # type: ignore[return-value]

    def normalized_rates(self, velocity: Sequence[Tensor]) -> Tensor:
        """``dγ̂_i/dt = (1/ρ) Σ_k ⟨P_k ∂m_i/∂W_k, dW_k/dt⟩``: γ̂_i = m_i/ρ is scale invariant."""
        rows = self.tangential(self.rows)
        return sum(r @ v for r, v in zip(rows, velocity, strict=True)) / self.rho  # type: ignore[return-value]


def measure(s: Sample, weights: Weights, perturb: Perturb, *, total: bool) -> State:
    """Margins at ``x + δ(W)`` and their derivatives, one backward pass an example."""
    held = [w.detach().clone().requires_grad_() for w in weights]
    delta = perturb(s, held, total)
    margins = s.y * s.f(held, s.x + (delta if total else delta.detach()))
    rows = [torch.autograd.grad(m, held, retain_graph=True) for m in margins]
    return State(
        margins=margins.detach(),
        rows=[torch.stack([r[k].reshape(-1) for r in rows]) for k in range(len(held))],
        weights=[w.detach().reshape(-1) for w in held],
        degrees=s.degrees(held),
    )


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
