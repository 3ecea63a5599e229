"""Where a gradient flow stops, and where on the way it is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from marginflow._checks import real
from marginflow.errors import InputError
from marginflow.flow import Goal
from marginflow.workflow._flow_result import Reason

_PER_DECADE = 10
_EARLY = (-3.0, -2.0, -1.0, 0.0, 1.0)


class Goals:
    """Where to stop."""

    def __init__(
        self, log_time: float | None, log_norm: float | None, loss_below: float | None
    ) -> None:
        if log_time is None and log_norm is None and loss_below is None:
            log_time = 1000.0
        self.log_time = None if log_time is None else real("log_time", log_time)
        self.log_norm = None if log_norm is None else real("log_norm", log_norm)
        self.loss_below = None if loss_below is None else real("loss_below", loss_below, above=0.0)
        if self.loss_below is not None and self.loss_below >= 1:
            raise InputError(
                f"loss_below: expected a number in (0, 1), got {loss_below!r}; for losses below "
                "1e-300 use log_time, which is about ln(1/L)"
            )

    def functions(self) -> dict[Reason, Goal]:
        """Each goal as a function that is ≥ 0 once it is reached, in units of ln t."""
        found: dict[Reason, Goal] = {}
        if (last := self.log_time) is not None:
            found["log_time"] = lambda w, log_time, log_loss: log_time - last
        if (norm := self.log_norm) is not None:
            # Late in the flow ln t moves by ln t per unit of ln‖W‖.
            found["log_norm"] = lambda w, log_time, log_loss: (
                (math.log(float(np.linalg.norm(w))) - norm)
                * max(1.0, log_time if math.isfinite(log_time) else 1.0)
            )
        if (below := self.loss_below) is not None:
            found["loss_below"] = lambda w, log_time, log_loss: math.log(below) - log_loss
        return found


def points_ahead(planned: Sequence[float] | None, done: float) -> Iterator[float]:
    """The values of ln t beyond ``done`` at which to measure; by default about 80 up to 10⁶."""
    ahead = 1e-6 * max(1.0, abs(done)) if math.isfinite(done) else 0.0
    if planned is None:
        decades = (10 ** (k / _PER_DECADE) for k in itertools.count(1))
        points: Iterator[float] = itertools.chain(_EARLY, decades)
    else:
        points = itertools.chain(planned, [math.inf])
    return itertools.dropwhile(lambda point: point <= done + ahead, points)
