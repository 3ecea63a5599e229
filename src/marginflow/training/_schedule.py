"""When to measure: logarithmically spaced epochs, because margins grow like ln t.

Source: marginflow.
"""

from __future__ import annotations

import math

from marginflow._checks import whole


def log_spaced(last: int, per_decade: int = 25) -> frozenset[int]:
    """Epochs 0, 1, 2, … then ``per_decade`` points a decade, and ``last``.

    The grid ``round(10^{j/per_decade})`` does not depend on ``last``, so a run that is
    prolonged later was measured at the right epochs all along. 10 000 epochs make
    86 points at the default density.

    Args:
        last: the last epoch, ≥ 0.
        per_decade: points in a decade, ≥ 1.

    Raises:
        InputError: last < 0 or per_decade < 1.
    """
    whole("last", last, least=0)
    whole("per_decade", per_decade, least=1)
    points = {0, last}
    j = 0
    while (point := _point(j, per_decade)) < last:
        points.add(point)
        j += 1
    return frozenset(points)


def latest_point(step: int, per_decade: int = 25) -> int:
    """The last point of the grid of :func:`log_spaced` that is not above ``step`` ≥ 0.

    Args:
        step: ≥ 0.
        per_decade: points in a decade.
    """
    if step < 1:
        return 0
    j = math.floor(per_decade * math.log10(step))
    # Points are rounded: the next one may lie half a step lower than its power.
    while _point(j + 1, per_decade) <= step:
        j += 1
    while _point(j, per_decade) > step:
        j -= 1
    return _point(j, per_decade)


def _point(j: int, per_decade: int) -> int:
    return round(10 ** (j / per_decade))
