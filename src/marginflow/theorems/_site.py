"""The network at one kept point of a path, in float64: its perturbations, slopes and derivatives."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from marginflow.attacks import Attack, Derivative, Perturbation
from marginflow.engine import AutogradEngine
from marginflow.homogeneity import Homogeneity
from marginflow.losses import Loss, margins_of

Layers = tuple[tuple[Tensor, ...], ...]
"""One entry a layer, each with its parameters."""


@dataclass(frozen=True, eq=False)
class Slope:
    """The gradient of ``L/e^r`` with r = ln L, so that nothing underflows however small L is.

    Attributes:
        gradients: ``G_k/e^r``.
        weights: ``|ℓ′(z_i)|/e^r``, (n,).
        margins: m_i, (n,).
        euler: ``−⟨∇_f ℓ_i, f_i⟩/(|ℓ′|)``, (n,): m_i itself for one output.
    """

    gradients: Layers
    weights: Tensor
    margins: Tensor
    euler: Tensor

    @property
    def nu(self) -> float:
        """``ν/e^r``, ν = (1/n) Σ |ℓ′(m_i)| m_i; several classes: ``−(1/n) Σ ⟨∇_f ℓ_i, f_i⟩``."""
        return float((self.weights * self.euler).mean())

    @property
    def nu_size(self) -> float:
        """The same with absolute values: what its rounding is relative to."""
        return float((self.weights * self.euler.abs()).mean())


class Site:
    """One point of a path.

    Args:
        model: the network in float64, owned by the site.
        homogeneity: its layers.
        sample: examples and labels.
        loss: ℓ.
        attack: δ, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        homogeneity: Homogeneity,
        sample: tuple[Tensor, Tensor],
        loss: Loss,
        attack: Attack | None,
    ) -> None:
        self.model = model
        self.homogeneity = homogeneity
        self.x, self.y = sample
        self.loss = loss
        self.attack = attack
        members = {name for layer in homogeneity.layers for name in layer.parameters}
        for name, p in model.named_parameters():
            p.requires_grad_(name in members)
        self._slopes: dict[Derivative, Slope] = {}

    @cached_property
    def layers(self) -> Layers:
        """The parameters W_k."""
        return self._grouped(dict(self.model.named_parameters()))

    @property
    def norms(self) -> Tensor:
        """ρ_k, (L,)."""
        return self.homogeneity.norms(self.model)

    @property
    def degrees(self) -> Tensor:
        """c_k, (L,)."""
        return torch.tensor(self.homogeneity.degrees, dtype=torch.float64)

    def perturb(self, model: nn.Module, derivative: Derivative = "detached") -> Perturbation | None:
        """δ of ``model``; a random start is drawn alike each time."""
        if self.attack is None:
            return None
        generator = torch.Generator().manual_seed(0)
        return self.attack(model, self.x, self.y, derivative=derivative, generator=generator)

    @cached_property
    def delta(self) -> Tensor:
        """δ, of the shape of x; 0 without an attack."""
        found = self.perturb(self.model)
        return torch.zeros_like(self.x) if found is None else found.delta

    @property
    def smoothed(self) -> float:
        """``ℓ = ln(1/(nL))`` of the exponential loss; positive where L < 1/n."""
        return -float(torch.logsumexp(-self.slope("detached").margins, dim=0))

    def slope(self, derivative: Derivative) -> Slope:
        """The gradient of the adversarial loss, ``detached`` or ``total``."""
        if derivative not in self._slopes:
            self._slopes[derivative] = self._slope(derivative)
        return self._slopes[derivative]

    def _slope(self, derivative: Derivative) -> Slope:
        engine = AutogradEngine(self.model, self.loss, self.attack, derivative)
        draws = [torch.Generator().manual_seed(0) for _ in range(2)]
        reference = engine.log_loss(self.x, self.y, draws[0], batch_size=len(self.y))
        found = engine(self.x, self.y, draws[1], log_reference=reference)
        scores = self.loss.scores(found.outputs, self.y)
        named = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return Slope(
            self._grouped(dict(zip(named, found.gradients, strict=True))),
            torch.exp(self.loss.log_slopes(scores) - reference),
            found.margins,
            _euler_values(found.outputs, self.y),
        )

    def inner(self, other: Layers) -> Tensor:
        """``⟨W_k, V_k⟩`` for each layer, (L,)."""
        return torch.stack(
            [
                torch.stack([(w.detach() * v).sum() for w, v in zip(ws, vs, strict=True)]).sum()
                for ws, vs in zip(self.layers, other, strict=True)
            ]
        )

    def adversarial_margins(self) -> Tensor:
        """m_i as a function of the weights that autograd can differentiate, through δ(W)."""
        found = self.perturb(self.model, "total")
        x = self.x if found is None else self.x + found.delta
        return margins_of(self.model(x), self.y)

    @contextmanager
    def at(self, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """A copy of the model with other weights, the same copy each time."""
        with torch.no_grad():
            for name, p in self._spare.named_parameters():
                if name in weights:
                    p.copy_(weights[name])
        yield self._spare

    @cached_property
    def _spare(self) -> nn.Module:
        return copy.deepcopy(self.model)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of all layers by name."""
        named = dict(self.model.named_parameters())
        return {n: named[n].detach() for layer in self.homogeneity.layers for n in layer.parameters}

    def scaled(self, factors: Sequence[float]) -> dict[str, Tensor]:
        """The weights ``a_k W_k``."""
        named = self.weights
        return {
            n: named[n] * a
            for layer, a in zip(self.homogeneity.layers, factors, strict=True)
            for n in layer.parameters
        }

    def direction(self, seed: int) -> dict[str, Tensor]:
        """A random direction with the norm of W_k in each layer."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}
        for layer, norm in zip(self.homogeneity.layers, self.norms.tolist(), strict=True):
            drawn = {
                n: torch.randn(self.weights[n].shape, generator=generator, dtype=torch.float64)
                for n in layer.parameters
            }
            size = sum(float(v.square().sum()) for v in drawn.values()) ** 0.5
            found |= {n: v * (norm / size) for n, v in drawn.items()}
        return found

    def _grouped(self, named: Mapping[str, Tensor]) -> Layers:
        return tuple(
            tuple(named[name] for name in layer.parameters) for layer in self.homogeneity.layers
        )


def pushforward(values: Tensor, layers: Layers, directions: Sequence[Layers]) -> list[Tensor]:
    """``Σ_k ⟨∂v_i/∂W_k, V_k⟩`` of each value v_i for each direction V, (n,).

    By differentiating the gradient of ``Σ u_i v_i``, which is linear in u: a forward
    derivative with backward passes only.
    """
    flat = [w for ws in layers for w in ws]
    probe = torch.zeros_like(values).requires_grad_()
    pulled = torch.autograd.grad(values, flat, probe, create_graph=True, materialize_grads=True)
    found = []
    for direction in directions:
        parts = [v for vs in direction for v in vs]
        total = torch.stack([(g * v).sum() for g, v in zip(pulled, parts, strict=True)]).sum()
        if not total.requires_grad:
            found.append(torch.zeros_like(values))
            continue
        (moved,) = torch.autograd.grad(total, probe, retain_graph=True, materialize_grads=True)
        found.append(moved.detach())
    return found


def only(layers: Layers, k: int) -> Layers:
    """The direction that is W_k in layer k and 0 elsewhere."""
    return tuple(
        tuple(w.detach() if j == k else torch.zeros_like(w) for w in ws)
        for j, ws in enumerate(layers)
    )


def _euler_values(outputs: Tensor, y: Tensor) -> Tensor:
    """``−⟨∇_f ℓ_i, f_i⟩/|ℓ′(z_i)|``: y f, or ``f[y] − Σ_{j≠y} q_j f[j]`` with q their softmax."""
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return margins_of(outputs, y)
    true = outputs.gather(1, y.unsqueeze(1)).squeeze(1)
    shares = torch.softmax(outputs.scatter(1, y.unsqueeze(1), -torch.inf), dim=1)
    return true - (shares * outputs).sum(dim=1)
