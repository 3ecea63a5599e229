"""The deep linear networks of Figures 6 and 7 (Appendix C.3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from marginflow.alignment import Alignment, matrices_along, measure_alignment
from marginflow.experiments._claims import Finding, judge
from marginflow.experiments._curves import banded
from marginflow.experiments._experiment import Experiment, Results, Trained, Training
from marginflow.experiments._figure import FigureData, Panel
from marginflow.runs import Run
from marginflow.theorems._verdict import Claim

DEPTHS = (2, 3, 4)
_WIDTH = 10
_TAIL = 1 / 3
_ROUNDING = 1e-12


@dataclass(frozen=True)
class DeepLinear(Experiment):
    """Full-batch gradient descent on separable data with the exact ℓ2 perturbation, in float64.

    Attributes:
        epochs: steps of the descent.
        data, attack: the data and the perturbation.
    """

    folder: ClassVar[str] = "deep-linear"
    number: ClassVar[int]
    ylabel: ClassVar[str]

    epochs: int
    data: str = "separable:n=40,d=10,margin=0.3,seed=1"
    attack: str = "exact-linear:p=2,eps=0.1"

    def trainings(self) -> tuple[Training, ...]:
        """L = 2, 3, 4 layers of width 10."""
        return tuple(
            Training(
                f"layers-{depth}",
                f"L = {depth}",
                self.data,
                f"deep-linear:{','.join([str(_WIDTH)] * (depth - 1))}",
                self.attack,
                self.epochs,
                keep=True,
                per_decade=25,
                dtype="float64",
            )
            for depth in DEPTHS
        )

    @abstractmethod
    def layers(self, point: Alignment) -> torch.Tensor:
        """What is shown of every layer, (L,)."""

    @abstractmethod
    def sentence(self, values: torch.Tensor) -> str:
        """How ``values`` (points, layers) went."""

    def figure(self, results: Results) -> FigureData:
        """One panel for each depth, one curve for each layer."""
        panels, findings, sentences = [], {}, []
        for depth in DEPTHS:
            paths = [_path(t.run) for t in results[f"layers-{depth}"]]
            steps = paths[0][0]
            values = [torch.stack([self.layers(p) for p in points]) for _, points in paths]
            curves = [
                banded(
                    f"k = {k + 1}",
                    steps,
                    torch.stack([v[:, k] for v in values], dim=1).tolist(),
                    color=k,
                )
                for k in range(values[0].shape[1])
            ]
            panels.append(Panel(f"L = {depth}", "step", self.ylabel, curves, xscale="symlog"))
            sentences.append(f"L = {depth}: {self.sentence(values[0])}")
            for t, v in zip(results[f"layers-{depth}"], values, strict=True):
                findings[_named(depth, t, results)] = grows(v)
        config = results["layers-2"][0].run.config
        claim = Claim(
            f"Figure {self.number}",
            f"{self.ylabel} of every layer keeps increasing",
            (),
            "largest fall of a layer from one measured step to the next, over the last third of them",
            "no fall, and a rise in all",
            f"{_ROUNDING:g}: rounding",
        )
        return FigureData(
            self.name,
            self.title,
            "; ".join(sentences) + ".",
            panels,
            (
                f"{self.data}, n = {config['examples']}; {self.attack}; logistic loss; full-batch "
                f"gradient descent, η = {config['lr']:g}, {self.epochs:,} steps; float64; "
                f"{results.seed_words}.",
            ),
            (judge(claim, findings),),
        )


def grows(values: torch.Tensor) -> Finding:
    """Whether every layer rises on the last third of the points, never falling by more than rounding.

    ``values`` is (points, layers). A ratio that is 1 already, of a layer of one row, need not rise.
    """
    tail = values[int(len(values) * (1 - _TAIL)) :]
    fall = max(0.0, float(-tail.diff(dim=0).min()))
    rise = tail[-1] - tail[0]
    moving = (1 - tail[0]).abs() > _ROUNDING
    ok = fall <= _ROUNDING and bool((rise[moving] > 0).all())
    least = float(rise[moving].min()) if bool(moving.any()) else 0.0
    return Finding(ok, f"fall {fall:.2g}, least rise {least:.2g}")


def _named(depth: int, t: Trained, results: Results) -> str:
    return f"L = {depth}" + (f", seed {t.seed}" if len(results.seeds) > 1 else "")


def _path(run: Run) -> tuple[Sequence[float], list[Alignment]]:
    points = matrices_along(run)
    return [float(step) for step in points], [measure_alignment(w) for w in points.values()]
