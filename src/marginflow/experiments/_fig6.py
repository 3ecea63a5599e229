"""Figure 6: the norms of the layers of deep linear networks grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from marginflow.alignment import Alignment
from marginflow.experiments._deep_linear import DeepLinear
from marginflow.experiments._experiment import ScaleName


@dataclass(frozen=True)
class Fig6(DeepLinear):
    """``‖W_k‖_F`` of every layer against the step."""

    name: ClassVar[str] = "fig6"
    title: ClassVar[str] = "Figure 6: Frobenius norms of the layers of deep linear networks"
    number: ClassVar[int] = 6
    ylabel: ClassVar[str] = "‖W_k‖_F"

    def layers(self, point: Alignment) -> torch.Tensor:
        """``‖W_k‖_F``, (L,)."""
        return point.frobenius

    def sentence(self, values: torch.Tensor) -> str:
        """From where the norms come, and where they end."""
        first, last = values[0], values[-1]
        return (
            f"norms from {float(first.min()):.2f} … {float(first.max()):.2f} to "
            f"{float(last.min()):.2f} … {float(last.max()):.2f}"
        )


FIG6: dict[ScaleName, Fig6] = {
    "demo": Fig6(3000),
    "mnist": Fig6(30_000),
    "paper": Fig6(100_000),
}
