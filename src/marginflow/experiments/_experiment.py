"""What an experiment is: the trainings that it needs, and the figure that it makes of them.

Source: marginflow.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from marginflow.datasets import Dataset, load
from marginflow.errors import RunError
from marginflow.experiments._figure import FigureData
from marginflow.runs import Run
from marginflow.training import log_spaced

ScaleName = Literal["demo", "mnist", "paper"]
"""How large a reproduction is: one of :data:`SCALES`."""

SCALES: tuple[ScaleName, ...] = ("demo", "mnist", "paper")
"""The bundled digits, minutes; the real files and the paper's networks; the paper's epochs too."""

MILESTONES = (10, 30, 100, 300, 1000, 3000, 10_000)
"""Epochs whose numbers are written out; every training is measured there."""

_FARTHEST = 100_000


@dataclass(frozen=True)
class Training:
    """One run of an experiment: what :func:`marginflow.train` is asked, but for seed and place.

    Attributes:
        name: of its folder, with the seed behind it.
        label: what it is called in the figure.
        data, model, attack, loss, lr, batch_size, epochs, dtype: as for ``train``; the length in
            epochs.
        measure_with: the perturbation of its measurements, if not ``attack``.
        also: more perturbations, under which its kept weights are measured when it is trained.
        keep: whether its weights are kept all the same.
        per_decade: measured epochs in a decade of epochs.
        held_out: False leaves the test split out: measuring it may cost more than training.
        shrink: whether examples of no weight are left out of the epochs, as a long training wants.
    """

    name: str
    label: str
    data: str
    model: str
    attack: str | None
    epochs: int
    loss: str = "logistic"
    lr: float = 0.1
    batch_size: int | None = None
    measure_with: str | None = None
    also: tuple[str, ...] = ()
    keep: bool = False
    per_decade: int = 20
    dtype: str = "float32"
    held_out: bool = True
    shrink: bool = False

    @property
    def schedule(self) -> list[int]:
        """The measured epochs. They do not hang on ``epochs``: a run can be prolonged."""
        grid = log_spaced(_FARTHEST, self.per_decade)
        return sorted(grid | set(MILESTONES))


@dataclass(frozen=True, eq=False)
class Trained:
    """One finished training of one seed.

    Attributes:
        training: what was asked.
        seed: its seed.
        run: the run.
        others: the measurements under each perturbation of :attr:`Training.also`.
    """

    training: Training
    seed: int
    run: Run
    others: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    def records(self, attack: str | None = None) -> list[dict[str, Any]]:
        """The measurements under ``attack``, by default the one that was measured while training.

        Args:
            attack: its specification.

        Raises:
            RunError: nothing was measured under it.
        """
        own = self.training.measure_with or self.training.attack
        if attack is None or attack == own:
            return self.run.metrics
        try:
            return self.others[attack]
        except KeyError:
            raise RunError(
                f"the run {self.run.name!r} was measured under {own} and "
                f"{', '.join(self.others) or 'nothing else'}, not under {attack}"
            ) from None


@dataclass(frozen=True, eq=False)
class Results:
    """All finished trainings of an experiment.

    Attributes:
        trained: by the training's name, one for each seed.
        data_dir: the folder of the data files, if one was given.
    """

    trained: Mapping[str, Sequence[Trained]]
    data_dir: str | os.PathLike[str] | None = None

    def __getitem__(self, name: str) -> Sequence[Trained]:
        return self.trained[name]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in their order."""
        return tuple(t.seed for t in next(iter(self.trained.values())))

    @property
    def seed_words(self) -> str:
        """``seed 0``, or ``seeds 0 … 2; lines: their mean, bands: from least to largest``."""
        if len(self.seeds) == 1:
            return f"seed {self.seeds[0]}"
        return (
            f"seeds {self.seeds[0]} … {self.seeds[-1]}; lines: their mean, bands: from the least "
            "to the largest"
        )

    def load(self, data: str) -> Dataset:
        """The data set of a specification.

        Args:
            data: such as ``digits:3,8``.
        """
        return load(data, data_dir=self.data_dir)


@dataclass(frozen=True)
class Experiment(ABC):
    """The settings of one figure at one scale. A subclass is one figure.

    Attributes:
        name: what the command line calls it.
        title: what it shows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[str] = ""
    """Where its runs lie, if it shares them with another figure."""

    @abstractmethod
    def trainings(self) -> tuple[Training, ...]:
        """The runs that the figure needs, each for every seed."""

    @abstractmethod
    def figure(self, results: Results) -> FigureData:
        """The figure, with the claims about it judged.

        Args:
            results: its finished trainings.
        """

    def place(self, out: str | os.PathLike[str]) -> Path:
        """The folder of its runs below ``out``.

        Args:
            out: the folder of all figures.
        """
        return Path(out) / (self.folder or self.name)
