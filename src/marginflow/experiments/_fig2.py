"""Figure 2: three sizes of FGSM and ℓ∞-PGD on two classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from marginflow.experiments._experiment import ScaleName
from marginflow.experiments._sizes import Sizes


@dataclass(frozen=True)
class Fig2(Sizes):
    """3-vs-8 with the logistic loss; ε = 8/255, 12/255, 24/255."""

    name: ClassVar[str] = "fig2"
    title: ClassVar[str] = "Figure 2: margins under perturbations of several sizes, two classes"
    number: ClassVar[int] = 2


_SIZES = ("8/255", "12/255", "24/255")

FIG2: dict[ScaleName, Fig2] = {
    "demo": Fig2(
        data="digits:3,8",
        model="mlp:128,32",
        batch_size=32,
        sizes=("0.04", "0.06", "0.12"),
        fgsm_epochs=1600,
        pgd_epochs=1600,
    ),
    "mnist": Fig2(
        data="mnist:3,8",
        model="mlp:1024,64",
        batch_size=80,
        sizes=_SIZES,
        fgsm_epochs=160,
        pgd_epochs=80,
    ),
    "paper": Fig2(
        data="mnist:3,8",
        model="mlp:1024,64",
        batch_size=80,
        sizes=_SIZES,
        fgsm_epochs=1000,
        pgd_epochs=1000,
    ),
}
