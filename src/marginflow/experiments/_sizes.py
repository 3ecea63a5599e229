"""The same net against several perturbations of several sizes: Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from marginflow._specs import number as fraction
from marginflow.experiments._beside import LONGER, setting_note
from marginflow.experiments._claims import (
    difference,
    difference_claim,
    each_seed,
    fitted,
    fitted_claim,
    growth,
    growth_claim,
    judge,
    milli,
)
from marginflow.experiments._curves import (
    ACCURACY,
    MARGIN,
    accuracy_panel,
    along_epochs,
    margin_panel,
)
from marginflow.experiments._experiment import Experiment, Results, Training
from marginflow.experiments._figure import FigureData, Panel


@dataclass(frozen=True)
class Sizes(Experiment):
    """FGSM and ℓ∞-PGD of several ε, each measured as trained.

    Attributes:
        data, model, batch_size, lr, loss: of all nets.
        sizes: ε of the perturbations, as text: ``8/255``.
        steps: of the PGD.
        step: its step in units of ε.
        fgsm_epochs, pgd_epochs: of the nets trained against each.
        held_out: whether the test split is measured too.
    """

    number: ClassVar[int]

    data: str
    model: str
    batch_size: int
    sizes: tuple[str, ...]
    fgsm_epochs: int
    pgd_epochs: int
    steps: int = 5
    step: float = 6 / 16
    lr: float = 0.1
    loss: str = "logistic"
    held_out: bool = True

    def trainings(self) -> tuple[Training, ...]:
        """One net for each perturbation and size; the long ones first."""
        nets = []
        for kind, words, epochs in (
            ("pgd", "ℓ∞-PGD", self.pgd_epochs),
            ("fgsm", "FGSM", self.fgsm_epochs),
        ):
            for eps in self.sizes:
                attack = f"fgsm:eps={eps}"
                if kind == "pgd":
                    attack = f"pgd-linf:eps={eps},steps={self.steps},step={self.step * fraction(eps, 'ε')}"
                name = f"{kind}-{eps.replace('/', '-')}"
                label = f"{words}, ε = {eps}"
                nets.append(
                    Training(
                        name,
                        label,
                        self.data,
                        self.model,
                        attack,
                        epochs,
                        loss=self.loss,
                        lr=self.lr,
                        batch_size=self.batch_size,
                        held_out=self.held_out,
                    )
                )
        return tuple(nets)

    def figure(self, results: Results) -> FigureData:
        """γ̂_m and adversarial accuracy of each kind of perturbation; the claims of the paper."""
        trainings = self.trainings()
        panels: list[Panel] = []
        for kind, words in (("fgsm", "FGSM"), ("pgd", "ℓ∞-PGD")):
            nets = [t for t in trainings if t.name.startswith(kind)]
            for key, factor, panel, what in (
                (MARGIN, 1.0, margin_panel, "(a) γ̂_m"),
                (ACCURACY, 100.0, accuracy_panel, "(b) accuracy"),
            ):
                curves = [
                    along_epochs(f"ε = {eps}", results[net.name], key, color=color, factor=factor)
                    for color, (eps, net) in enumerate(zip(self.sizes, nets, strict=True))
                ]
                panels.append(panel(f"{what}, trained and measured with {words}", curves))
        fgsm_first = (*trainings[len(self.sizes) :], *trainings[: len(self.sizes)])
        named = {t.label: results[t.name] for t in fgsm_first}
        figure = f"Figure {self.number}"
        finals = {
            label: [float(t.records()[-1][MARGIN]) for t in seeds] for label, seeds in named.items()
        }
        verdicts = [
            judge(fitted_claim(figure), each_seed(named, lambda t: fitted(t.records())), LONGER),
            judge(growth_claim(figure), each_seed(named, lambda t: growth(t.records())), LONGER),
            judge(
                difference_claim(figure, "sizes of the same perturbation"),
                {words: difference(_only(finals, words)) for words in ("FGSM", "ℓ∞-PGD")},
                _SEEDS,
            ),
            judge(
                difference_claim(figure, "FGSM and ℓ∞-PGD of the same size"),
                {f"ε = {eps}": difference(_only(finals, f"ε = {eps}")) for eps in self.sizes},
                _SEEDS,
            ),
        ]
        notes = (setting_note(trainings[0], results), _epochs(self))
        return FigureData(self.name, self.title, _statement(finals), panels, notes, verdicts)


_SEEDS = "compare with the range over several seeds: --seeds 3"


def _only(finals: Mapping[str, Sequence[float]], words: str) -> dict[str, Sequence[float]]:
    """Those with ``words`` in front or behind: ε = 0.05 is no part of ε = 0.055."""
    return {
        label: values
        for label, values in finals.items()
        if label.startswith(f"{words},") or label.endswith(f" {words}")
    }


def _epochs(settings: Sizes) -> str:
    return (
        f"{settings.fgsm_epochs:,} epochs against FGSM, {settings.pgd_epochs:,} against ℓ∞-PGD "
        f"({settings.steps} steps of {settings.step:g} ε)."
    )


def _statement(finals: Mapping[str, Sequence[float]]) -> str:
    ends = {label: sum(values) / len(values) for label, values in finals.items()}
    listed = "; ".join(f"{label}: {milli(value, unit=False)}" for label, value in ends.items())
    return f"The final γ̂_m in units of 10⁻³: {listed}."
