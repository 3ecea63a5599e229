"""The scale trap: weights that are larger look more robust to attacks that follow the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from marginflow.experiments._beside import setting_note
from marginflow.experiments._claims import Finding, judge
from marginflow.experiments._curves import banded
from marginflow.experiments._experiment import Experiment, Results, ScaleName, Training
from marginflow.experiments._figure import Curve, FigureData, Panel
from marginflow.experiments.libraries import (
    LOSS,
    MODULES,
    OURS,
    Setting,
    installed_methods,
    perturbed,
    scaled,
    share_right,
)
from marginflow.theorems._verdict import Claim

_SHIFT = 0.05


@dataclass(frozen=True)
class ScaleTrap(Experiment):
    """One net, all of its layers multiplied by c, attacked by ℓ2-PGD of every library that is there.

    Attributes:
        data, model, attack, batch_size, epochs, lr: of the training.
        eps: ε of the ℓ2-PGD.
        steps: of it.
        scales: the factors c, rising from 1.
    """

    name: ClassVar[str] = "scale-trap"
    title: ClassVar[str] = "The scale trap: reported robustness against the scale of the weights"

    data: str
    model: str
    attack: str
    batch_size: int
    epochs: int
    eps: float
    steps: int = 10
    scales: tuple[float, ...] = (1, 2, 4, 8, 16, 32)
    lr: float = 0.1

    def trainings(self) -> tuple[Training, ...]:
        """The one net."""
        return (
            Training(
                "net",
                "net",
                self.data,
                self.model,
                self.attack,
                self.epochs,
                lr=self.lr,
                batch_size=self.batch_size,
                per_decade=3,
            ),
        )

    def figure(self, results: Results) -> FigureData:
        """The reported accuracy and the length of δ against c."""
        data = results.load(self.data)
        part = data if data.test is None else data.test
        x, y = part.x, part.y
        how = Setting(self.eps, self.steps, batch_size=128)
        shares: dict[str, list[list[float]]] = {}
        lengths: dict[str, list[list[float]]] = {}
        clean = []
        models = [t.run.load_model().eval() for t in results["net"]]
        for model in models:
            clean.append(share_right(model, x, y))
        for name, method in installed_methods().items():
            for c in self.scales:
                share, length = [], []
                for model in models:
                    victim = scaled(model, c)
                    moved = perturbed(method, victim, x, y, how)
                    share.append(share_right(victim, moved, y))
                    length.append(float((moved - x).flatten(1).norm(dim=1).mean()))
                shares.setdefault(name, []).append(share)
                lengths.setdefault(name, []).append(length)
        ours = shares[OURS]
        same = all(column == ours[0] for column in ours)
        accuracy = _curves(shares, self.scales, 100.0)
        accuracy.append(
            Curve(
                "clean",
                self.scales,
                [100 * sum(clean) / len(clean)] * len(self.scales),
                measured=False,
            )
        )
        ends = {name: 100 * sum(columns[-1]) / len(columns[-1]) for name, columns in shares.items()}
        first = 100 * sum(ours[0]) / len(ours[0])
        absent = [name for name in MODULES if name not in shares]
        notes = [
            setting_note(self.trainings()[0], results),
            f"Trained against {self.attack}, {self.epochs:,} epochs. Attacked: ℓ2-PGD, ε = {self.eps:g}, "
            f"{self.steps} steps of {how.step_size:g}, no random start, x + δ in [0, 1]; {part.n:,} "
            f"{'training' if data.test is None else 'test'} examples.",
        ]
        if absent:
            notes.append(
                f"Not installed, so not measured: {', '.join(absent)} "
                "(pip install 'marginflow[attack-libraries]')."
            )
        return FigureData(
            self.name,
            self.title,
            f"Multiplying all layers by {self.scales[-1]:g} changes no decision. The accuracy of "
            f"{first:.1f} % under perturbation becomes {ends[OURS]:.1f} % by the margin's gradient, "
            + ", ".join(
                f"{end:.1f} % by {_short(name)}" for name, end in ends.items() if name != OURS
            )
            + ".",
            (
                _panel("Reported accuracy under ℓ2-PGD", "correct (%)", accuracy),
                _panel(
                    "What became of the perturbations", "mean ‖δ‖₂", _curves(lengths, self.scales)
                ),
            ),
            notes,
            (
                judge(
                    Claim(
                        "Lemma 3, margin",
                        "the margin's gradient does not see the scale",
                        (),
                        "adversarial accuracy at every c",
                        "the same",
                        "none: δ is the same to the bit at powers of two",
                    ),
                    {"": Finding(same, f"{first:.2f} % … {ends[OURS]:.2f} %")},
                ),
                judge(
                    Claim(
                        "The trap, loss",
                        "the loss's gradient fades, and the net seems more robust",
                        (),
                        "adversarial accuracy at the largest c, less that at c = 1",
                        f"above {100 * _SHIFT:.0f} points",
                        f"{100 * _SHIFT:.0f} points: what counts as a false report",
                    ),
                    {
                        _short(name): _rise(columns)
                        for name, columns in shares.items()
                        if name != OURS
                    },
                ),
            ),
        )


def _rise(columns: Sequence[Sequence[float]]) -> Finding:
    least = min(last - first for first, last in zip(columns[0], columns[-1], strict=True))
    return Finding(least > _SHIFT, f"{100 * least:+.1f} points".replace("-", "−"))


def _curves(
    found: dict[str, list[list[float]]], scales: Sequence[float], factor: float = 1.0
) -> list[Curve]:
    return [
        banded(
            name,
            scales,
            [[factor * v for v in column] for column in columns],
            color=k,
            dashed=name != OURS,
        )
        for k, (name, columns) in enumerate(found.items())
    ]


def _panel(title: str, ylabel: str, curves: Sequence[Curve]) -> Panel:
    return Panel(title, "every layer multiplied by c", ylabel, curves, xscale="log")


def _short(name: str) -> str:
    return "the loss's gradient" if name == LOSS else name


SCALE_TRAP: dict[ScaleName, ScaleTrap] = {
    "demo": ScaleTrap("digits:3,8", "mlp:64,32", "fgsm:eps=0.15", 32, 60, eps=0.6),
    "mnist": ScaleTrap("mnist:3,8", "mlp:1024,64", "fgsm:eps=16/255", 80, 10, eps=1.5),
    "paper": ScaleTrap("mnist:3,8", "mlp:1024,64", "fgsm:eps=16/255", 80, 200, eps=1.5),
}
