from __future__ import annotations

from itertools import pairwise

import pytest

from marginflow.errors import InputError
from marginflow.training import log_spaced


def test_begins_dense_and_ends_at_the_last_epoch() -> None:
    points = sorted(log_spaced(10_000))
    assert points[:11] == list(range(11))
    assert points[-1] == 10_000
    assert len(points) == 86  # the number that the docstring promises
    ratios = [b / a for a, b in pairwise(points[40:])]
    assert max(ratios) < 10 ** (1 / 25) * 1.02
    assert min(ratios[:-1]) > 10 ** (1 / 25) * 0.98


@pytest.mark.parametrize("last", [0, 1, 2, 7, 60, 61, 1000])
def test_a_longer_run_is_measured_where_the_shorter_one_was(last: int) -> None:
    assert log_spaced(last) - {last} <= log_spaced(10 * last + 10)


def test_refuses_nonsense() -> None:
    with pytest.raises(InputError, match="at least 0"):
        log_spaced(-1)
    with pytest.raises(InputError, match="at least 1"):
        log_spaced(10, per_decade=0)
