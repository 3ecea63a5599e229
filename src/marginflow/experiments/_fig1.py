"""Figure 1: adversarial training enlarges the normalised adversarial margin, standard training does not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from marginflow.experiments._beside import (
    LONGER,
    after_separation,
    final_sentence,
    panels_beside,
    setting_note,
    verdicts_beside,
)
from marginflow.experiments._claims import each_seed, growth, growth_claim, judge
from marginflow.experiments._experiment import Experiment, Results, ScaleName, Training
from marginflow.experiments._figure import FigureData
from marginflow.runs import Run
from marginflow.workflow import train


@dataclass(frozen=True)
class Fig1(Experiment):
    """Training against FGSM (a) and ℓ∞-PGD (b), each beside standard training; FGSM at length (c).

    Attributes:
        data, model, batch_size, lr: of all three nets.
        fgsm, pgd: the perturbations.
        words: the two in words.
        epochs: of panel (a).
        pgd_epochs: of panel (b).
        long_epochs: of the net trained against FGSM, at least ``epochs``: panel (c).
        shrink: whether examples of no weight are left out of the epochs.
    """

    name: ClassVar[str] = "fig1"
    title: ClassVar[str] = "Figure 1: adversarial and standard training, measured alike"

    data: str
    model: str
    batch_size: int
    fgsm: str
    pgd: str
    words: tuple[str, str]
    epochs: int
    pgd_epochs: int
    long_epochs: int
    lr: float = 0.1
    shrink: bool = False

    def trainings(self) -> tuple[Training, ...]:
        """The net against ℓ∞-PGD, against FGSM, and the standard one, measured under both."""

        def net(name: str, label: str, attack: str | None, epochs: int) -> Training:
            return Training(
                name,
                label,
                self.data,
                self.model,
                attack,
                epochs,
                lr=self.lr,
                batch_size=self.batch_size,
                measure_with=None if attack else self.fgsm,
                also=() if attack else (self.pgd,),
                shrink=self.shrink,
            )

        return (
            net("pgd", f"trained against {self.words[1]}", self.pgd, self.pgd_epochs),
            net("fgsm", f"trained against {self.words[0]}", self.fgsm, self.long_epochs),
            net("standard", "standard training", None, max(self.epochs, self.pgd_epochs)),
        )

    def figure(self, results: Results) -> FigureData:
        """γ̂_m and accuracy of (a) and (b), γ̂_m of (c) from separation on, with the claims judged."""
        panels, verdicts = [], []
        standard = results["standard"]
        for letter, name, attack, words, last in (
            ("a", "fgsm", self.fgsm, self.words[0], self.epochs),
            ("b", "pgd", self.pgd, self.words[1], self.pgd_epochs),
        ):
            panels += panels_beside(
                (letter, letter), words, (results[name], standard), attack, last
            )
            verdicts += verdicts_beside(
                f"Figure 1({letter})", results[name], standard, attack, last
            )
        title = f"(c) γ̂_m under {self.words[0]}, after separation"
        panels += after_separation(title, results["fgsm"])
        if self.long_epochs > self.epochs:
            found = each_seed({"fgsm": results["fgsm"]}, lambda t: growth(t.records()))
            verdicts.append(judge(growth_claim("Figure 1(c)"), found, LONGER))
        sentence = final_sentence(results["fgsm"], standard, self.fgsm, self.epochs)
        notes = [setting_note(self.trainings()[0], results)]
        if self.shrink:
            notes.append(
                "Examples that together move no layer by one rounding of its weights are left out of the "
                "epochs and examined now and then; measurements take all."
            )
        if self.long_epochs == self.epochs:
            notes.append(
                "(c) is the same run as (a), from separation on; the paper's 10,000 epochs are those of "
                "--scale paper."
            )
        return FigureData(
            self.name, self.title, f"Under {self.words[0]}, {sentence}.", panels, notes, verdicts
        )


_MNIST_FGSM, _MNIST_PGD = "fgsm:eps=16/255", "pgd-linf:eps=16/255,steps=5,step=6/255"
_MNIST_WORDS = ("FGSM, ε = 16/255", "ℓ∞-PGD, ε = 16/255")

FIG1: dict[ScaleName, Fig1] = {
    "demo": Fig1(
        data="digits:3,8",
        model="mlp:256,32",
        batch_size=32,
        fgsm="fgsm:eps=0.1",
        pgd="pgd-linf:eps=0.1,steps=5,step=0.0375",
        words=("FGSM, ε = 0.1", "ℓ∞-PGD, ε = 0.1"),
        epochs=1000,
        pgd_epochs=1000,
        long_epochs=3000,
    ),
    "mnist": Fig1(
        data="mnist:3,8",
        model="mlp:1024,64",
        batch_size=80,
        fgsm=_MNIST_FGSM,
        pgd=_MNIST_PGD,
        words=_MNIST_WORDS,
        epochs=300,
        pgd_epochs=220,
        long_epochs=300,
    ),
    "paper": Fig1(
        data="mnist:3,8",
        model="mlp:1024,64",
        batch_size=80,
        fgsm=_MNIST_FGSM,
        pgd=_MNIST_PGD,
        words=_MNIST_WORDS,
        epochs=1000,
        pgd_epochs=1000,
        long_epochs=10_000,
        shrink=True,
    ),
}


def adversarial_and_standard(
    out: str | os.PathLike[str],
    *,
    data: str = "digits:3,8",
    model: str = "mlp:256,32",
    attack: str = "fgsm:eps=0.1",
    lr: float = 0.1,
    batch_size: int = 32,
    epochs: int = 1000,
    seed: int = 0,
    force: bool = False,
    progress: bool = False,
) -> tuple[Run, Run]:
    """Train the same network twice, from the same weights: against ``attack``, and without any.

    The defaults are Figure 1(a) at the size of the bundled digits (8×8 pixels in [0, 1]).
    Both are measured under ``attack``, so their margins compare (Figure 1). The runs
    lie in ``out/adversarial`` and ``out/standard``.

    Args:
        out: the folder of both runs.
        data: the data set.
        model: the network.
        attack: the perturbation of the training, and of both measurements.
        lr: learning rate η > 0.
        batch_size: examples in a batch.
        epochs: passes over the data.
        seed: of the weights and of the order of examples.
        force: replace runs that are there.
        progress: show a bar.

    Returns:
        the adversarial and the standard run.

    Raises:
        MarginflowError: whatever :func:`marginflow.train` raises.
    """
    runs = []
    for name, perturbation in (("adversarial", attack), ("standard", None)):
        runs.append(
            train(
                model,
                data,
                attack=perturbation,
                measure_with=attack,
                lr=lr,
                batch_size=batch_size,
                epochs=epochs,
                seed=seed,
                out=Path(out) / name,
                force=force,
                progress=progress,
            )
        )
    return runs[0], runs[1]
