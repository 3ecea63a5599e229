"""Catastrophic overfitting: the FGSM margin grows while the PGD margin collapses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from marginflow.experiments._beside import setting_note
from marginflow.experiments._claims import Finding, each_seed, judge, milli
from marginflow.experiments._curves import (
    ACCURACY,
    MARGIN,
    accuracy_panel,
    along_epochs,
    margin_panel,
)
from marginflow.experiments._experiment import Experiment, Results, ScaleName, Trained, Training
from marginflow.experiments._figure import FigureData
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
                lr=self.lr,
                batch_size=self.batch_size,
                also=(self.pgd(eps),),
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
                (MARGIN, 1.0, margin_panel, "γ̂_m"),
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
                f"steps of 2.5 ε/{self.steps}); {self.epochs:,} epochs. Flagged: the PGD accuracy has "
                "fallen by 20 points from its best while the FGSM accuracy has not, at two measured epochs in a row.",
            ),
            (
                judge(
                    Claim(
                        "Overfitting, large ε",
                        "FGSM training ends with a larger FGSM margin and a collapsed PGD margin",
                        (),
                        "γ̂_m and accuracy under both attacks at the end; the flagged epoch",
                        "the detector flags an epoch, and from there to the end the FGSM margin rises while "
                        "the PGD accuracy stays down",
                        "20 points of accuracy",
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
                        "20 points of accuracy",
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
        weak, strong = t.records()[-1], t.records(self.pgd(eps))[-1]
        ends = (
            f"at the end FGSM {weak[ACCURACY]:.1%}, γ̂_m {milli(weak[MARGIN])}; PGD {strong[ACCURACY]:.1%}, "
            f"γ̂_m {milli(strong[MARGIN])}"
        )
        if flag is None:
            return Finding(None, f"nothing flagged; {ends}")
        down = strong[ACCURACY] <= flag.peak_strong_accuracy - 0.2
        return Finding(down and weak[MARGIN] > flag.weak_margin, f"{flag}; {ends}")


def _unflagged(flag: Overfitting | None) -> Finding:
    return Finding(flag is None, "none" if flag is None else str(flag))


OVERFITTING: dict[ScaleName, CatastrophicOverfitting] = {
    "demo": CatastrophicOverfitting(
        "digits:3,8", "mlp:256,32", 32, 400, large=0.3, moderate=0.1, lr=0.3
    ),
    "mnist": CatastrophicOverfitting(
        "mnist:3,8,n=2000", "mlp:1024,64", 80, 150, large=0.3, moderate=0.1, lr=0.3
    ),
    "paper": CatastrophicOverfitting(
        "mnist:3,8", "mlp:1024,64", 80, 300, large=0.3, moderate=0.1, lr=0.3
    ),
}
