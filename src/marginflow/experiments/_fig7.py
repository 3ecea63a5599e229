"""Figure 7: the layers of deep linear networks tend to rank one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from marginflow.alignment import Alignment
from marginflow.experiments._deep_linear import DeepLinear
from marginflow.experiments._experiment import ScaleName
from marginflow.experiments._fig6 import FIG6


@dataclass(frozen=True)
class Fig7(DeepLinear):
    """``‖W_k‖₂/‖W_k‖_F`` of every layer, which tends to 1; of the runs of Figure 6."""

    name: ClassVar[str] = "fig7"
    title: ClassVar[str] = "Figure 7: the layers of deep linear networks tend to rank one"
    number: ClassVar[int] = 7
    ylabel: ClassVar[str] = "‖W_k‖₂ / ‖W_k‖_F"

    def layers(self, point: Alignment) -> torch.Tensor:
        """``‖W_k‖₂/‖W_k‖_F``, (L,)."""
        return point.ratios

    def sentence(self, values: torch.Tensor) -> str:
        """The smallest ratio; that of the last layer, which has one row, is 1."""
        hidden = values[:, :-1]
        return f"least ratio {float(hidden[0].min()):.3f} → {float(hidden[-1].min()):.3f}"


FIG7: dict[ScaleName, Fig7] = {
    scale: Fig7(settings.epochs, settings.data, settings.attack) for scale, settings in FIG6.items()
}
