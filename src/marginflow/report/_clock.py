"""What runs are drawn and told against: epochs, steps, or the logarithm of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from marginflow.report._text import epoch_of, format_short, number
from marginflow.runs import Run

START = "−∞"
"""ln t of the start, t = 0."""

FLOW_DIGITS = 6
"""Digits of margins where there is a flow: late ones differ in few, and a flow has that many."""

_ROUNDING = 1e-6  # the integrators hit ln t = 0 to 1e-9


@dataclass(frozen=True)
class Clock:
    """The x-axis that runs share.

    Attributes:
        label: of the axis.
        at: the place of a measurement, or None where it has none.
        last: the last place of all, 0 if there is none.
    """

    label: Literal["epoch", "step", "ln t"]
    at: Callable[[Mapping[str, Any]], float | None]
    last: float

    @property
    def logarithmic(self) -> bool:
        """Whether this is ln t."""
        return self.label == "ln t"


def is_flow(run: Run) -> bool:
    """Whether the run is a gradient flow: it has a time, and no epochs."""
    return run.config.get("kind") == "flow"


def is_ascent(run: Run) -> bool:
    """Whether the run maximises margins: it follows no gradient flow, and has no time."""
    return run.config.get("kind") == "maximize"


def is_monitored(run: Run) -> bool:
    """Whether the run is somebody's own loop, of which only the measurements are ours."""
    return run.config.get("kind") == "monitor"


def method_name(run: Run) -> str:
    """The name of an ascent's method, without its options."""
    return str(run.config.get("method")).partition(":")[0]


def clock_of(runs: Sequence[Run]) -> Clock:
    """The common clock: ln t as soon as a flow is among the runs; else epochs, or steps.

    Steps are for runs that count no epochs. A training run has a time too, t = Σ η. Flows that
    were measured at t = 0 only are told by their steps, since the start has no ln t.
    """
    records = [record for run in runs for record in run.metrics]
    label: Literal["epoch", "step", "ln t"]
    at: Callable[[Mapping[str, Any]], float | None]
    if any(map(is_flow, runs)):
        timed = any(log_time_of(record) is not None for record in records)
        label, at = ("ln t", log_time_of) if timed else ("step", _step_of)
    else:
        epochs = all(number(record, "epoch") is not None for record in records)
        label, at = ("epoch" if epochs else "step"), epoch_of
    places = [x for record in records if (x := at(record)) is not None]
    return Clock(label, at, max(places, default=0.0))


def _step_of(record: Mapping[str, Any]) -> float | None:
    return number(record, "step")


def log_time_of(record: Mapping[str, Any]) -> float | None:
    """The ln t of a measurement; None at the start (t = 0) and where no time is recorded."""
    return number(record, "log_time")


def at_start(record: Mapping[str, Any]) -> bool:
    """Whether the measurement is that of the initial weights, at t = 0."""
    return number(record, "step") == 0 and log_time_of(record) is None


def format_log_time(value: float | None) -> str:
    """The ln t in words, to four digits: −3, 0, 12.59, 1,000, 10⁶, or –."""
    return "0" if value is not None and abs(value) < _ROUNDING else format_short(value)


def log_time_cell(record: Mapping[str, Any]) -> str:
    """The ln t of a measurement in a table; −∞ at the start."""
    return START if at_start(record) else format_log_time(log_time_of(record))


def time_words(record: Mapping[str, Any]) -> str:
    """``ln t = 100``, ``t = 0``, or ``an unknown time``."""
    if at_start(record):
        return "t = 0"
    value = log_time_of(record)
    return "an unknown time" if value is None else f"ln t = {format_log_time(value)}"
