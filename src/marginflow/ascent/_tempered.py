"""A loss at a temperature: the smooth minimum of margins that ascent climbs.

Source: marginflow; ``ℓ`` of Section 3.2 at a temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marginflow._checks import real
from marginflow.losses import Loss


class Tempered(Loss):
    """``ℓ_τ(z) = ℓ(τ z)``: the higher τ, the nearer ``−ln L/τ`` to the least score.

    With the layers at norm 1 scores are of the size of γ̂, a hundredth and less: at τ = 1 every
    example weighs the same. ``−(1/τ) ln((1/n) Σ e^{−τ z_i})`` lies in ``[min z, min z + (ln n)/τ]``.

    Args:
        loss: ℓ.

    Attributes:
        temperature: τ > 0; may be set between steps.
    """

    name = "tempered"

    def __init__(self, loss: Loss, temperature: float = 1.0) -> None:
        self.loss = loss
        self._temperature = 1.0
        self.temperature = temperature

    @property
    def temperature(self) -> float:
        """The temperature τ > 0."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = real("temperature", value, above=0.0)

    def scores(self, outputs: Tensor, y: Tensor) -> Tensor:
        """``z_i/τ`` of the outputs τ f, (n,): the margins of one output, for more the soft ones."""
        if outputs.ndim == 1 or outputs.shape[1] == 1:
            return self.loss.scores(outputs, y)
        return self.loss.scores(outputs * self.temperature, y) / self.temperature

    def values(self, z: Tensor) -> Tensor:
        """``ℓ(τ z_i)``, shape (n,)."""
        return self.loss.values(z * self.temperature)

    def log_values(self, z: Tensor) -> Tensor:
        """``ln ℓ(τ z)``.

        Shape (n,).
        """
        return self.loss.log_values(z * self.temperature)

    def log_slopes(self, z: Tensor) -> Tensor:
        """``ln |dℓ(τ z)/dz| = ln τ + ln |ℓ′(τ z)|``.

        Shape (n,).
        """
        return self.loss.log_slopes(z * self.temperature) + math.log(self.temperature)

    def overflows(self, z: Tensor) -> bool:
        """Whether ``τ z`` leaves the range of its dtype for a finite z.

        Args:
            z: scores, (n,).
        """
        return not bool(torch.isfinite(z * self.temperature).all()) and bool(
            torch.isfinite(z).all()
        )
