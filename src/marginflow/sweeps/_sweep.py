"""``mf.sweep``: carry out the trials, several at a time, and try again what failed.

Source: marginflow.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from marginflow._checks import choice, place, whole
from marginflow._version import __version__
from marginflow.datasets import Dataset, load
from marginflow.errors import InputError
from marginflow.runs import check_sinks, csv_of, write_atomically
from marginflow.sweeps._directory import SweepDirectory
from marginflow.sweeps._executor import Executor
from marginflow.sweeps._plan import Plan, Trial, read_plan
from marginflow.sweeps._processes import ProcessExecutor
from marginflow.sweeps._ray import RayExecutor
from marginflow.sweeps._result import Sweep, load_sweep
from marginflow.workflow import check_job

_LONGEST = 200  # letters of a line of progress
ExecutorName = Literal["auto", "processes", "ray"]
"""What carries out trials: processes of this machine, Ray, or Ray where it is installed."""

EXECUTORS: tuple[ExecutorName, ...] = ("auto", "processes", "ray")
"""Every :data:`ExecutorName`."""


def sweep(
    source: str | os.PathLike[str] | Mapping[str, Any] | Plan,
    *,
    out: str | os.PathLike[str] | None = None,
    executor: ExecutorName = "auto",
    jobs: int | None = None,
    address: str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Sweep:
    """Carry out a run for every choice of options that a file names, and compare them.

    Each trial is a run directory ``out/trials/NAME``, its name made of what is swept. A trial that
    fails, with an error or because its process died, goes on from its last checkpoint up to ``retries``
    times; then it is named in the result, and the others go on. All trials are checked before
    anything is written.

    Source: marginflow.

    Args:
        source: a file ``sweep.toml``, or its content as a mapping, or a plan; see docs/howto/sweep.md.
        out: the sweep's folder; by default as the file says, or ``runs/NAME``.
        executor: ``ray``, ``processes`` (of this machine, by the standard library), or ``auto``:
            Ray where it is installed. Both give the same bits.
        jobs: trials at a time; by default as many as the cores allow, or as Ray has room for.
        address: of a Ray cluster; by default ``RAY_ADDRESS``, or this machine alone.
        resume: go on with the sweep in ``out``. What is finished is not repeated, what is half done goes
            on from its checkpoint, what failed is tried again. Trials may have been added.
        force: replace a sweep that ``out`` already holds.
        progress: a line on standard error for each trial that has ended.

    Returns:
        the sweep, with ``.finished``, ``.failed`` and ``.table()``. Trials that failed are a value too.

    Raises:
        InputError: a file or an option that cannot be used (nothing is written then).
        MissingDependencyError: Ray is asked for and not installed, or a library of an option is not.
        RunError: ``out`` is taken, or holds another sweep.
        StorageError: the disk refuses.
        KeyboardInterrupt: after Ctrl-C, once the running trials have written their checkpoints.
    """
    plan = source if isinstance(source, Plan) else read_plan(source)
    if out is not None:
        plan = dataclasses.replace(plan, out=place("out", out))
    if resume and force:
        raise InputError("resume and force exclude each other: continue the sweep, or replace it")
    choice("executor", executor, EXECUTORS)
    if jobs is not None:
        whole("jobs", jobs, least=1)
    directory = SweepDirectory(plan.out)
    directory.check(plan, resume=resume, force=force)
    check_trials(plan)
    tell = _tell if progress else _silent
    workers = _executor(plan, executor, jobs, address)
    try:
        directory.open(plan, resume=resume, force=force)
        try:
            _carry_out(plan, directory, workers, tell)
        except KeyboardInterrupt:
            workers.stop()
            raise
        result = load_sweep(directory.path)
        _write_table(result)
        return result
    finally:
        workers.close()
        directory.close()


def check_trials(plan: Plan) -> None:
    """Refuse what any trial would refuse, by the job's own checks; data are loaded once each.

    Args:
        plan: what :func:`read_plan` gave.

    Raises:
        InputError: what a trial cannot use, with the trial's name before the reason.
        MissingDependencyError: a library that an option needs is not installed.
    """

    @functools.cache
    def data(spec: str, data_dir: str | None) -> Dataset:
        return load(spec, data_dir=data_dir)

    for trial in plan.trials:
        options = dict(trial.options)
        try:
            if "threads" in options:
                whole("threads", options.pop("threads"), least=1)
            check_sinks(options.pop("log", ()), out=plan.out)
            if "from" in options:
                options["start"] = options.pop("from")
            loaded = data(options.pop("data"), options.pop("data_dir", None))
            check_job(plan.job, options.pop("model"), loaded, **options)
        except InputError as error:
            raise InputError(f"trial {trial.name}: {error}") from error


def _executor(
    plan: Plan, name: ExecutorName, jobs: int | None, address: str | None
) -> ProcessExecutor | RayExecutor:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if name == "auto":
        # A mere folder called ray, in which somebody stands, is found as well: it has no origin.
        found = importlib.util.find_spec("ray")
        there = found is not None and found.origin is not None
        name = "ray" if address or there else "processes"
    if name == "ray":
        # Ray started here shall have room for as many trials as are asked for.
        room = max(cores, round(plan.cpus * jobs)) if jobs is not None else cores
        return RayExecutor(jobs, plan.cpus, plan.gpus, address, room)
    if address is not None:
        raise InputError("address: a Ray cluster needs executor 'ray', got 'processes'")
    if plan.gpus:
        raise InputError(
            "gpus: only Ray hands out graphics processors; use executor 'ray', or leave gpus out and set "
            'device = "cuda"'
        )
    return ProcessExecutor(max(1, int(cores / plan.cpus)) if jobs is None else jobs)


def _carry_out(
    plan: Plan, directory: SweepDirectory, workers: Executor, tell: Callable[[str], None]
) -> None:
    """Every trial that is not finished, and those that fail again."""
    finished = directory.finished()
    waiting = deque(trial for trial in plan.trials if trial.name not in finished)
    if finished:
        tell(f"{len(finished)} of {len(plan.trials)} trials are finished already")
    trials = {trial.name: trial for trial in plan.trials}
    tries: dict[str, int] = dict.fromkeys(trials, 0)
    ended, running = len(finished), 0
    while waiting or running:
        while waiting and workers.has_room():
            trial = waiting.popleft()
            tries[trial.name] += 1
            workers.start(task_of(plan, trial, directory))
            running += 1
        for name, answer in workers.wait():
            running -= 1
            if answer.get("interrupted"):
                raise KeyboardInterrupt
            error = answer.get("error")
            record = {"trial": name, "outcome": "failed" if error else "finished", **answer}
            directory.add_attempt(record)
            again = error is not None and tries[name] <= plan.retries
            ended += not again
            head = f"[{ended}/{len(trials)}] {name}"
            if error is None:
                tell(f"{head}: {answer.get('seconds', 0):.1f} s")
            elif again:
                tell(f"{name}: failed, and is tried again: {error}")
                waiting.append(trials[name])
            else:
                count = f" after {tries[name]} attempts" if tries[name] > 1 else ""
                tell(f"{head}: failed{count}: {error}")


def task_of(plan: Plan, trial: Trial, directory: SweepDirectory) -> dict[str, Any]:
    """What :func:`marginflow.sweeps._trial.attempt` is given for a trial."""
    options = dict(trial.options)
    if plan.job != "flow":
        options.setdefault("dtype", "float32")
    return {
        "name": trial.name,
        "job": plan.job,
        "options": options,
        "path": str(directory.run_path(trial.name).absolute()),
        "folder": os.getcwd(),
        "certify": plan.certify,
        "version": __version__,
    }


def _write_table(result: Sweep) -> None:
    rows = "".join(json.dumps(trial.row(), ensure_ascii=False) + "\n" for trial in result.trials)
    write_atomically(result.path / "results.jsonl", rows)
    write_atomically(result.path / "results.csv", csv_of(result.table()))


def _tell(line: str) -> None:
    # The whole error is kept in attempts.jsonl, and is told at the end.
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    """Without progress."""
