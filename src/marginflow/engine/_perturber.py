"""Perturbed inputs of dense networks, by explicit input gradients.

Source: the perturbations of Eqs. (87), (89) and (91).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from marginflow.attacks import FGM, FGSM, PGD, Attack, FiniteSet, Query
from marginflow.engine._dense import DenseNetwork
from marginflow.errors import InputError
from marginflow.losses import get_loss, margins_of

Generators = torch.Generator | Sequence[torch.Generator]
"""The source of random starts, or one for each of stacked networks."""


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
        """Outputs at the inputs z, (n, C), a tensor of their own."""
        return self.network.forward(self._columns(z)).mT.to(z.dtype, copy=True).flatten(0, -2)

    def gradient(self, z: Tensor) -> Tensor:
        """``∇_z`` of the margin, or of −loss; shape of z."""
        columns = self._columns(z)
        outputs = self.network.forward(columns)
        self.network.backward(columns, _seeds(outputs, self.y, self.objective))
        gradient = self.network.input_gradient(columns)
        return gradient.mT.to(z.dtype, copy=True).reshape(z.shape)

    def _columns(self, z: Tensor) -> Tensor:
        return self.network.columns(z.detach().to(self.network.weights[0].dtype))


class Perturber:
    """``(x, y) ↦ x + δ(W)`` for a dense network, to the rounding of the attack itself.

    ℓ∞ gradient attacks on the margin run in place in three passes over the batch a step;
    FGM, ℓ2-PGD, finite sets and the loss as objective go through the attack's own code with
    explicit gradients. For stacked networks x is (S, n, …) and y (S, n).

    Args:
        network: whose input gradients are taken, in any precision.
        attack: one that :meth:`serves` says yes to.
    """

    def __init__(self, network: DenseNetwork, attack: Attack) -> None:
        self.network = network
        self.attack = attack
        self.clean: Tensor | None = None
        """Outputs at x itself, (C, n), if the last call came past them; a copy."""

    @staticmethod
    def serves(attack: Attack | None) -> bool:
        """Whether the attack asks for margins and input gradients only; a subclass may do more.

        Args:
            attack: the attack, or None.
        """
        return attack is None or type(attack) in (FGM, FGSM, PGD, FiniteSet)

    @staticmethod
    def in_place(attack: Attack) -> bool:
        """Whether the attack runs in place: an ℓ∞ gradient attack on the margin.

        Args:
            attack: the attack.
        """
        sign = math.isinf(attack.p) and attack.objective == "margin"
        return sign and type(attack) is not FiniteSet

    def __call__(
        self, x: Tensor, y: Tensor, generator: Generators | None = None, *, dead: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The perturbed inputs as columns, (D, n), and the dead inputs.

        Args:
            x: examples, (n, …), inside the attack's bounds.
            y: labels that fit.
            generator: serves a random start; one for each of stacked networks (ℓ∞ only).
            dead: whether to find the examples without an input gradient, (n,) bool.

        Returns:
            ``x + δ`` in a buffer that the next call overwrites, of the dtype of x; dead inputs or None.
        """
        attack = self.attack
        self.clean = None
        if self.in_place(attack):
            return self._by_signs(x, y, generator, dead=dead)
        if isinstance(generator, Sequence):
            raise InputError("generator: expected one, got one for each network of a stack")
        if self.network.weights[0].ndim > 2:
            x, y = x.flatten(0, 1), y.flatten()
        query = DenseQuery(self.network, x, y, attack.objective)
        with torch.no_grad():
            found = attack.answer(query, generator)
            return self.network.columns(x + found.delta), found.dead_inputs

    @torch.no_grad()
    def _by_signs(
        self, x: Tensor, y: Tensor, generator: Generators | None, *, dead: bool
    ) -> tuple[Tensor, Tensor | None]:
        attack, network = self.attack, self.network
        steps, length = 1, attack.eps
        start: Tensor | None = None
        if isinstance(attack, PGD):
            steps, length = attack.steps, attack.step_size
            if attack.random_start and isinstance(generator, Sequence):
                drawn = zip(x, generator, strict=True)
                start = torch.stack([own + attack.start(own, source) for own, source in drawn])
            elif attack.random_start and not isinstance(generator, Sequence):
                start = x + attack.start(x, generator)
        z = columns = network.columns(x)
        low, high = attack.bounds if attack.bounds is not None else (-math.inf, math.inf)
        perturbed = network.spare(columns, "perturbed")
        least: Tensor | None = None
        most: Tensor | None = None
        if steps > 1 or length != attack.eps or start is not None:
            least = torch.sub(columns, attack.eps, out=network.spare(columns, "least"))
            most = torch.add(columns, attack.eps, out=network.spare(columns, "most"))
            if attack.bounds is not None:
                least.clamp_(min=low)
                most.clamp_(max=high)
        if start is not None:
            z = perturbed.copy_(network.rows(start).mT)
        seeds: Tensor | None = None
        still = torch.ones(y.shape, dtype=torch.bool, device=x.device) if dead else None
        for _ in range(steps):
            seen = z.to(network.weights[0].dtype)
            outputs = network.forward(seen)
            if z is columns and seen is z:
                self.clean = outputs.clone()
            if seeds is None or network.classes > 1:
                seeds = _seeds(outputs, y, "margin")
            network.backward(seen, seeds)
            signs = network.input_gradient(seen).sign_()
            if still is not None:
                still &= ~signs.any(dim=-2)
            torch.add(z, signs, alpha=-length, out=perturbed)
            if least is not None:
                torch.clamp(perturbed, least, most, out=perturbed)
            elif attack.bounds is not None:
                perturbed.clamp_(low, high)
            z = perturbed
        return z, still


def _seeds(outputs: Tensor, y: Tensor, objective: str) -> Tensor:
    """``∂/∂f`` of Σ_i m_i (or of −Σ_i ℓ_i), (…, C, n), in the precision of the outputs."""
    if outputs.shape[-2] == 1 and objective == "margin":
        return y.to(outputs.dtype).reshape(outputs.shape)
    # Several outputs: the runner-up and its ties as autograd has them, on n · C numbers only.
    with torch.enable_grad():
        f = outputs.detach().float() if outputs.dtype == torch.bfloat16 else outputs.detach()
        f, y = f.mT.flatten(0, -2).clone().requires_grad_(), y.flatten()
        if objective == "margin":
            value = margins_of(f, y, checked=True)
        else:
            loss = get_loss("logistic" if f.shape[1] == 1 else "cross-entropy")
            value = -loss.values(loss.scores(f, y))
        (seeds,) = torch.autograd.grad(value.sum(), f)
    return seeds.reshape(outputs.mT.shape).mT.to(outputs.dtype)
