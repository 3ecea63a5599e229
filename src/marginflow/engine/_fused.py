"""The loss gradient of dense homogeneous networks by explicit products: the fast path of Algorithm 1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from marginflow.attacks import Attack, Derivative
from marginflow.engine._base import Engine, LossGradient
from marginflow.engine._captured import CapturedStep
from marginflow.engine._dense import DenseNetwork
from marginflow.engine._perturber import Perturber
from marginflow.engine._products import Products, multiplying
from marginflow.errors import InputError, ModelError
from marginflow.losses import Loss, margins_of

_CAPTURED_ROWS = 4096
_CAPTURED_SIZES = 8

PerturbationPrecision = Literal["float32", "bf16"]
"""Precision of the network that the attack sees; ``float32`` stands for the model's own."""


class FusedEngine(Engine):
    """The gradient of :class:`AutogradEngine`, to a rounding, in the products that it needs.

    An FGSM step of a batch costs four products with W_1 (forward and backward by the input for the
    attack, forward and backward by the weights for the step) and little else: no weight gradients
    in the attack, no input gradient in training, no buffers made anew, and :meth:`descend`
    adds ``−η G`` to W without forming G.

    Labels and bounds are not checked here: :meth:`check` does, once for a data set.

    Args:
        model, loss, attack, derivative: as for :class:`Engine`; ``detached`` only.
        shape: the shape of an example.
        products: which library multiplies; see :func:`choose_products`.
        perturbation_precision: ``bf16`` takes the attack's products in bfloat16. The perturbation
            stays in the ball; it is another one where the rounding flips a sign.

    Attributes:
        network: the weights as explicit products see them.

    Raises:
        ModelError: the network is not dense, or a step of this kind has no explicit form.
        InputError: bf16 for a network that is not of float32.
    """

    name: ClassVar[str] = "fused"
    in_place: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        attack: Attack | None,
        derivative: Derivative = "detached",
        *,
        shape: Sequence[int],
        products: Products = "default",
        perturbation_precision: PerturbationPrecision = "float32",
    ) -> None:
        super().__init__(model, loss, attack, derivative)
        reason = refusal(model, attack, derivative, shape)
        network = DenseNetwork.of(model, shape)
        if reason is not None or network is None:
            raise ModelError(f"the fused engine: {reason}; use engine='autograd'")
        self.network = network
        self.products: Products = products
        self.perturbation_precision: PerturbationPrecision = perturbation_precision
        self.seen: DenseNetwork = network
        """The network that the attack sees."""
        if perturbation_precision == "bf16":
            if network.weights[0].dtype != torch.float32:
                raise InputError(
                    "perturbation_precision: bf16 is for training in float32, got "
                    f"{network.weights[0].dtype}"
                )
            self.seen = network.in_precision(torch.bfloat16)
        self._perturber = None if attack is None else Perturber(self.seen, attack)
        self._descended: Tensor | None = None
        self._last: FusedEngine | None = None
        self._captured: dict[tuple[Any, ...], tuple[FusedEngine, CapturedStep] | None] = {}
        self._seen_once: set[tuple[Any, ...]] = set()

    @property
    def settings(self) -> dict[str, str]:
        """Engine, library of the products, precision of the perturbation."""
        return {
            "engine": self.name,
            "products": self.products,
            "perturbation_precision": self.perturbation_precision,
        }

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse examples that the loss or the attack cannot take; see :meth:`Engine.check`."""
        if self.attack is not None:
            self.attack.check_bounds(x)
        self.loss.scores(x.new_zeros(1, self.network.classes).expand(len(y), -1), y)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        log_reference: float | None = None,
        count: int | None = None,
        *,
        of_log: bool = False,
    ) -> LossGradient:
        """The gradient on the batch (x, y); arguments as for :meth:`Engine.__call__`."""
        with multiplying(self.products), torch.no_grad():
            z, outputs = self._forward(x, y, generator)
            if of_log:
                loss, margins, seeds = log_loss_slopes(self.loss, outputs, y)
            else:
                loss, margins, seeds = loss_slopes(self.loss, outputs, y, log_reference, count)
            self.network.backward(z, seeds.mT)
            return LossGradient(loss, self.network.gradients(z), margins, outputs)

    def descend(
        self,
        x: Tensor,
        y: Tensor,
        rate: float,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> LossGradient:
        """``W ← W − rate G`` in place, unless L is not finite; arguments as for :meth:`Engine.descend`."""
        captured = self._captured_step(x, y, rate, count) if x.is_cuda else None
        if captured is not None:
            engine, step = captured
            self._last = engine
            return step(x, y)
        return self._descend(x, y, rate, generator, count, lambda loss: math.isfinite(float(loss)))

    def _descend(
        self,
        x: Tensor,
        y: Tensor,
        rate: float,
        generator: torch.Generator | None,
        count: int | None,
        accept: Callable[[Tensor], bool],
    ) -> LossGradient:
        """One step, where ``accept`` says yes to its loss."""
        with multiplying(self.products), torch.no_grad():
            z, outputs = self._forward(x, y, generator)
            loss, margins, seeds = loss_slopes(self.loss, outputs, y, None, count)
            if accept(loss):
                self.network.backward(z, seeds.mT)
                self.network.descend(z, rate)
                self._descended = z
            return LossGradient(loss, (), margins, outputs)

    def _captured_step(
        self, x: Tensor, y: Tensor, rate: float, count: int | None
    ) -> tuple[FusedEngine, CapturedStep] | None:
        """The step as a CUDA graph, from the second batch of its size on, if it can be one."""
        attack = self.attack
        if len(x) > _CAPTURED_ROWS or (
            attack is not None and (attack.random or not Perturber.in_place(attack))
        ):
            return None
        key = (tuple(x.shape), y.dtype, rate, count)
        if key in self._captured:
            return self._captured[key]
        if key not in self._seen_once:
            self._seen_once.add(key)
            return None
        self._captured[key] = None
        if len(self._captured) <= _CAPTURED_SIZES:
            # Of its own, for a graph holds addresses: these buffers are never given up.
            engine = FusedEngine(
                self.model,
                self.loss,
                attack,
                shape=x.shape[1:],
                products=self.products,
                perturbation_precision=self.perturbation_precision,
            )

            def step(x: Tensor, y: Tensor) -> LossGradient:
                return engine._descend(x, y, rate, None, count, lambda loss: True)

            try:
                self._captured[key] = (engine, CapturedStep(step, self.network.weights, x, y))
            except RuntimeError as error:
                warnings.warn(
                    f"CUDA cannot capture the step ({error}); it is launched in pieces",
                    stacklevel=2,
                )
        return self._captured[key]

    def last_gradients(self) -> tuple[Tensor, ...]:
        """G of the last :meth:`descend`: its factors are in the buffers until the next call.

        Returns:
            one tensor a parameter, each of its shape.
        """
        if self._last is not None:
            return self._last.last_gradients()
        if self._descended is None:
            raise RuntimeError("no step whose factors are still there")
        with multiplying(self.products):
            return self.network.gradients(self._descended)

    def perturbed(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``x + δ`` as the training sees it, shape of x: in :attr:`perturbation_precision`.

        Args:
            x: examples, (n, …).
            y: labels, (n,).
            generator: serves a random start.
        """
        with multiplying(self.products), torch.no_grad():
            return self._perturbed(x, y, generator).mT.reshape(x.shape).clone()

    def scores(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The scores z_i at the perturbed inputs, (n,), without gradients."""
        with multiplying(self.products), torch.no_grad():
            outputs = self.network.forward(self._perturbed(x, y, generator)).mT
            return self.loss.scores(outputs, y).clone()

    def reach(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and ``max_k ‖∂z_i/∂W_k‖_F / ‖W_k‖_F``; see :meth:`Engine.reach`.

        Returns:
            both (n,).
        """
        with multiplying(self.products), torch.no_grad():
            z = self._perturbed(x, y, generator)
            f = self.network.forward(z).mT
            with torch.enable_grad():
                f = f.clone().requires_grad_()
                scores = self.loss.scores(f, y)
                (seeds,) = torch.autograd.grad(scores.sum(), f)
            self.network.backward(z, seeds.mT)
            sizes = torch.stack([w.norm() for w in self.network.weights])
            return scores.detach(), (self.network.gradient_norms(z) / sizes).amax(dim=1)

    def _forward(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """The perturbed inputs as columns, (D, n), and the outputs there, (n, C)."""
        z = self._perturbed(x, y, generator)
        return z, self.network.forward(z).mT

    def _perturbed(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        self._descended = self._last = None
        if self._perturber is None:
            return self.network.columns(x)
        if self.seen is not self.network:
            self.seen.follow(self.network)
        return self._perturber(x, y, generator)[0]


def loss_slopes(
    loss: Loss,
    outputs: Tensor,
    y: Tensor,
    log_reference: float | None = None,
    count: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L, the margins and ``∂L/∂f`` (of ``L/e^r`` given r), (n, C).

    Args:
        loss: the loss ℓ.
        outputs: (n, C), or (S, n, C) of stacked networks: then L is (S,).
        y: labels that fit, (n,) or (S, n).
        log_reference: r.
        count: the n of ``1/n``, by default the number of examples.
    """
    count = y.shape[-1] if count is None else count
    labels = y.flatten()
    margins = margins_of(outputs.flatten(0, -2), labels, checked=True).view(y.shape)
    if outputs.shape[-1] == 1:
        slopes = loss.log_slopes(margins)
        if log_reference is not None:
            slopes = slopes - log_reference
        seeds = (slopes.exp_() * y).mul_(-1 / count).unsqueeze(-1)
        return loss.values(margins).sum(-1) / count, margins, seeds
    with torch.enable_grad():
        f = outputs.detach().clone().requires_grad_()
        scores = loss.scores(f.flatten(0, -2), labels).view(y.shape)
        value = loss.values(scores).sum(-1) / count
        objective = value.sum()
        if log_reference is not None:
            slopes = torch.exp(loss.log_slopes(scores.detach()) - log_reference)
            objective = -(slopes * scores).sum() / count
        (seeds,) = torch.autograd.grad(objective, f)
    return value.detach(), margins, seeds


def log_loss_slopes(loss: Loss, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``ln L``, the margins and ``∂ ln L/∂f``, (n, C), of outputs (n, C) and labels (n,) that fit."""
    margins = margins_of(outputs, y, checked=True)
    if outputs.shape[-1] == 1:
        seeds = (loss.log_weights(margins).exp_() * y).neg_().unsqueeze(-1)
        return loss.log_mean(margins), margins, seeds
    with torch.enable_grad():
        f = outputs.detach().clone().requires_grad_()
        value = loss.log_mean(loss.scores(f, y))
        (seeds,) = torch.autograd.grad(value, f)
    return value.detach(), margins, seeds


def refusal(
    model: nn.Module, attack: Attack | None, derivative: Derivative, shape: Sequence[int]
) -> str | None:
    """Why a step has no explicit form here, or None if it has one."""
    reason = unserved(model, attack, shape)
    if reason is None and attack is not None and derivative != "detached":
        reason = "expected derivative='detached'"
    if reason is None and not all(p.requires_grad for p in model.parameters()):
        reason = "expected every weight to be trained"
    return reason


def unserved(model: nn.Module, attack: Attack | None, shape: Sequence[int]) -> str | None:
    """Why perturbed outputs have no explicit form here, or None if they have one."""
    if DenseNetwork.of(model, shape) is None:
        return (
            "expected a dense network (linear layers without biases and ReLU, leaky or squared ReLU "
            "in nn.Sequential, on flattened examples)"
        )
    if not Perturber.serves(attack):
        return f"expected the attack FGM, FGSM, PGD or FiniteSet, got {type(attack).__name__}"
    return None
