"""A run as a value: what was asked, what was measured, which weights came out."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from marginflow._checks import place
from marginflow._reading import printable
from marginflow.datasets import Dataset, load
from marginflow.errors import InputError, RunError, SpecificationError
from marginflow.models import load_weights
from marginflow.models._build import rebuild
from marginflow.runs._directory import Checkpoint, RunDirectory
from marginflow.runs._metrics import Metrics, layer_names


@dataclass(frozen=True, eq=False)
class Run:
    """A finished or interrupted run.

    Source: marginflow; the measured margins are those of Section 3.2.

    Attributes:
        config: the content of ``run.json``.
        metrics: the measurements in their order, one dictionary each; ``metrics.to_pandas()`` and
            ``metrics.to_polars()`` make a frame of them.
        path: the run directory, or None for a run that was kept in memory.
        model: the trained network, in the process that trained it.
        weights: for a run in memory, the weights kept at its measurements, by step and name, each
            of its shape.
    """

    config: dict[str, Any]
    metrics: Metrics
    path: Path | None = None
    model: nn.Module | None = field(default=None, repr=False)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.metrics, Metrics):
            object.__setattr__(self, "metrics", Metrics(self.metrics, layer_names(self.config)))

    @property
    def name(self) -> str:
        """The directory's name, or what was trained."""
        return run_name(self.config, self.path)

    @property
    def final(self) -> dict[str, Any]:
        """The last measurement.

        Raises:
            RunError: nothing was measured.
        """
        if not self.metrics:
            raise RunError(f"the run {self.name!r} has no measurements")
        return self.metrics[-1]

    def trajectory(self) -> dict[int, dict[str, Tensor]]:
        """The weights kept at the measurements, by step; empty if ``keep_weights`` was off.

        Returns:
            by step, and by name each weight of its shape.

        Raises:
            RunError: a damaged file.
        """
        if self.path is None:
            return self.weights
        # Files keep tensors in an order of their own; the layers' order is the network's.
        names = [name for layer in self.config.get("layers") or () for name in layer["parameters"]]
        rank = {name: place for place, name in enumerate(names)}
        return {
            step: dict(sorted(weights.items(), key=lambda item: rank.get(item[0], len(rank))))
            for step, weights in RunDirectory(self.path).read_weights().items()
        }

    def load_data(
        self, data: Dataset | None = None, *, data_dir: str | os.PathLike[str] | None = None
    ) -> Dataset:
        """The data set that the run was trained on.

        Args:
            data: the data set itself, where its name does not say it all; it is checked.
            data_dir: folder of the MNIST files, if they are what is loaded.

        Raises:
            RunError: other data than those of the run.
            InputError: data that must be given, or that are not there.
        """
        if data is None:
            try:
                data = load(str(self.config.get("data")), data_dir=data_dir)
            except SpecificationError:
                raise InputError(
                    f"the run was trained on data {self.config.get('data')!r} that cannot be loaded by "
                    "name; give them: data=…, or --data npz:PATH"
                ) from None
        sample = self.config.get("sample")
        if sample and data.fingerprint() != self.config.get("data_sha256"):
            data = data.sample(int(sample["size"]), seed=int(sample["seed"]))
        found, wanted = data.fingerprint(), self.config.get("data_sha256")
        if found != wanted:
            raise RunError(
                f"the data {data.name!r} are not those that the run was trained on: expected SHA-256 "
                f"{printable(str(wanted))}, got {found}; give those of the run: data=…, or --data"
            )
        return data

    def checkpoint(self) -> Checkpoint:
        """The last whole checkpoint.

        Raises:
            RunError: there is none.
        """
        found = None if self.path is None else RunDirectory(self.path).latest_checkpoint()
        if found is None:
            raise RunError(f"the run {self.name!r} has no checkpoint yet")
        return found

    def load_model(
        self, into: nn.Module | None = None, *, checkpoint: Checkpoint | None = None
    ) -> nn.Module:
        """The network with the weights of the last whole checkpoint.

        Args:
            into: a model of the same architecture; needed when the run trained a model
                that is not one of :mod:`marginflow.models`.
            checkpoint: the checkpoint, if it was read already.

        Raises:
            RunError: no checkpoint, or ``into`` is needed.
            ModelError: the checkpoint is of another model.
        """
        if self.path is None:
            if self.model is None:
                raise RunError("this run was kept in memory without its model")
            return self.model
        checkpoint = checkpoint or self.checkpoint()
        weights = {
            name.removeprefix("model."): value
            for name, value in checkpoint.tensors.items()
            if name.startswith("model.")
        }
        if into is None and not self.config.get("model") and self.model is not None:
            into = copy.deepcopy(
                self.model
            )  # a model of its own kind, in the process that trained it
        if into is None:
            if not self.config.get("model"):
                raise RunError(
                    f"the run {self.name!r} trained a model of its own kind; build it and call "
                    "load_model(into=model), or name its function: --model package.module:function"
                )
            return rebuild(self.config["model"], weights)
        load_weights(into, weights)
        return into


def run_name(config: Mapping[str, Any], path: Path | None) -> str:
    """The directory's name, or what was trained."""
    if path is not None:
        return printable(path.resolve().name)
    return f"{config.get('model_spec', 'model')} {config.get('attack', '')}".strip()


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run directory. Reading never runs code and writes nothing.

    Source: marginflow; what a run holds is drawn in ``docs/architecture.md``.

    Args:
        path: the run directory.

    Raises:
        InputError: no path.
        RunError: no run there, or a damaged one.

    Examples:
        >>> import marginflow as mf
        >>> _ = mf.train("mlp:4", "separable:n=20,d=6", epochs=2, out="runs/first")
        >>> mf.load_run("runs/first").metrics[-1]["epoch"]
        2
    """
    directory = RunDirectory(place("path", path))
    config = directory.read_config()
    metrics = Metrics(directory.read_metrics(), layer_names(config))
    return Run(config, metrics, directory.path)
