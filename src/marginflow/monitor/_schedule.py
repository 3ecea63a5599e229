"""Which of a loop's steps are measured."""

from __future__ import annotations

from collections.abc import Collection

from marginflow._checks import choice
from marginflow.errors import InputError
from marginflow.training import latest_point

PER_DECADE = 10
"""Points of ``log`` in a decade: a measurement costs as much as an epoch of one-step training."""

Schedule = str | Collection[int]
"""``log``, ``every``, or the steps themselves."""


class Due:
    """Says of each step in turn whether it is due.

    ``log`` is a grid like that of :func:`marginflow.training.log_spaced`, and a step is due if it has
    reached a point of the grid since the step before: whoever counts in strides misses no more than a
    stride leaps over. A step that is not above the one before (a loop that begins again) is always due.

    Args:
        schedule: ``log``, ``every``, or a collection of steps.
        per_decade: points of ``log`` in a decade.

    Raises:
        InputError: something else.
    """

    def __init__(self, schedule: Schedule, per_decade: int = PER_DECADE) -> None:
        self.every = False
        self.per_decade = per_decade
        self.steps: frozenset[int] | None = None
        self.before: int | None = None
        if isinstance(schedule, str):
            self.every = choice("schedule", schedule, ("every", "log")) == "every"
        else:
            try:
                self.steps = frozenset(int(step) for step in schedule)
            except (TypeError, ValueError):
                raise InputError(
                    f"schedule: expected 'log', 'every' or steps, got {schedule!r}"
                ) from None

    def __call__(self, step: int) -> bool:
        """Whether ``step`` is due, given the steps asked about before."""
        before, self.before = self.before, step
        if self.every:
            return True
        if self.steps is not None:
            return step in self.steps
        if before is None or step <= before:
            return True
        return latest_point(step, self.per_decade) > before
