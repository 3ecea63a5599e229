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
        data="digits:n=400",
        model="cnn:8,16,hidden=64,kernel=3",
        batch_size=40,
        sizes=("0.05", "0.1"),
        fgsm_epochs=200,
        pgd_epochs=200,
    ),
    "mnist": Fig3(
        data="mnist:n=6000",
        model="cnn:16,32,hidden=64",
        batch_size=80,
        sizes=_SIZES,
        fgsm_epochs=30,
        pgd_epochs=15,
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
