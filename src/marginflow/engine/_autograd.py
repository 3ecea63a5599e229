"""The loss gradient at perturbed inputs, by autograd, for any model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marginflow._logmath import log_mean_exp
from marginflow.attacks import Attack, Derivative
from marginflow.losses import Loss, margins_of


@dataclass(frozen=True, eq=False)
class LossGradient:
    """What one step needs and what comes free with it.

    Attributes:
        loss: ``L = (1/n) Σ ℓ(z_i)`` at the perturbed inputs, a scalar tensor.
        gradients: ``G = ∂L/∂W``, one per trainable parameter, in their order.
        margins: the margins m_i at the perturbed inputs, (n,).
        outputs: the outputs at the perturbed inputs.
    """

    loss: Tensor
    gradients: tuple[Tensor, ...]
    margins: Tensor
    outputs: Tensor


class AutogradEngine:
    """``G = ∇_W (1/n) Σ ℓ(z(x_i + δ_i(W)))`` by autograd.

    Args:
        model: any torch module; its ``.grad`` fields are not touched.
        loss: the loss ℓ.
        attack: δ, or None for standard training.
        derivative: ``detached`` holds δ fixed (Algorithm 1), ``total`` differentiates through it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        attack: Attack | None,
        derivative: Derivative = "detached",
    ) -> None:
        self.model = model
        self.loss = loss
        self.attack = attack
        self.derivative: Derivative = derivative
        self.parameters = tuple(p for p in model.parameters() if p.requires_grad)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        log_reference: float | None = None,
    ) -> LossGradient:
        """The gradient on the batch (x, y).

        Args:
            x: examples of the batch, of the model's dtype and device.
            y: their labels.
            generator: serves a random start.
            log_reference: a number r; the gradient is then that of ``L/e^r``, formed in the
                log domain, so that it neither under- nor overflows where L does.
        """
        if self.attack is not None:
            perturbation = self.attack(
                self.model, x, y, derivative=self.derivative, generator=generator
            )
            x = x + perturbation.delta
        outputs = self.model(x)
        scores = self.loss.scores(outputs, y)
        loss = self.loss.mean(scores)
        objective = loss
        if log_reference is not None:
            slopes = torch.exp(self.loss.log_slopes(scores.detach()) - log_reference)
            objective = -(slopes * scores).mean()
        gradients = torch.autograd.grad(objective, self.parameters, materialize_grads=True)
        with torch.no_grad():
            margins = margins_of(outputs, y, checked=True)
        return LossGradient(loss.detach(), gradients, margins, outputs.detach())

    def log_loss(
        self,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        batch_size: int = 1024,
    ) -> float:
        """``ln L`` of all examples at their perturbed inputs, in batches, without gradients."""
        values = []
        for start in range(0, x.shape[0], batch_size):
            xb, yb = x[start : start + batch_size], y[start : start + batch_size]
            if self.attack is not None:
                xb = xb + self.attack(self.model, xb, yb, generator=generator).delta
            with torch.no_grad():
                scores = self.loss.scores(self.model(xb), yb).double()
            values.append(self.loss.log_values(scores))
        return float(log_mean_exp(torch.cat(values)))
