"""What came out of a sweep: a row for each trial.

Source: marginflow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from marginflow.errors import MarginflowError
from marginflow.kkt import read_certificate
from marginflow.runs import Run, load_run
from marginflow.sweeps._directory import SweepDirectory
from marginflow.sweeps._plan import Value

State = Literal["finished", "failed", "not started"]
MEASURED = (
    "epoch",
    "step",
    "log_time",
    "normalized_margin",
    "margin",
    "smoothed_margin",
    "norm_product",
    "log_loss",
    "clean_accuracy",
    "adversarial_accuracy",
    "test_clean_accuracy",
    "test_adversarial_accuracy",
)
"""What of the final measurement is in the table."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of one trial.

    Attributes:
        name: of the trial, and of its folder.
        swept: its values of what is swept.
        options: all its options.
        state: ``finished``, ``failed`` (after all attempts), ``not started``.
        attempts: how many there were.
        seconds: what the last one took, in seconds.
        error: the last attempt's error, or None.
        final: the last measurement; empty if there is none.
        residual: r of the KKT certificate, ‖W − Σ λ_i ∇m_i‖/‖W‖, or None.
        uncertified: why there is no residual, or None.
        path: the run directory.
    """

    name: str
    swept: Mapping[str, Value]
    options: Mapping[str, Any]
    state: State
    attempts: int
    seconds: float | None
    error: str | None
    final: Mapping[str, Any]
    residual: float | None
    uncertified: str | None
    path: Path

    def row(self) -> dict[str, Any]:
        """The trial as a row of the table; what it does not have is None."""
        return {
            "trial": self.name,
            **self.swept,
            "state": self.state,
            "attempts": self.attempts,
            "seconds": self.seconds,
            **{name: self.final.get(name) for name in MEASURED},
            "kkt_residual": self.residual,
            "error": self.error,
        }

    def load(self) -> Run:
        """The run of the trial, read from disk.

        Raises:
            RunError: there is none.
        """
        return load_run(self.path)


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep that was carried out, or as much of it as there is.

    Source: marginflow.

    Attributes:
        name: its title.
        path: its folder.
        job: ``train``, ``maximize`` or ``flow``.
        options: what all trials share, with variables as ``{eps}``.
        swept: the names of what is swept.
        certified: whether its trials were to get KKT certificates.
        trials: what came of each, in the order of the sweep.
        versions: of marginflow, numpy, Python and torch, when it was begun or last resumed.
    """

    name: str
    path: Path
    job: str
    options: Mapping[str, Any]
    swept: Sequence[str]
    certified: bool
    trials: Sequence[Outcome]
    versions: Mapping[str, str]

    @property
    def finished(self) -> list[Outcome]:
        """The trials that ended well."""
        return [trial for trial in self.trials if trial.state == "finished"]

    @property
    def failed(self) -> list[Outcome]:
        """The trials that failed in the end."""
        return [trial for trial in self.trials if trial.state == "failed"]

    def table(self) -> dict[str, list[Any]]:
        """A column for each number, a row for each trial: what ``results.csv`` holds.

        Columns: ``trial``, what is swept, ``state``, ``attempts``, ``seconds``, the final measurement,
        ``kkt_residual``, ``error``.
        """
        rows = [trial.row() for trial in self.trials]
        names = list(dict.fromkeys(["trial", *self.swept, *(n for row in rows for n in row)]))
        return {name: [row.get(name) for row in rows] for name in names}


def load_sweep(path: str | os.PathLike[str]) -> Sweep:
    """The sweep in a folder, as far as it has come.

    Args:
        path: the folder of the sweep.

    Raises:
        RunError: no sweep there, or a damaged one.
    """
    directory = SweepDirectory(path)
    content, attempts = directory.read(), directory.attempts()
    finished = directory.finished()
    found = []
    for trial in content["trials"]:
        name = trial["name"]
        done = attempts.get(name, [])
        last: Mapping[str, Any] = done[-1] if done else {}
        state: State = "finished" if name in finished else "failed" if done else "not started"
        place = directory.run_path(name)
        final, residual = _measured(place) if state == "finished" else ({}, None)
        found.append(
            Outcome(
                name=name,
                swept=trial["swept"],
                options=trial["options"],
                state=state,
                attempts=len(done),
                seconds=last.get("seconds"),
                error=last.get("error"),
                final=final,
                residual=residual,
                uncertified=last.get("certificate"),
                path=place,
            )
        )
    return Sweep(
        name=content["name"],
        path=directory.path,
        job=content["job"],
        options=content["options"],
        swept=tuple(content["swept"]),
        certified=content["certify"],
        trials=tuple(found),
        versions=content.get("versions") or {},
    )


def _measured(path: Path) -> tuple[Mapping[str, Any], float | None]:
    """The last measurement of a run, and the residual of its certificate."""
    try:
        run = load_run(path)
        certificate = read_certificate(path)
    except MarginflowError:
        return {}, None
    final = run.metrics[-1] if run.metrics else {}
    residual = None if certificate is None else certificate.content.get("residual")
    return final, residual if isinstance(residual, int | float) else None
