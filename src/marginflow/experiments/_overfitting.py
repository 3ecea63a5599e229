"""Catastrophic overfitting: the FGSM margin grows while the PGD margin collapses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from marginflow.experiments._beside import setting_note
from marginflow.experiments._claims import Finding, each_seed, judge, milli
from marginflow.experiments._curves import (
    ACCURACY,
    UPPER,
    accuracy_panel,
    along_epochs,
    epoch_panel,
    in_thousandths,
    path_of,
)
from marginflow.experiments._experiment import Experiment, Results, ScaleName, Trained, Training
from marginflow.experiments._figure import Curve, FigureData, Panel
from marginflow.overfitting import Overfitting, detect_overfitting
from marginflow.theorems._verdict import Claim


@dataclass(frozen=True)
class CatastrophicOverfitting(Experiment):
    """Training against FGSM of a large and of a moderate ε, each measured under FGSM and ℓ∞-PGD.

    Attributes:
        data, model, batch_size, epochs, lr: of both nets.
        large: ε at which training overfits.
        moderate: ε at which it does not: the control.
        steps: of the PGD, each of 2.5 ε/steps.
    """

    name: ClassVar[str] = "overfitting"
    title: ClassVar[str] = "Catastrophic overfitting, and the detector that flags it"

    data: str
    model: str
    batch_size: int
    epochs: int
    large: float
    moderate: float
    lr: float
    steps: int = 10

    def pgd(self, eps: float) -> str:
        """The stronger attack of size ``eps``."""
        return f"pgd-linf:eps={eps:g},steps={self.steps}"

    def trainings(self) -> tuple[Training, ...]:
        """The two nets."""
        return tuple(
            Training(
                name,
                f"FGSM, ε = {eps:g}",
                self.data,
                self.model,
                f"fgsm:eps={eps:g}",
                self.epochs,
                loss="cross-entropy",
                lr=self.lr,
                batch_size=self.batch_size,
                also=(self.pgd(eps),),
                held_out=False,
            )
            for name, eps in (("large", self.large), ("moderate", self.moderate))
        )

    def figure(self, results: Results) -> FigureData:
        """Accuracy and γ̂_m under both attacks, of both nets; the flagged epoch."""
        panels, sentences = [], []
        for training, eps in zip(self.trainings(), (self.large, self.moderate), strict=True):
            net = results[training.name]
            for key, factor, panel, what in (
                (ACCURACY, 100.0, accuracy_panel, "accuracy"),
                (UPPER, 1.0, _quartile_panel, "margins"),
            ):
                curves = [
                    along_epochs(label, net, key, attack=attack, color=color, factor=factor)
                    for color, (label, attack) in enumerate(
                        (("under FGSM", None), ("under ℓ∞-PGD", self.pgd(eps)))
                    )
                ]
                panels.append(panel(f"{training.label}: {what}", curves))
            flags = [self._flag(t, eps) for t in net]
            epochs = ", ".join("none" if f is None else f"epoch {f.epoch:,.0f}" for f in flags)
            sentences.append(f"ε = {eps:g}: {epochs}")
        return FigureData(
            self.name,
            self.title,
            f"Flagged by the detector: {'; '.join(sentences)}.",
            panels,
            (
                setting_note(self.trainings()[0], results),
                f"Trained against FGSM, measured under it and under ℓ∞-PGD of the same ε ({self.steps} "
                f"steps of 2.5 ε/{self.steps}); {self.epochs:,} epochs. Margins: the upper quartile of "
                "γ̂_i over the training examples. Flagged: half of the best PGD accuracy is lost while the "
                "FGSM accuracy is not, at two measured epochs in a row.",
            ),
            (
                judge(
                    Claim(
                        "Overfitting, large ε",
                        "the FGSM margin grows while the PGD accuracy and margin collapse",
                        (),
                        "upper quartile of γ̂_i and accuracy under both attacks, best under PGD → last epoch",
                        "flagged; at the end the FGSM margin is larger than where PGD was withstood best, "
                        "the PGD margin smaller, and half of the PGD accuracy still lost",
                        "half of the best accuracy under PGD",
                    ),
                    each_seed({"large": results["large"]}, lambda t: self._collapse(t, self.large)),
                ),
                judge(
                    Claim(
                        "Overfitting, moderate ε",
                        "at a moderate ε it does not happen",
                        (),
                        "the flagged epoch",
                        "none",
                        "half of the best accuracy under PGD",
                    ),
                    each_seed(
                        {"moderate": results["moderate"]},
                        lambda t: _unflagged(self._flag(t, self.moderate)),
                    ),
                ),
            ),
        )

    def _flag(self, t: Trained, eps: float) -> Overfitting | None:
        return detect_overfitting(t.records(), t.records(self.pgd(eps)))

    def _collapse(self, t: Trained, eps: float) -> Finding:
        flag = self._flag(t, eps)
        weak, strong = t.records(), t.records(self.pgd(eps))
        if flag is None:
            ends = f"FGSM {weak[-1][ACCURACY]:.1%}, PGD {strong[-1][ACCURACY]:.1%}"
            return Finding(None, f"nothing flagged; accuracies at the end: {ends}")
        peak = next(r["epoch"] for r in strong if r["step"] == flag.peak_step)
        last = strong[-1]["epoch"]
        (weak_then, weak_now), (strong_then, strong_now) = (
            (path_of(records, UPPER)[peak], path_of(records, UPPER)[last])
            for records in (weak, strong)
        )
        down = strong[-1][ACCURACY] <= flag.peak_strong_accuracy / 2
        text = (
            f"{flag}; upper quartiles from epoch {peak:,} to {last:,}: FGSM {milli(weak_then)} → "
            f"{milli(weak_now)}, PGD {milli(strong_then)} → {milli(strong_now)}"
        )
        return Finding(down and weak_now > weak_then and strong_now < strong_then, text)


def _quartile_panel(title: str, curves: Sequence[Curve]) -> Panel:
    return epoch_panel(title, "upper quartile of γ̂_i (×10⁻³)", in_thousandths(curves))


def _unflagged(flag: Overfitting | None) -> Finding:
    return Finding(flag is None, "none" if flag is None else str(flag))


OVERFITTING: dict[ScaleName, CatastrophicOverfitting] = {
    "demo": CatastrophicOverfitting(
        "digits:n=300", "mlp:128", 16, 150, large=0.3, moderate=0.1, lr=0.2
    ),
    "mnist": CatastrophicOverfitting(
        "mnist:n=2000", "mlp:1024,64", 80, 200, large=0.3, moderate=0.1, lr=0.2
    ),
    "paper": CatastrophicOverfitting(
        "mnist:n=10000", "mlp:1024,64", 80, 300, large=0.3, moderate=0.1, lr=0.2
    ),
}
