"""One training from its run directory to its result, ready to be run alone or beside others."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection
from typing import Any, Self

import torch

from marginflow.distributed import apart, current
from marginflow.engine import ParallelEngine
from marginflow.errors import (
    DivergedError,
    InputError,
    MarginflowError,
    OutOfMemoryError,
    ProcessLostError,
    RunError,
)
from marginflow.monitor import Monitor
from marginflow.runs import Checkpoint, Log, Metrics, Run, RunDirectory, Sinks, open_sinks
from marginflow.training import Callback, Trainer, TrainingState
from marginflow.workflow._callbacks import KeepingWeights, Pace, ProgressBar, Recording
from marginflow.workflow._precision import perturbation_effect
from marginflow.workflow._setup import open_directory


class TrainingJob:
    """A training that is checked and described, but of which nothing is on disk yet.

    Args:
        trainer: with the callbacks that come before recording.
        monitor: what measures, or None.
        config: the content of ``run.json``.
        keep_weights: keep the weights of every measurement.
        free: settings that may be others when the run is resumed.
        log: where measurements go beside the run directory.
    """

    def __init__(
        self,
        trainer: Trainer,
        monitor: Monitor | None,
        config: dict[str, Any],
        *,
        keep_weights: bool,
        free: Collection[str] = ("epochs",),
        log: Log = (),
    ) -> None:
        self.trainer = trainer
        self.monitor = monitor
        self.config = config
        self.keep_weights = keep_weights
        self.free = tuple(free)
        self.log = log
        self.sinks = Sinks()
        self.directory: RunDirectory | None = None
        self.keeping: KeepingWeights | None = None
        self.recording: Recording | None = None
        self.finished = False
        """Whether the run, resumed, was at its end already."""

    def open(
        self,
        out: str | os.PathLike[str] | None,
        *,
        resume: bool = False,
        force: bool = False,
        pace: Pace | None = None,
    ) -> None:
        """Make or reopen the run directory, if there is one, and record from now on.

        Args:
            out: the run directory, or None.
            resume: continue what is there.
            force: replace what is there.
            pace: when checkpoints are due.

        Raises:
            RunError: ``out`` is taken, or holds a run that cannot be continued so.
            StorageError: the disk refuses.
        """
        elapsed = 0.0
        team = current()
        if team is not None:
            team.agree("the job", {**self.config, "epochs": self.trainer.epochs})
        if out is not None:
            self.directory, elapsed = open_directory(
                out,
                self.config,
                free=self.free,
                restore=functools.partial(_restore, self.trainer),
                model=self.trainer.model,
                monitor=self.monitor,
                resume=resume,
                force=force,
            )
        self.finished = resume and self.trainer.epoch >= self.trainer.epochs
        recording: list[Callback] = []
        if self.monitor is not None and self.keep_weights:
            self.keeping = KeepingWeights(self.monitor, self.directory)
            recording.append(self.keeping)
        if not self.finished:
            self.sinks = self._open_sinks()
        if self.directory is not None or self.log:
            self.recording = Recording(
                self.directory, self.monitor, elapsed, pace=pace, sinks=self.sinks
            )
            recording.append(self.recording)
        self.trainer.callbacks = (*self.trainer.callbacks, *recording)

    def run(
        self,
        out: str | os.PathLike[str] | None,
        *,
        resume: bool = False,
        force: bool = False,
        progress: bool = False,
    ) -> Run:
        """Open, train alone, close. Raises what these raise."""
        try:
            self.open(out, resume=resume, force=force)
            team = current()
            bar = (
                ProgressBar(self.monitor) if progress and (team is None or not team.rank) else None
            )
            if bar is not None:
                self.trainer.callbacks = (*self.trainer.callbacks, bar)
            try:
                if not self.finished:
                    self.trainer.run()
            except DivergedError as error:
                raise self.with_advice(error) from None
            except ProcessLostError as error:
                raise self.with_way_back(error) from error
            except OutOfMemoryError as error:
                raise self.with_other_size(error) from error
            except InputError as error:
                # What a user's own attack or model does wrong: it may take steps to do so.
                self.place(error)
                raise
            finally:
                if bar is not None:
                    bar.stop()
            result = self.result()
        except BaseException as error:
            self.close(error)
            raise
        self.close()
        return result

    def close(self, error: BaseException | None = None) -> None:
        """Close the sinks, which learn what ended the run early, and release the run directory."""
        self.sinks.close(error)
        if self.directory is not None:
            self.directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def result(self) -> Run:
        """The run as it stands."""
        config, path = self.config, None
        if self.directory is not None:
            config, path = self.directory.read_config(), self.directory.path
        effect = None
        # It may be lacking of a run that was killed after its last checkpoint.
        if not self.finished or "perturbation_effect" not in config:
            layers = None if self.monitor is None else self.monitor.homogeneity
            engine = self.trainer.engine
            own = engine.own if isinstance(engine, ParallelEngine) else engine
            effect = perturbation_effect(own, self.trainer.data, layers)
        if effect is not None:
            config = {**config, "perturbation_effect": effect}
            if self.directory is not None:
                self.directory.write_config(config)
        records = Metrics() if self.monitor is None else self.monitor.records
        kept = {} if self.keeping is None else self.keeping.kept
        return Run(config, records, path, self.trainer.model, kept)

    def with_way_back(self, error: ProcessLostError) -> ProcessLostError:
        """The error, with what is kept of the run."""
        if self.directory is None:
            return error
        with apart():
            checkpoint = self.directory.latest_checkpoint()
        if checkpoint is None:
            return error
        step, path = checkpoint.info["step"], self.directory.path
        return ProcessLostError(
            f"{error}; the run {str(path)!r} is kept up to step {step}: continue it with --resume "
            "(resume=True), with as many processes as you like"
        )

    def with_other_size(self, error: OutOfMemoryError) -> OutOfMemoryError:
        """The error, with what is kept of the run and why it cannot go on with fewer at once."""
        if self.directory is None:
            return error
        # The batch size decides the path: a run that went on with another would not be repeatable.
        kept = (
            f"; the run {str(self.directory.path)!r} is kept and goes on with --resume (resume=True) where "
            "more memory is free; another batch size is another run"
        )
        return OutOfMemoryError(f"{error}{kept}", error.batch_size, error.asked)

    def place(self, error: InputError) -> None:
        """Say in ``error`` at which step it was met."""
        trainer = self.trainer
        text = f"{error} (met at step {trainer.step + 1}, epoch {trainer.epoch + 1})"
        error.args = (text, *error.args[1:])

    def _open_sinks(self) -> Sinks:
        config, path = self.config, None
        if self.directory is not None:
            config, path = self.directory.read_config(), self.directory.path
        records = () if self.monitor is None else self.monitor.records
        team = current()
        if team is not None and team.rank:
            return Sinks()
        return open_sinks(self.log, path, config, records=records)

    def with_advice(self, error: DivergedError) -> DivergedError:
        """The error, with the checkpoint that the run is left with."""
        checkpoint = None if self.directory is None else self.directory.latest_checkpoint()
        kept = "" if checkpoint is None else f"; the last good checkpoint is {checkpoint.path}"
        return DivergedError(f"{error}{kept}", error.step, error.epoch)


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> int:
    info = checkpoint.info
    fields = [f.name for f in dataclasses.fields(TrainingState) if f.name != "tensors"]
    try:
        state = TrainingState(checkpoint.tensors, **{name: info[name] for name in fields})
    except KeyError as error:
        raise RunError(f"the checkpoint {checkpoint.path.name} lacks {error}") from None
    counts = [state.epoch, state.step, state.batch, state.correct]
    if not (
        all(isinstance(n, int) and n >= 0 for n in counts)
        and state.batch <= trainer.steps_per_epoch
        and isinstance(state.loss_sum, int | float)
        and isinstance(state.rate, dict)
    ):
        raise RunError(f"the checkpoint {checkpoint.path.name} is damaged: its counts are none")
    if state.epoch > trainer.epochs:
        raise RunError(
            f"epochs: expected at least {state.epoch}, which the run has already been "
            f"trained for, got {trainer.epochs}"
        )
    try:
        torch.Generator().set_state(state.tensors["random.global"])
        trainer.restore(state)
        # What was taken over is what would be saved now; anything else is of another training.
        for name, own in trainer.state().tensors.items():
            found = state.tensors.get(name, own)
            if (found.dtype, found.shape) != (own.dtype, own.shape):
                raise TypeError(
                    f"{name!r} is {found.dtype} of shape {tuple(found.shape)} in it, expected {own.dtype} of "
                    f"shape {tuple(own.shape)}"
                )
    except MarginflowError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"the checkpoint {checkpoint.path.name} is not one of this training: {reason}"
        ) from None
    return state.step
