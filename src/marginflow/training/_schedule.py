"""When to measure: logarithmically spaced epochs, because margins grow like ln t."""

from __future__ import annotations

from marginflow._checks import whole


def log_spaced(last: int, per_decade: int = 25) -> frozenset[int]:
    """Epochs 0, 1, 2, … then ``per_decade`` points a decade, and ``last``.

    The grid ``round(10^{j/per_decade})`` does not depend on ``last``, so a run that is
    prolonged later was measured at the right epochs all along. 10 000 epochs make
    86 points at the default density.

    Raises:
        InputError: last < 0 or per_decade < 1.
    """
    whole("last", last, least=0)
    whole("per_decade", per_decade, least=1)
    points = {0, last}
    j = 0
    while (point := round(10 ** (j / per_decade))) < last:
        points.add(point)
        j += 1
    return frozenset(points)
