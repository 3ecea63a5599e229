"""Curves and panels out of the measurements of runs: what the panels of all kinds of runs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginflow.experiments import Curve, Panel, Scale
from marginflow.report._clock import Clock
from marginflow.report._text import number, run_names
from marginflow.runs import Run

MOST_BANDS = 3
"""Runs whose bands are drawn; more of them would only cover each other."""

Value = Callable[[Mapping[str, Any]], float | None]
"""The number of a measurement that a curve shows."""

_CROWDED = 20.0  # epochs, or ln t, from which on the early ones need room


@dataclass(frozen=True)
class Captioned:
    """A panel, and what is said under it."""

    panel: Panel
    caption: str


def panel_of(
    clock: Clock,
    title: str,
    ylabel: str,
    curves: Sequence[Curve | None],
    yscale: Scale = "linear",
    *,
    late: bool = False,
) -> Panel:
    """A panel against ``clock``; curves that are None are left out.

    Args:
        clock: the x-axis.
        title: of the panel.
        ylabel: of its y-axis.
        curves: its curves.
        yscale: scale of the y-axis.
        late: there are points after ln t = 1 only.
    """
    # Margins grow like ln t: late epochs are many and alike, and a flow goes on to ln t = 10⁶.
    # Below 20 there is no crowd yet.
    xscale: Scale = "linear"
    if clock.last > _CROWDED:
        xscale = "log" if late else "symlog"
    return Panel(
        title=title,
        xlabel=clock.label,
        ylabel=ylabel,
        curves=tuple(curve for curve in curves if curve is not None),
        xscale=xscale,
        yscale=yscale,
        xthreshold=1.0 if clock.logarithmic and xscale == "symlog" else None,
    )


def curve_of(
    clock: Clock,
    run: Run,
    label: str,
    value: Value,
    color: int,
    *,
    band: tuple[Value, Value] | None = None,
    dashed: bool = False,
    since: float | None = None,
) -> Curve | None:
    """The curve of ``value`` over the run's measurements; None if there is no number at all.

    Args:
        clock: the x-axis; measurements without a place on it are left out.
        run: the run.
        label: in the legend.
        value: what is drawn.
        color: index into the palette.
        band: the lower and the upper end of a band around it.
        dashed: drawn dashed.
        since: earlier measurements are left out.
    """
    records = [
        (x, record)
        for record in run.metrics
        if (x := clock.at(record)) is not None and (since is None or x >= since)
    ]
    y = [value(record) for _, record in records]
    if all(v is None for v in y):
        return None
    low, high = ([of(record) for _, record in records] for of in band) if band else ((), ())
    return Curve(label, [x for x, _ in records], y, low, high, color=color, dashed=dashed)


def value_of(key: str, factor: float = 1.0) -> Value:
    """The number at ``key``, times ``factor``."""

    def value(record: Mapping[str, Any]) -> float | None:
        found = number(record, key)
        return None if found is None else found * factor

    return value


def entry_of(key: str, k: int, factor: float = 1.0, digits: int | None = None) -> Value:
    """Entry k of the list at ``key``, times ``factor``, rounded where ``digits`` (decimals) are given."""

    def value(record: Mapping[str, Any]) -> float | None:
        entries = record.get(key)
        if not isinstance(entries, list) or len(entries) <= k:
            return None
        found = number({key: entries[k]}, key)
        if found is None:
            return None
        return found * factor if digits is None else round(found * factor, digits)

    return value


def pairs(runs: Sequence[Run], solid: str, dashed: str) -> list[tuple[str, str]]:
    """The labels of a solid and a dashed curve of each run."""
    names = run_names(runs)
    if len(runs) == 1:
        return [(solid, dashed)]
    if len(runs) == 2:
        return [(f"{name}, {solid}", f"{name}, {dashed}") for name in names]
    # The legend of many runs names each once; the caption tells solid from dashed.
    return [(name, "") for name in names]


def close_to_zero(curves: Sequence[Curve]) -> list[Curve]:
    """The late parts of those curves that end as a flat line at zero on the common axis.

    A late part begins where the curve comes, for good, to within three times the size that it
    has in the last half of its epochs, or of its ln t.
    """
    sizes = [abs(v) for c in curves for part in (c.y, c.low, c.high) for v in part if v is not None]
    late = []
    for curve in curves:
        points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
        last = points[-1][0]
        tail = max(abs(y) for x, y in points if x >= last - abs(last) / 2)
        far = [k for k, (_, y) in enumerate(points) if abs(y) > 3 * tail]
        points = points[far[-1] + 1 if far else 0 :]
        if 0 < tail < max(sizes) / 20 and len(points) >= 3:
            x, y = zip(*points, strict=True)
            late.append(Curve(curve.label, x, y, color=curve.color))
    return late
