"""The loss gradient at perturbed inputs, by autograd, for any model.

Source: the gradient of Algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from marginflow.attacks import Derivative
from marginflow.engine._base import Engine, LossGradient
from marginflow.losses import margins_of


class AutogradEngine(Engine):
    """``G = ∇_W (1/n) Σ ℓ(z(x_i + δ_i(W)))`` by autograd; arguments as for :class:`Engine`."""

    name: ClassVar[str] = "autograd"

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
        outputs = self.model(self._perturbed(x, y, generator, self.derivative))
        scores = self.loss.scores(outputs, y)
        count = len(y) if count is None else count
        share = len(y) / count
        loss = self.loss.log_mean(scores) if of_log else self.loss.mean(scores) * share
        objective = loss
        if log_reference is not None and not of_log:
            slopes = torch.exp(self.loss.log_slopes(scores.detach()) - log_reference)
            objective = -(slopes * scores).sum() / count
        gradients = torch.autograd.grad(objective, self.parameters, materialize_grads=True)
        with torch.no_grad():
            margins = margins_of(outputs, y, checked=True)
        return LossGradient(loss.detach(), gradients, margins, outputs.detach())

    def scores(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The scores z_i at the perturbed inputs, (n,), without gradients."""
        x = self._perturbed(x, y, generator, "detached")
        with torch.no_grad():
            return self.loss.scores(self.model(x), y)

    def _perturbed(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None, derivative: Derivative
    ) -> Tensor:
        """``x + δ``, shape of x."""
        if self.attack is None:
            return x
        found = self.attack(self.model, x, y, derivative=derivative, generator=generator)
        return x + found.delta
