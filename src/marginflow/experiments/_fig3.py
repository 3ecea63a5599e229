"""Figure 3: the CNN on all ten digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from marginflow.experiments._experiment import ScaleName
from marginflow.experiments._sizes import Sizes


@dataclass(frozen=True)
class Fig3(Sizes):
    """All ten classes with cross-entropy; ε = 16/255, 32/255. The paper does not give the CNN's sizes."""

    name: ClassVar[str] = "fig3"
    title: ClassVar[str] = (
        "Figure 3: margins of a CNN under perturbations of several sizes, ten classes"
    )
    number: ClassVar[int] = 3

    loss: str = "cross-entropy"


_SIZES = ("16/255", "32/255")

FIG3: dict[ScaleName, Fig3] = {
    "demo": Fig3(
        data="digits:n=300",
        model="cnn:8,16,hidden=64,kernel=3",
        batch_size=30,
        sizes=("0.04", "0.08"),
        fgsm_epochs=500,
        pgd_epochs=500,
    ),
    "mnist": Fig3(
        # The paper's network on 60,000 examples would have time for one epoch.
        data="mnist:n=2000",
        model="cnn",
        batch_size=80,
        sizes=_SIZES,
        fgsm_epochs=60,
        pgd_epochs=20,
        held_out=False,
    ),
    "paper": Fig3(
        data="mnist",
        model="cnn",
        batch_size=80,
        sizes=_SIZES,
        fgsm_epochs=500,
        pgd_epochs=500,
    ),
}
