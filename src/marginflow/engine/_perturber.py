"""Perturbed inputs of dense networks, by explicit input gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marginflow.attacks import FGM, FGSM, PGD, Attack, FiniteSet, Query
from marginflow.engine._dense import DenseNetwork
from marginflow.losses import get_loss, margins_of


class DenseQuery(Query):
    """The outputs and input gradients that an attack asks for, without autograd."""

    def __init__(self, network: DenseNetwork, x: Tensor, y: Tensor, objective: str) -> None:
        self.network = network
        self.x = x
        self.y = y
        self.objective = objective
        self.total = False
        self._checked = True

    def outputs(self, z: Tensor) -> Tensor:
        """Outputs at the inputs z, a tensor of their own."""
        return self.network.forward(self._rows(z)).to(z.dtype, copy=True)

    def gradient(self, z: Tensor) -> Tensor:
        """``∇_z`` of the margin, or of −loss; shape of z."""
        rows = self._rows(z)
        outputs = self.network.forward(rows)
        self.network.backward(rows, _margin_seeds(outputs, self.y, self.objective))
        return self.network.input_gradient(rows).to(z.dtype, copy=True).reshape(z.shape)

    def _rows(self, z: Tensor) -> Tensor:
        return z.detach().reshape(z.shape[0], -1).to(self.network.weights[0].dtype)


class Perturber:
    """``(x, y) ↦ x + δ(W)`` for a dense network, to the rounding of the attack itself.

    ℓ∞ gradient attacks on the margin run in place in three passes over the batch a step;
    FGM, ℓ2-PGD, finite sets and the loss as objective go through the attack's own code with
    explicit gradients.

    Args:
        network: whose input gradients are taken, in any precision.
        attack: one that :meth:`serves` says yes to.
    """

    def __init__(self, network: DenseNetwork, attack: Attack) -> None:
        self.network = network
        self.attack = attack

    @staticmethod
    def serves(attack: Attack | None) -> bool:
        """Whether the attack asks for margins and input gradients only; a subclass may do more."""
        return attack is None or type(attack) in (FGM, FGSM, PGD, FiniteSet)

    def __call__(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None, *, dead: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The perturbed inputs, (n, D), in a buffer that the next call overwrites, and the dead inputs.

        Args:
            x: examples, (n, …), inside the attack's bounds.
            y: labels that fit.
            generator: serves a random start.
            dead: whether to find the examples without an input gradient, (n,) bool.
        """
        attack = self.attack
        if not math.isinf(attack.p) or attack.objective != "margin" or type(attack) is FiniteSet:
            query = DenseQuery(self.network, x, y, attack.objective)
            with torch.no_grad():
                found = attack.answer(query, generator)
                return (x + found.delta).reshape(x.shape[0], -1), found.dead_inputs
        return self._by_signs(x, y, generator, dead=dead)

    @torch.no_grad()
    def _by_signs(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None, *, dead: bool
    ) -> tuple[Tensor, Tensor | None]:
        attack, network = self.attack, self.network
        steps, length = (1, attack.eps)
        start = x
        if isinstance(attack, PGD):
            steps, length = attack.steps, attack.step_size
            if attack.random_start:
                start = x + attack.start(x, generator)
        x, z = x.reshape(x.shape[0], -1), start.reshape(x.shape[0], -1)
        low, high = attack.bounds if attack.bounds is not None else (-math.inf, math.inf)
        least: Tensor | None = None
        most: Tensor | None = None
        if steps > 1 or length != attack.eps or z is not x:
            least = torch.sub(x, attack.eps, out=network.spare(x, "least"))
            most = torch.add(x, attack.eps, out=network.spare(x, "most"))
            if attack.bounds is not None:
                least.clamp_(min=low)
                most.clamp_(max=high)
        perturbed = network.spare(x, "perturbed")
        seeds: Tensor | None = None
        still = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if dead else None
        for _ in range(steps):
            rows = self._rounded(z)
            outputs = network.forward(rows)
            if seeds is None or outputs.shape[1] > 1:
                seeds = _margin_seeds(outputs, y, "margin")
            network.backward(rows, seeds)
            signs = network.input_gradient(rows).sign_()
            if still is not None:
                still &= ~signs.any(dim=1)
            torch.add(z, signs, alpha=-length, out=perturbed)
            if least is not None:
                torch.clamp(perturbed, least, most, out=perturbed)
            elif attack.bounds is not None:
                perturbed.clamp_(low, high)
            z = perturbed
        return z, still

    def _rounded(self, z: Tensor) -> Tensor:
        dtype = self.network.weights[0].dtype
        return z if z.dtype == dtype else z.to(dtype)


def _margin_seeds(outputs: Tensor, y: Tensor, objective: str) -> Tensor:
    """``∂/∂f`` of Σ_i m_i (or of −Σ_i ℓ_i), (n, C), in the precision of the outputs."""
    if outputs.shape[1] == 1 and objective == "margin":
        return y.to(outputs.dtype).unsqueeze(1)
    # Several outputs: the runner-up and its ties as autograd has them, on n · C numbers only.
    with torch.enable_grad():
        f = outputs.detach().float() if outputs.dtype == torch.bfloat16 else outputs.detach()
        f = f.clone().requires_grad_()
        if objective == "margin":
            value = margins_of(f, y, checked=True)
        else:
            loss = get_loss("logistic" if f.shape[1] == 1 else "cross-entropy")
            value = -loss.values(loss.scores(f, y))
        (seeds,) = torch.autograd.grad(value.sum(), f)
    return seeds.to(outputs.dtype)
