"""``mf.train_seeds``: one training under several seeds, side by side where that is faster."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from marginflow._checks import unknown, whole
from marginflow.datasets import Dataset, load
from marginflow.distributed import alone
from marginflow.engine import stacking_gains
from marginflow.errors import DivergedError, InputError, OutOfMemoryError, RunError
from marginflow.runs import Run, RunDirectory, check_sinks
from marginflow.training import SideBySide, side_by_side_refusal
from marginflow.workflow._callbacks import Pace, ProgressBar
from marginflow.workflow._train import plan_training
from marginflow.workflow._train import train as _train
from marginflow.workflow._train_job import TrainingJob

_log = logging.getLogger("marginflow")

_APART = 2.0
"""Seconds: checkpoints of eight small networks at every measurement would take longer than training."""

_OWN = {"model", "data", "seed", "callbacks", "out", "resume", "force", "progress"}
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(_train).parameters.items()
    if name not in _OWN
}
_SIDE_BY_SIDE = {
    "attack", "loss", "lr", "batch_size", "epochs", "momentum", "derivative", "measure",
    "measure_with", "schedule", "keep_weights", "dtype", "device", "engine",
    "perturbation_precision", "shrink", "log",
}  # fmt: skip
"""The options that trainings side by side know of; with any other they run alone."""


def train_seeds(
    model: str | Callable[[int], nn.Module],
    data: Dataset | tuple[Tensor, Tensor] | str,
    *,
    seeds: int | Sequence[int] = 8,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    **options: Any,
) -> list[Run]:
    """Train a network under several seeds, as :func:`train` with each of them would.

    Small dense networks are trained side by side: their weights are stacked, so that one batched
    product does the work of all. Each seed has its own initial weights, batches, random
    starts, measurements and run directory; its path is that of its solo run but for the rounding of
    products, and it can go on alone: ``train(…, seed=3, out="runs/x/seed-3", resume=True)``.
    Where that is not possible or no gain, the seeds are trained one after the other, and a line
    of the log says why: other networks, weights × examples of a batch beyond
    :func:`marginflow.engine.stacking_gains`, rates that follow the loss, ``derivative="total"``,
    random starts in the ℓ2 ball, bf16 perturbations, shrinking.

    Source: Algorithm 1, under several seeds.

    Args:
        model: a specification such as ``"mlp:20"``, or a function of the seed that makes a network.
        data: as for :func:`train`; a pair of x, (n, …), and y, (n,), too.
        seeds: the seeds, or how many: 8 is 0 … 7.
        out: a folder for the run directories ``seed-0``, ``seed-1`` …; None keeps the runs in memory.
        resume: continue the runs in ``out``; those that are not there begin.
        force: replace the runs that are there.
        progress: show a progress bar on standard error, with the numbers of the first seed.
        options: all others of :func:`train` but ``seed`` and ``callbacks``.

    Returns:
        the runs, in the order of the seeds.

    Raises:
        InputError: any argument that cannot be used (nothing is written then).
        RunError: a run directory is taken, or does not fit when resuming.
        DivergedError: seeds diverged, after the others have been trained to the end.
        KeyboardInterrupt: after Ctrl-C, once the checkpoints are written.
    """
    alone("training several seeds", "train one after the other with mf.train, or by a sweep")
    chosen = _chosen(seeds)
    for name in options:
        if name in ("seed", "callbacks"):
            raise InputError(f"{name}: not for several seeds; train them one by one, with mf.train")
        if name not in _DEFAULTS:
            raise unknown("option", name, _DEFAULTS)
    options["log"] = check_sinks(options.get("log", ()), out=out)
    if not all(isinstance(sink, str) for sink in options["log"]):
        raise InputError(
            "log: a sink of your own takes one run; train the seeds one by one with it"
        )
    if isinstance(model, nn.Module):
        raise InputError(
            "model: expected a specification or a function of the seed, got a network, which "
            "can be trained under one seed only"
        )
    if isinstance(data, str):
        data = load(data)
    asked = _Asked(model, data, {**_DEFAULTS, **options}, out, resume, force)
    asked.check(chosen)
    first = asked.plan(chosen[0])
    planned = {chosen[0]: first}
    reason = _refusal(first, asked.options)
    if reason is None and len(chosen) > 1:
        planned |= {seed: asked.plan(seed, like=first) for seed in chosen[1:]}
        # Runs that are resumed keep the engines that they began with.
        reasons = [_refusal(job, asked.options) for job in planned.values()]
        reason = next((found for found in reasons if found is not None), None)
        if reason is None:
            return _side_by_side(asked, planned, progress)
    if reason is not None and len(chosen) > 1:
        _log.warning("the seeds are trained one after the other: %s", reason)
    runs: list[Run] = []
    diverged: dict[int, DivergedError] = {}
    for seed in chosen:
        job = planned.pop(seed, None) or asked.plan(seed)
        try:
            run = job.run(
                asked.folder(seed),
                resume=asked.resumes(seed),
                force=asked.force,
                progress=progress,
            )
            runs.append(run)
        except DivergedError as error:
            diverged[seed] = error
    _complain(diverged, len(chosen))
    return runs


class _Asked:
    """The training that is asked for, under any seed."""

    def __init__(
        self,
        model: str | Callable[[int], nn.Module],
        data: Dataset | tuple[Tensor, Tensor],
        options: Mapping[str, Any],
        out: str | os.PathLike[str] | None,
        resume: bool,
        force: bool,
    ) -> None:
        self.model = model
        self.data = data
        self.options = dict(options)
        self.out = None if out is None else Path(out)
        self.resume = resume
        self.force = force

    def check(self, seeds: Sequence[int]) -> None:
        """Refuse directories that cannot be used, before anything is written."""
        if self.resume and self.force:
            raise InputError("resume and force exclude each other: continue the runs, or replace")
        if self.resume and self.out is None:
            raise InputError("resume needs out=…, the folder of the runs to continue")
        if self.out is None:
            return
        if (self.out / "run.json").exists():
            raise RunError(
                f"{str(self.out)!r} is the run of one seed; choose another directory for several"
            )
        if self.resume and not any(self.resumes(seed) for seed in seeds):
            RunDirectory(self.out / f"seed-{seeds[0]}").read_config()
        for seed in seeds:
            folder = self.folder(seed)
            if folder is not None and not self.resumes(seed):
                RunDirectory.check_free(folder, force=self.force)

    def folder(self, seed: int) -> Path | None:
        """The run directory of a seed."""
        return None if self.out is None else self.out / f"seed-{seed}"

    def resumes(self, seed: int) -> bool:
        """Whether the run of a seed is continued: one that is not there yet begins."""
        folder = self.folder(seed)
        return self.resume and folder is not None and (folder / "run.json").exists()

    def plan(self, seed: int, like: TrainingJob | None = None) -> TrainingJob:
        """The training under a seed; with the data of ``like``, so that they are there but once."""
        model = self.model if isinstance(self.model, str) else self.model(seed)
        job = plan_training(
            model,
            self.data,
            **self.options,
            seed=seed,
            out=self.folder(seed),
            resume=self.resumes(seed),
            force=self.force,
            callbacks=(),
        )
        if like is not None:
            job.trainer.data = like.trainer.data
            if job.monitor is not None and like.monitor is not None:
                job.monitor.data = like.monitor.data
        return job


def _side_by_side(asked: _Asked, jobs: Mapping[int, TrainingJob], progress: bool) -> list[Run]:
    """The trainings in step; those that were interrupted at different steps, in groups."""
    diverged: dict[int, DivergedError] = {}
    pace = Pace(_APART)
    with contextlib.ExitStack() as closing:
        for seed, job in jobs.items():
            closing.push(job)
            job.open(asked.folder(seed), resume=asked.resumes(seed), force=asked.force, pace=pace)
        groups: dict[int, list[int]] = {}
        for seed, job in jobs.items():
            if not job.finished:
                groups.setdefault(job.trainer.step, []).append(seed)
        for _, group in sorted(groups.items()):
            bar = ProgressBar(jobs[group[0]].monitor) if progress else None
            trainers = [jobs[seed].trainer for seed in group]
            running = SideBySide(trainers, [] if bar is None else [bar])
            try:
                running.run()
            except OutOfMemoryError as refused:
                raise jobs[group[0]].with_other_size(refused) from refused
            finally:
                if bar is not None:
                    bar.stop()
            for place, error in running.diverged.items():
                job = jobs[group[place]]
                if job.recording is not None:
                    job.recording.write()
                diverged[group[place]] = job.with_advice(error)
                job.close(error)
        runs = [job.result() for seed, job in jobs.items() if seed not in diverged]
    _complain(diverged, len(jobs))
    return runs


def _refusal(job: TrainingJob, options: Mapping[str, Any]) -> str | None:
    """Why the seeds are not trained side by side, or None if they are."""
    other = [n for n, v in options.items() if n not in _SIDE_BY_SIDE and v != _DEFAULTS[n]]
    if other:
        return f"{other[0]} is for one network at a time"
    trainer = job.trainer
    reason = side_by_side_refusal(trainer)
    if reason is None and not stacking_gains(trainer.engine, trainer.batch_size):
        reason = "networks and batches of this size gain nothing side by side"
    return reason


def _chosen(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, int):
        return list(range(whole("seeds", seeds, least=1)))
    chosen = [whole("seeds", seed, least=0) for seed in seeds]
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds: expected a number or different seeds, got {list(seeds)!r}")
    return chosen


def _complain(diverged: Mapping[int, DivergedError], count: int) -> None:
    """Say which seeds diverged, if any did.

    Raises:
        DivergedError: with the step and the epoch of the first of them.
    """
    if not diverged:
        return
    causes = "; ".join(f"seed {seed}: {error}" for seed, error in diverged.items())
    others = "" if len(diverged) == count else "; the others are trained to the end"
    first = next(iter(diverged.values()))
    raise DivergedError(
        f"{len(diverged)} of {count} seeds diverged{others}. {causes}", first.step, first.epoch
    )
