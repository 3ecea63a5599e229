"""Run an experiment: train what is missing, on several processes, and make the figure.

Source: marginflow.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from contextlib import contextmanager
from ctypes import c_byte
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from marginflow._checks import whole
from marginflow._reading import read_json
from marginflow.attacks import build as build_attack
from marginflow.datasets import Dataset, load
from marginflow.errors import RunError
from marginflow.experiments._experiment import Experiment, Results, Trained, Training
from marginflow.experiments._figure import FigureData
from marginflow.monitor import Monitor
from marginflow.runs import Run, RunDirectory, load_run, write_atomically
from marginflow.training import Callback, Trainer
from marginflow.workflow import train

_GRACE = 60.0  # seconds for a step and its checkpoint, before a training is killed


@dataclass(frozen=True, eq=False)
class Reproduction:
    """An experiment that was carried out.

    Attributes:
        experiment: its settings.
        results: its trainings.
        figure: what came out.
        seconds: what its trainings took, in seconds, summed over all processes and sessions.
    """

    experiment: Experiment
    results: Results
    figure: FigureData
    seconds: float


@dataclass(frozen=True)
class Job:
    """One training of one seed and where it lies."""

    training: Training
    seed: int
    path: Path
    data_dir: str | None
    threads: int
    force: bool

    def carry_out(self) -> float:
        """Train or resume, then measure the kept weights under further attacks; the seconds it took.

        A finished job does nothing but check that it is the one that was asked for.
        """
        began = time.monotonic()
        asked = self.training
        torch.set_num_threads(self.threads)
        exists = (self.path / "run.json").exists()
        train(
            asked.model,
            self.data(),
            attack=asked.attack,
            measure_with=asked.measure_with,
            loss=asked.loss,
            lr=asked.lr,
            batch_size=asked.batch_size,
            epochs=asked.epochs,
            dtype=asked.dtype,
            schedule=asked.schedule,
            callbacks=[_Obeying()],
            keep_weights=asked.keep or bool(asked.also),
            shrink=asked.shrink,
            seed=self.seed,
            out=self.path,
            resume=exists and not self.force,
            force=exists and self.force,
        )
        for attack in asked.also:
            self.measured(attack)
        return time.monotonic() - began

    def data(self) -> Dataset:
        """The data of the training."""
        data = load(self.training.data, data_dir=self.data_dir)
        return data if self.training.held_out else replace(data, test=None)

    def result(self) -> Trained:
        """The finished job."""
        run = load_run(self.path)
        return Trained(
            self.training, self.seed, run, {a: self.measured(a, run) for a in self.training.also}
        )

    def measured(self, attack: str, run: Run | None = None) -> list[dict[str, Any]]:
        """The kept weights measured under ``attack``; what was measured before is read.

        Raises:
            RunError: a damaged file.
        """
        run = load_run(self.path) if run is None else run
        place = self.path.with_name(f"{self.path.name}.under-{attack.partition(':')[0]}.json")
        asked = {"attack": attack, "steps": [record["step"] for record in run.metrics]}
        if place.exists():
            try:
                stored = read_json(place)
                records: list[dict[str, Any]] = stored["records"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RunError(f"{str(place)!r} is damaged ({error}); delete it") from None
            if all(stored.get(key) == value for key, value in asked.items()):
                return records
        data = self.data()
        model = run.load_model()
        monitor = Monitor(
            model,
            data,
            build_attack(attack),
            loss=run.config["loss"],
            schedule="every",
            strong=None,
        )
        epochs = {record["step"]: record["epoch"] for record in run.metrics}
        for step, weights in run.trajectory().items():
            if _told_to_stop():
                raise KeyboardInterrupt
            model.load_state_dict(weights)
            monitor.measure(step, epoch=epochs[step])
        write_atomically(place, json.dumps(asked | {"records": monitor.records}) + "\n")
        return monitor.records


def reproduce(
    experiments: Sequence[Experiment],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    seeds: int = 1,
    jobs: int = 1,
    threads: int = 1,
    data_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Reproduction]:
    """Carry out experiments one after the other: every training is a run directory below ``out``.

    What lies there finished is read, what was interrupted is resumed. The numbers hang on
    ``threads``, not on ``jobs``.

    Args:
        experiments: settings, such as ``[EXPERIMENTS["fig1"]["demo"]]``.
        out: the folder; the runs lie in ``out/fig1/NAME-seed0``.
        seed: the first seed.
        seeds: how many, counted from ``seed``.
        jobs: trainings at a time, each a process of its own.
        threads: of each training.
        data_dir: the folder of the data files.
        force: train again what is already there.
        tell: told of each training that has ended, in a line.

    Yields:
        each experiment as soon as its trainings have ended.

    Raises:
        MarginflowError: whatever :func:`marginflow.train` raises.
        KeyboardInterrupt: after Ctrl-C; the same call then goes on.
    """
    for name, value, least in (
        ("seed", seed, 0), ("seeds", seeds, 1), ("jobs", jobs, 1), ("threads", threads, 1)
    ):  # fmt: skip
        whole(name, value, least=least)
    where = None if data_dir is None else os.fspath(data_dir)
    planned: list[list[Job]] = []
    for experiment in experiments:
        folder = experiment.place(out)
        planned.append(
            [
                Job(t, s, folder / f"{t.name}-seed{s}", where, threads, force)
                for t in experiment.trainings()
                for s in range(seed, seed + seeds)
            ]
        )
    # Figures that share runs train them once.
    distinct = list({job.path: job for part in planned for job in part}.values())

    def told(job: Job, seconds: float) -> None:
        if tell is not None:
            name = job.path.relative_to(out)
            tell(f"{name}: {job.training.label}, {seconds:.0f} s")

    ended: set[Path] = set()
    with _threads(threads), _carried_out(distinct, jobs) as arriving:
        for experiment, part in zip(experiments, planned, strict=True):
            while not ended.issuperset(job.path for job in part):
                job, seconds = next(arriving)
                ended.add(job.path)
                told(job, seconds)
            trained: dict[str, list[Trained]] = {}
            for job in part:
                trained.setdefault(job.training.name, []).append(job.result())
            results = Results(trained, where)
            yield Reproduction(experiment, results, experiment.figure(results), _seconds(results))


@contextmanager
def _carried_out(planned: Sequence[Job], jobs: int) -> Iterator[Iterator[tuple[Job, float]]]:
    """All jobs as they end, ``jobs`` at a time."""
    jobs = min(jobs, len(planned))
    if jobs <= 1:
        yield ((job, job.carry_out()) for job in planned)
        return
    # Forked copies of a process with threads may hang: fresh ones cost two seconds.
    context = multiprocessing.get_context("spawn")
    # A byte without a lock: trainings read it at every step, and a lock would keep the writer waiting.
    stop = context.RawValue("b", 0)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_wait_for_orders, initargs=(stop,)
    )
    futures = {pool.submit(Job.carry_out, job): job for job in planned}
    try:
        yield ((futures[future], future.result()) for future in as_completed(futures))
    except BaseException as error:
        # Ctrl-C, a training that failed, or a caller that wants no more: the others need not end.
        stop.value = 1
        for future in futures:
            future.cancel()
        if isinstance(error, KeyboardInterrupt):
            wait([f for f in futures if not f.cancelled()], timeout=_GRACE)
            for process in multiprocessing.active_children():
                process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_stop: c_byte | None = None
"""What a process of the pool is told to stop by; None in the first process, which Ctrl-C reaches."""


def _wait_for_orders(stop: c_byte) -> None:
    """An idle process leaves Ctrl-C to the first one; a training handles it at its next step."""
    global _stop  # a process of the pool has one order only
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _told_to_stop() -> bool:
    return _stop is not None and _stop.value != 0


class _Obeying(Callback):
    """Leaves a checkpoint and ends the training when the first process says so.

    A terminal sends Ctrl-C to all processes, but other senders know the first one only.
    """

    def on_step(self, trainer: Trainer) -> None:
        if _told_to_stop():
            trainer.stop()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """PyTorch on ``number`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(results: Results) -> float:
    total = 0.0
    for seeds in results.trained.values():
        for t in seeds:
            checkpoint = (
                None if t.run.path is None else RunDirectory(t.run.path).latest_checkpoint()
            )
            if checkpoint is not None:
                total += float(checkpoint.info.get("elapsed_seconds", 0.0))
    return total
