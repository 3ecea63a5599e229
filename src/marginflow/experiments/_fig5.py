"""Figure 5: a wide two-layer net and the exponential loss: slow, but growing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from marginflow.experiments._beside import LONGER, setting_note
from marginflow.experiments._budget import budget_note
from marginflow.experiments._claims import (
    Finding,
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
from marginflow.experiments._experiment import Experiment, Results, ScaleName, Trained, Training
from marginflow.experiments._figure import FigureData


@dataclass(frozen=True)
class Fig5(Experiment):
    """Training against ℓ2-FGM with the exponential loss.

    Attributes:
        data, model, batch_size, lr, epochs: of the net.
        eps: ε of the FGM.
    """

    name: ClassVar[str] = "fig5"
    title: ClassVar[str] = "Figure 5: the exponential loss"

    data: str
    model: str
    batch_size: int
    eps: float
    lr: float
    epochs: int

    def trainings(self) -> tuple[Training, ...]:
        """The one net."""
        return (
            Training(
                "fgm",
                f"ℓ2-FGM, ε = {self.eps:g}",
                self.data,
                self.model,
                f"fgm:eps={self.eps:g}",
                self.epochs,
                loss="exponential",
                lr=self.lr,
                batch_size=self.batch_size,
            ),
        )

    def figure(self, results: Results) -> FigureData:
        """γ̂_m and accuracy; the paper claims growth all along, and after separation it is theory."""
        net = results["fgm"]
        (training,) = self.trainings()
        ends = [(t.records()[0][MARGIN], t.records()[-1][MARGIN]) for t in net]
        first, last = (sum(values) / len(values) for values in zip(*ends, strict=True))

        def along(t: Trained) -> Finding:
            # The first step may do anything: epoch 0 is the random start, no point of training.
            return growth(t.records(), since=1)

        return FigureData(
            self.name,
            self.title,
            f"With the exponential loss γ̂_m goes from {milli(first)} to {milli(last)} in {self.epochs:,} "
            "epochs.",
            (
                margin_panel(
                    f"γ̂_m under {training.label}", [along_epochs(training.label, net, MARGIN)]
                ),
                accuracy_panel(
                    f"Accuracy under {training.label}",
                    [along_epochs(training.label, net, ACCURACY, factor=100)],
                ),
            ),
            (
                budget_note(results.load(self.data), self.eps),
                setting_note(training, results),
            ),
            (
                judge(
                    growth_claim("Figure 5", "γ̂_m gradually grows during training", "from epoch 1"),
                    each_seed({"": net}, along),
                ),
                judge(
                    fitted_claim("Figure 5"),
                    each_seed({"": net}, lambda t: fitted(t.records())),
                    LONGER,
                ),
                judge(
                    growth_claim("Figure 5"),
                    each_seed({"": net}, lambda t: growth(t.records())),
                    LONGER,
                ),
            ),
        )


FIG5: dict[ScaleName, Fig5] = {
    "demo": Fig5("digits:2,8", "mlp:1000", batch_size=32, eps=0.5, lr=5e-2, epochs=800),
    "mnist": Fig5("mnist:2,8", "mlp:10000", batch_size=80, eps=3.0, lr=1e-5, epochs=70),
    "paper": Fig5("mnist:2,8", "mlp:10000", batch_size=80, eps=3.0, lr=1e-5, epochs=10_000),
}
