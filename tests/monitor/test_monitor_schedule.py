"""Which steps of a loop are measured."""

from __future__ import annotations

import pytest

from marginflow.monitor._schedule import Due
from marginflow.training import latest_point, log_spaced


def test_log_schedule_is_the_grid() -> None:
    """Counting every step is measured on the grid; strides hit each point that they leap over."""
    due = Due("log")
    assert [s for s in range(1001) if due(s)] == sorted(
        {p for p in log_spaced(1001, 10) if p <= 1000}
    )
    naive = {round(10 ** (j / 10)) for j in range(60)}
    for stride in (1, 7, 100):
        due, before, seen = Due("log"), -1, []
        for step in range(0, 3000, stride):
            if due(step):
                seen.append(step)
            else:
                assert not any(before < p <= step for p in naive)
            before = step
        assert len(seen) > 5
    assert Due("log")(5)  # the first is always due
    again = Due("log")
    assert [again(s) for s in (100, 101, 3, 4)] == [True, False, True, True]


@pytest.mark.parametrize("step", [1, 2, 9, 10, 11, 99, 100, 101, 12345])
def test_latest_point(step: int) -> None:
    assert latest_point(step) == max(p for p in log_spaced(10**6) if p <= step)
