"""Figure 4: ℓ2-FGM of a size that no classifier withstands, beside standard training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from marginflow.experiments._beside import (
    after_separation,
    final_sentence,
    panels_beside,
    setting_note,
    verdicts_beside,
)
from marginflow.experiments._budget import budget_note
from marginflow.experiments._experiment import Experiment, Results, ScaleName, Training
from marginflow.experiments._figure import FigureData


@dataclass(frozen=True)
class Fig4(Experiment):
    """Training against ℓ2-FGM beside standard training.

    Attributes:
        data, model, batch_size, lr, epochs: of both nets.
        eps: ε of the FGM.
    """

    name: ClassVar[str] = "fig4"
    title: ClassVar[str] = "Figure 4: ℓ2-FGM and standard training, measured alike"

    data: str
    model: str
    batch_size: int
    eps: float
    epochs: int
    lr: float = 0.1

    @property
    def attack(self) -> str:
        """The FGM as a specification."""
        return f"fgm:eps={self.eps:g}"

    def trainings(self) -> tuple[Training, ...]:
        """The net against FGM and the standard one, measured under it."""
        return tuple(
            Training(
                name,
                label,
                self.data,
                self.model,
                attack,
                self.epochs,
                lr=self.lr,
                batch_size=self.batch_size,
                measure_with=self.attack,
            )
            for name, label, attack in (
                ("fgm", f"trained against ℓ2-FGM, ε = {self.eps:g}", self.attack),
                ("standard", "standard training", None),
            )
        )

    def figure(self, results: Results) -> FigureData:
        """γ̂_m and accuracy of both nets under FGM, and what ε means."""
        words = f"ℓ2-FGM, ε = {self.eps:g}"
        nets = results["fgm"], results["standard"]
        sentence = final_sentence(*nets, self.attack, self.epochs)
        return FigureData(
            self.name,
            self.title,
            f"Under {words}, {sentence}.",
            [
                *panels_beside(("a", "b"), words, nets, self.attack, self.epochs),
                *after_separation(f"(a) γ̂_m under {words}, after separation", nets[0]),
            ],
            (
                budget_note(results.load(self.data), self.eps),
                setting_note(self.trainings()[0], results),
            ),
            verdicts_beside("Figure 4", *nets, self.attack, self.epochs),
        )


FIG4: dict[ScaleName, Fig4] = {
    "demo": Fig4("digits:3,8", "mlp:128,32", batch_size=32, eps=0.75, epochs=1500),
    "mnist": Fig4("mnist:3,8", "mlp:1024,64", batch_size=64, eps=8.0, epochs=500),
    "paper": Fig4("mnist:3,8", "mlp:1024,64", batch_size=64, eps=8.0, epochs=1000),
}
