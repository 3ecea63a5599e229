"""``marginflow sweep``."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

from marginflow._checks import choice

if TYPE_CHECKING:
    from marginflow.sweeps import Plan, Sweep

_SHORT = {
    "adversarial accuracy, train": "adv. train",
    "adversarial accuracy, test": "adv. test",
    "clean accuracy, test": "clean test",
    "KKT residual r": "r",
}
"""Accuracies leave more room for the names of the trials."""


def run_sweep(
    file: Path,
    *,
    out: Path | None,
    executor: str,
    address: str | None,
    jobs: int | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    progress: bool,
) -> int:
    """Carry out the sweep of ``file``, draw its page, print what came out; 1 if a trial failed."""
    from marginflow.report import sweep_statement, sweep_table, write_sweep
    from marginflow.sweeps import EXECUTORS, check_trials, read_plan, sweep

    choice("--executor", executor, EXECUTORS)
    chosen = next(name for name in EXECUTORS if name == executor)
    plan = read_plan(file)
    if out is not None:
        plan = dataclasses.replace(plan, out=out)
    if dry_run:
        check_trials(plan)
        _list(plan)
        return 0
    began = time.monotonic()
    try:
        result = sweep(
            plan,
            executor=chosen,
            jobs=jobs,
            address=address,
            resume=resume,
            force=force,
            progress=progress,
        )
    except KeyboardInterrupt:
        if (plan.out / "sweep.json").exists():
            print(
                "\nwhat is finished is kept; continue with: marginflow sweep "
                f"{shlex.quote(str(file))} --resume --out {shlex.quote(str(plan.out))}",
                file=sys.stderr,
            )
        raise
    page = write_sweep(result, result.path / "report.html")

    from marginflow.cli._tables import print_prose, print_table

    seconds = time.monotonic() - began
    print(
        f"{len(result.trials)} trials in {seconds:.1f} s; the runs are in {result.path / 'trials'}"
    )
    print_prose(sweep_statement(result))
    if result.finished:
        header, rows = sweep_table(result)
        print_table([_SHORT.get(title, title) for title in header], rows)
    _name_failures(result)
    print(f"The report lies in {page}.")
    return 1 if result.failed else 0


def _list(plan: Plan) -> None:
    shared = set.intersection(*(set(map(repr, t.options.items())) for t in plan.trials))
    print(f"{len(plan.trials)} trials of {plan.job}, into {plan.out}:")
    for trial in plan.trials:
        own = ", ".join(
            f"{k} = {v}" for k, v in trial.options.items() if repr((k, v)) not in shared
        )
        print(_filled(f"{trial.name}: {own}"))


def _name_failures(result: Sweep) -> None:
    for trial in result.failed:
        tries = f"{trial.attempts} attempt{'s' * (trial.attempts != 1)}"
        print(_filled(f"failed after {tries}: {trial.name}: {trial.error}"), file=sys.stderr)


def _filled(text: str) -> str:
    return textwrap.fill(
        text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
