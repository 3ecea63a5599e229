"""What tests of the reports of flows share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from marginflow.experiments import Panel
from marginflow.report import comparison
from marginflow.runs import Run

DATA = "separable:n=8,d=3,margin=0.3,seed=0"
ATTACK = "exact-linear:p=2,eps=0.05"
AGAINST = "exact ℓ2 adversary, ε = 0.05"


def changed(run: Run, name: str | None = None, *, last: int | None = None, **config: Any) -> Run:
    """A copy of ``run`` with other settings, perhaps of its first ``last`` measurements only."""
    path = run.path if name is None else Path("runs") / name
    return Run({**run.config, **config}, copy.deepcopy(run.metrics[:last]), path)


def panels(*runs: Run) -> dict[str, Panel]:
    return {panel.title: panel for panel in comparison(runs).panels}


def column(run: Run, key: str) -> list[Any]:
    """What was measured after the start."""
    return [record[key] for record in run.metrics if record["log_time"] is not None]
