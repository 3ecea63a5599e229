"""The progress of a flow on one line: ln t, ρ, γ̂_m."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from marginflow.flow import State

_EVERY = 0.1  # seconds


class FlowProgress:
    """A bar over ln ln t, which is about how the work is spread; without a goal in ln t, no bar.

    Args:
        log_time: the ln t aimed at, or None.
    """

    def __init__(self, log_time: float | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.goal = None if log_time is None else _place(log_time)
        columns = [TextColumn("{task.description}"), TimeElapsedColumn()]
        if self.goal is not None:
            columns.insert(0, BarColumn(bar_width=10))
        self.progress = Progress(*columns, console=Console(file=sys.stderr))
        self.task = self.progress.add_task("", total=self.goal)
        self.shown = -math.inf
        self.progress.start()

    def show(self, state: State, record: Mapping[str, Any]) -> None:
        """Show where the flow stands, ten times a second at most."""
        if (now := time.monotonic()) < self.shown + _EVERY:
            return
        self.shown = now
        log_time = state.log_time
        self.progress.update(
            self.task,
            completed=max(0.0, _place(log_time)),
            description=(
                f"ln t {log_time:.4g}  ρ {record['norm_product']:.4g}  "
                f"γ̂_m {record['normalized_margin']:.4g}  {state.method}"
            ),
        )

    def stop(self) -> None:
        """Stop drawing."""
        self.progress.stop()


def _place(log_time: float) -> float:
    return math.log1p(max(0.0, log_time + 3)) if math.isfinite(log_time) else 0.0
