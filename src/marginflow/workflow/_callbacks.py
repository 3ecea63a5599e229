"""Measuring, recording and progress, as callbacks of the trainer."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marginflow.ascent import Ascent
from marginflow.distributed import current, first
from marginflow.errors import DivergedError
from marginflow.models import load_weights
from marginflow.monitor import Monitor
from marginflow.runs import RunDirectory, Sinks
from marginflow.training import Callback, Gauge, Trainer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_CHECKPOINT_SECONDS = 30.0


class Measuring(Callback):
    """Measures at the epochs of a schedule; the trainer's own epoch means go along."""

    def __init__(
        self, monitor: Monitor, epochs: Collection[int], last: int, gauges: Sequence[Gauge] = ()
    ) -> None:
        self.monitor = monitor
        self.epochs = frozenset(epochs) | {last}
        self.gauges = tuple(gauges)

    def on_start(self, trainer: Trainer) -> None:
        """Measure the initial weights, unless a run that resumes has that measurement."""
        if trainer.step == 0 and 0 in self.epochs and not self.monitor.records:
            unknown = ("log_time", "learning_rate", "epoch_loss", "epoch_accuracy")
            self._take(trainer, {"epoch": 0, **dict.fromkeys(unknown)})

    def on_epoch(self, trainer: Trainer) -> None:
        """Measure if the schedule says so."""
        if trainer.epoch not in self.epochs:
            return
        trainer.check_weights()
        context: dict[str, Any] = {
            "epoch": trainer.epoch,
            "log_time": trainer.log_time,
            "learning_rate": trainer.learning_rate,
            "epoch_loss": trainer.epoch_loss,
            "epoch_accuracy": trainer.epoch_accuracy,
        }
        for gauge in self.gauges:
            context |= gauge.read()
        context |= trainer.rate.state
        if trainer.shrinking is not None:
            context |= trainer.shrinking.record()
        self._take(trainer, context)

    def _take(self, trainer: Trainer, context: dict[str, Any]) -> None:
        """Measure.

        Raises:
            DivergedError: the weights are finite, but the margins are not.
        """
        record = self.monitor.measure(trainer.step, **context)
        if record and record["margin"] is None:
            # Not kept: JSON has no NaN, and nobody could tell it from what was not measured.
            self.monitor.records.pop()
            raise DivergedError(
                f"training stopped after step {trainer.step} (epoch {trainer.epoch}): the weights are "
                "finite, but the smallest margin is NaN or infinite; evaluate the model and the attack "
                "on the data, lower lr, or use float64",
                trainer.step,
                trainer.epoch,
            )


class MeasuringBest(Measuring):
    """Measures as :class:`Measuring`, and ends with the weights of the largest γ̂_m it measured.

    They are put back at the last epoch, whose record is then theirs and says so in ``best_epoch``.
    """

    def __init__(self, monitor: Monitor, epochs: Collection[int], last: int) -> None:
        super().__init__(monitor, epochs, last)
        self.last = last
        self.best: dict[str, Tensor] = {}
        self.place = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
        """The best γ̂_m, and its epoch."""

    def state(self) -> dict[str, Tensor]:
        """The best weights so far."""
        return {"place": self.place, **{f"best.{name}": w for name, w in self.best.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` gave."""
        self.place = state["place"].clone()
        self.best = {
            name.removeprefix("best."): w.clone() for name, w in state.items() if name != "place"
        }

    def on_epoch(self, trainer: Trainer) -> None:
        """Measure if the schedule says so; at the end, go back to the best."""
        if trainer.epoch not in self.epochs:
            return
        self._measure(trainer)
        self._keep(trainer)
        if trainer.epoch == self.last:
            if self.place[1] != trainer.epoch:
                load_weights(trainer.model, self.best)
                self.monitor.records.pop()
                self._measure(trainer)
            self.monitor.records[-1]["best_epoch"] = int(self.place[1])

    def on_start(self, trainer: Trainer) -> None:
        """Measure the initial weights; a network that is trained already may be the best."""
        super().on_start(trainer)
        if trainer.step == 0 and self.monitor.records:
            self._keep(trainer)

    def _measure(self, trainer: Trainer) -> None:
        super().on_epoch(trainer)
        record = self.monitor.records[-1]
        if isinstance(trainer, Ascent) and record["margin"] is not None:
            record.update(trainer.method.measured(trainer, record["margin"]))

    def _keep(self, trainer: Trainer) -> None:
        """Keep the weights just measured if none before had a larger margin."""
        margin = self.monitor.records[-1]["normalized_margin"]
        if margin is not None and margin >= float(self.place[0]):
            self.place = torch.tensor([margin, trainer.epoch], dtype=torch.float64)
            self.best = {n: v.detach().clone() for n, v in trainer.model.state_dict().items()}


class KeepingWeights(Callback):
    """Keeps the weights of every measurement, on disk or in memory, for statements on a path."""

    def __init__(self, monitor: Monitor, directory: RunDirectory | None) -> None:
        self.monitor = monitor
        self.directory = directory
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.count = len(monitor.records)

    def on_start(self, trainer: Trainer) -> None:
        """Keep the initial weights if they were measured."""
        self.on_epoch(trainer)

    def on_epoch(self, trainer: Trainer) -> None:
        """Keep the weights if there was a measurement."""
        if len(self.monitor.records) == self.count:
            return
        self.count = len(self.monitor.records)
        weights = {n: v.detach().clone() for n, v in trainer.model.state_dict().items()}
        if self.directory is None:
            self.kept[trainer.step] = weights
        else:
            self.directory.save_weights(trainer.step, weights)


class Pace:
    """When checkpoints are due. Trainings in step share one, so that a crash leaves them at one step.

    Args:
        apart: seconds between two checkpoints of measurements, at least: what a crash may cost.
    """

    def __init__(self, apart: float = 0.0) -> None:
        self.apart = apart
        self.saved = time.monotonic()
        self.step = -1

    def due(self, step: int, *, measured: bool) -> bool:
        """Whether to save at ``step``: after a measurement, or as it is time.

        Of several processes the first decides by its clock.
        """
        return first(self._due)(step, measured)

    def _due(self, step: int, measured: bool) -> bool:
        now = time.monotonic()
        if step != self.step and now - self.saved >= (
            self.apart if measured else _CHECKPOINT_SECONDS
        ):
            self.step, self.saved = step, now
        return step == self.step


class Recording(Callback):
    """Writes new measurements and checkpoints into the run directory, and measurements to the sinks.

    A measurement is on disk before the checkpoint that follows it, so whatever a
    checkpoint vouches for is there. Checkpoints are taken at every measurement, every
    half minute, on an interrupt and at the end; when they are taken changes no number.

    Args:
        directory: the run; None records nothing but what goes to the sinks.
        monitor: what measures, or None.
        elapsed: seconds that earlier processes spent on the run.
        pace: when checkpoints are due, by default at every measurement. Measurements are
            written with the checkpoint that vouches for them.
        sinks: are given every measurement once it is on disk.
    """

    def __init__(
        self,
        directory: RunDirectory | None,
        monitor: Monitor | None,
        elapsed: float,
        *,
        pace: Pace | None = None,
        sinks: Sinks | None = None,
    ) -> None:
        self.directory = directory
        self.pace = Pace() if pace is None else pace
        self.sinks = Sinks() if sinks is None else sinks
        self.monitor = monitor
        self.written = 0 if monitor is None else len(monitor.records)
        self.started = time.monotonic() - elapsed

    def on_start(self, trainer: Trainer) -> None:
        """Record the first measurement; a fresh run gets a checkpoint of its initial weights."""
        self.write()
        if trainer.step == 0:
            self.checkpoint(trainer)

    def on_epoch(self, trainer: Trainer) -> None:
        """Record what was measured; checkpoint if there was anything or it is time."""
        if self.pace.due(trainer.step, measured=bool(self._unwritten())):
            self.checkpoint(trainer)

    def on_interrupt(self, trainer: Trainer) -> None:
        """Leave a checkpoint of the last completed step."""
        self.checkpoint(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Leave a checkpoint of the final weights."""
        self.checkpoint(trainer)

    def checkpoint(self, trainer: Trainer) -> None:
        """Write what was measured, and save the trainer's state.

        Raises:
            DivergedError: a weight is not finite; the last good
                checkpoint stays the last one.
        """
        self.write()
        if self.directory is None:
            return
        trainer.check_weights()
        weights = list(trainer.model.parameters())
        team = current()
        if team is not None:
            # Every step is the same in all processes, so the weights are, to the last bit.
            team.agree("weights", [float(w.detach().double().sum()).hex() for w in weights])
        state = trainer.state()
        numbers = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        tensors = numbers.pop("tensors")
        elapsed = {"elapsed_seconds": time.monotonic() - self.started}
        self.directory.save_checkpoint(tensors, numbers | elapsed)

    def write(self) -> None:
        """Append the measurements that are not on disk yet, and hand them to the sinks."""
        new = self._unwritten()
        if new and self.directory is not None:
            self.directory.append_metrics(*new)
        self.sinks.write(new)
        self.written += len(new)

    def _unwritten(self) -> list[dict[str, Any]]:
        return [] if self.monitor is None else self.monitor.records[self.written :]


class ProgressBar(Callback):
    """Epoch, loss, adversarial accuracy, γ̂_m and the time left, on one line of the terminal."""

    def __init__(self, monitor: Monitor | None) -> None:
        self.monitor = monitor
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.shown = 0.0

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar, on standard error."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=Console(file=sys.stderr),
        )
        total = trainer.epochs * trainer.steps_per_epoch
        self.task = self.progress.add_task("", total=total, **self._fields(trainer))
        self.progress.update(self.task, completed=trainer.step)
        self.progress.start()

    def on_step(self, trainer: Trainer) -> None:
        """Advance, ten times a second at most."""
        now = time.monotonic()
        if self.progress is not None and self.task is not None and now > self.shown + 0.1:
            self.shown = now
            self.progress.update(self.task, completed=trainer.step)

    def on_epoch(self, trainer: Trainer) -> None:
        """Show the epoch's numbers, ten times a second at most."""
        now = time.monotonic()
        if self.progress is not None and self.task is not None and now > self.shown + 0.1:
            self.shown = now
            self.progress.update(self.task, completed=trainer.step, **self._fields(trainer))

    def on_end(self, trainer: Trainer) -> None:
        """Leave the last state on the screen."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=trainer.step, **self._fields(trainer))
        self.stop()

    def on_interrupt(self, trainer: Trainer) -> None:
        """Leave the last state on the screen."""
        self.stop()

    def stop(self) -> None:
        """Stop drawing."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _fields(self, trainer: Trainer) -> dict[str, Any]:
        text = ""
        if trainer.epoch_loss == trainer.epoch_loss:  # not NaN: an epoch was completed here
            text = f"loss {trainer.epoch_loss:.3g}  adv.acc. {trainer.epoch_accuracy:.4f}"
        if self.monitor is not None and self.monitor.records:
            text += f"  γ̂_m {self.monitor.records[-1]['normalized_margin']:.3g}"
        return {"epoch": f"{trainer.epoch}/{trainer.epochs}", "text": text.strip()}
