"""The trade-off of Eq. 20, measured: accuracy against the ε that a net is trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from marginflow._specs import number as fraction
from marginflow.attacks import Attack, build
from marginflow.datasets import Dataset
from marginflow.experiments._beside import setting_note
from marginflow.experiments._claims import Finding, judge, two_standard_errors
from marginflow.experiments._curves import banded
from marginflow.experiments._experiment import Experiment, Results, ScaleName, Trained, Training
from marginflow.experiments._figure import Curve, FigureData, Panel
from marginflow.margins import adversarial_margins
from marginflow.theorems._verdict import Claim

_KEYS = (
    "clean_accuracy",
    "test_clean_accuracy",
    "adversarial_accuracy",
    "test_adversarial_accuracy",
)
_LABELS = ("clean, train", "clean, test", "perturbed, train", "perturbed, test")


@dataclass(frozen=True)
class TradeOff(Experiment):
    """One net for each ε, trained against ℓ∞-PGD.

    Attributes:
        data, model, batch_size, epochs, lr: of all nets.
        sizes: every ε, rising from 0, as text.
        fixed: the ε under which all nets are compared, one of ``sizes``.
        steps: of the PGD; each of 2.5 ε/steps.
    """

    name: ClassVar[str] = "tradeoff"
    title: ClassVar[str] = "The trade-off of Eq. 20: robustness against accuracy"

    data: str
    model: str
    batch_size: int
    epochs: int
    sizes: tuple[str, ...]
    fixed: str
    steps: int = 5
    lr: float = 0.1

    def attack(self, eps: str) -> str:
        """The PGD of size ``eps``."""
        return f"pgd-linf:eps={eps},steps={self.steps}"

    def trainings(self) -> tuple[Training, ...]:
        """One net for each ε; ε = 0 is standard training."""
        return tuple(
            Training(
                f"eps-{eps.replace('/', '-')}",
                f"ε = {eps}",
                self.data,
                self.model,
                self.attack(eps),
                self.epochs,
                lr=self.lr,
                batch_size=self.batch_size,
                per_decade=3,
            )
            for eps in self.sizes
        )

    def figure(self, results: Results) -> FigureData:
        """Accuracies under the net's own ε, and of all nets under one and the same."""
        nets = [results[t.name] for t in self.trainings()]
        at = [fraction(eps, "ε") for eps in self.sizes]
        own = [
            banded(
                label,
                at,
                [[100 * t.records()[-1][key] for t in seeds] for seeds in nets],
                color=k // 2,
                dashed=bool(k % 2),
            )
            for k, (key, label) in enumerate(zip(_KEYS, _LABELS, strict=True))
        ]
        data = results.load(self.data)
        attack = build(self.attack(self.fixed))
        splits = [("train", data)] + ([("test", data.test)] if data.test is not None else [])
        same = [
            banded(
                split,
                at,
                [[100 * _accuracy(t, part, attack) for t in seeds] for seeds in nets],
                color=1,
                dashed=split == "test",
            )
            for split, part in splits
        ]
        count = 0 if data.test is None else data.test.n
        clean, robust = own[1], same[-1]
        sentence = (
            f"From ε = {self.sizes[0]} to ε = {self.sizes[-1]} the clean test accuracy goes from "
            f"{clean.y[0]:.1f} % to {clean.y[-1]:.1f} %; under the same perturbation (ε = {self.fixed}) "
            f"the test accuracy goes from {robust.y[0]:.1f} % to "
            f"{robust.y[self.sizes.index(self.fixed)]:.1f} % at ε = {self.fixed}."
        )
        return FigureData(
            self.name,
            self.title,
            sentence,
            (
                Panel("Each net under its own ε", "ε in training", "correct (%)", own),
                Panel(f"All nets under ε = {self.fixed}", "ε in training", "correct (%)", same),
            ),
            (
                setting_note(self.trainings()[0], results),
                f"ℓ∞-PGD, {self.steps} steps of 2.5 ε/{self.steps}, {self.epochs:,} epochs; {count:,} test "
                "examples. Eq. 20 speaks of an exact adversary; PGD is a weaker one.",
            ),
            (
                judge(
                    _claim(
                        "robustness",
                        "training against the perturbation raises the accuracy under it",
                        f"test accuracy under ε = {self.fixed}, standard net → net trained with it",
                        "rises",
                    ),
                    {"": _change(robust, self.sizes.index(self.fixed), count, sign=1)},
                ),
                judge(
                    _claim(
                        "price",
                        "robustness is paid for with clean accuracy",
                        f"clean test accuracy, standard net → net of ε = {self.sizes[-1]}",
                        "falls",
                    ),
                    {"": _change(clean, len(self.sizes) - 1, count, sign=-1)},
                ),
            ),
        )


def _claim(part: str, claim: str, quantity: str, prediction: str) -> Claim:
    return Claim(
        f"Eq. 20, {part}",
        claim,
        (),
        quantity,
        prediction,
        "two standard errors of the difference of two shares",
    )


def _change(curve: Curve, place: int, count: int, *, sign: int) -> Finding:
    """Whether the curve rises (falls) from its first point to the one at ``place``."""
    first, last = curve.y[0] or 0.0, curve.y[place] or 0.0
    error = 100 * two_standard_errors(first / 100, last / 100, count)
    return Finding(
        sign * (last - first) > error,
        f"{first:.1f} % → {last:.1f} % (two standard errors: {error:.1f})",
    )


def _accuracy(t: Trained, data: Dataset, attack: Attack | None) -> float:
    model = t.run.load_model()
    return adversarial_margins(model, data.x, data.y, attack, normalize=False).accuracy


TRADEOFF: dict[ScaleName, TradeOff] = {
    "demo": TradeOff(
        data="digits:3,8",
        model="mlp:128,32",
        batch_size=32,
        epochs=300,
        sizes=("0", "0.05", "0.1", "0.15", "0.2", "0.25"),
        fixed="0.1",
    ),
    "mnist": TradeOff(
        data="mnist:3,8,n=3000",
        model="mlp:1024,64",
        batch_size=80,
        epochs=150,
        sizes=("0", "8/255", "16/255", "32/255", "64/255", "96/255"),
        fixed="32/255",
    ),
    "paper": TradeOff(
        data="mnist:3,8",
        model="mlp:1024,64",
        batch_size=80,
        epochs=500,
        sizes=("0", "8/255", "16/255", "32/255", "64/255", "96/255"),
        fixed="32/255",
    ),
}
