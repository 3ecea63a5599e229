"""Curves and panels of trainings: one line a training, a band from the least to the largest seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from marginflow.experiments._experiment import Trained
from marginflow.experiments._figure import Curve, Panel
from marginflow.runs import QUANTILES

Records = Sequence[Mapping[str, Any]]

MARGIN = "normalized_margin"
ACCURACY = "adversarial_accuracy"
UPPER = "upper_quartile_of_normalized_margins"
"""Read off the recorded quantiles."""

_UPPER = QUANTILES.index(0.75)


def along_epochs(
    label: str,
    trained: Sequence[Trained],
    key: str,
    *,
    attack: str | None = None,
    color: int = 0,
    dashed: bool = False,
    factor: float = 1.0,
    between: tuple[float, float] = (0, float("inf")),
) -> Curve:
    """The measured number ``key`` against the epoch: the mean of the seeds, and their range.

    Args:
        label: in the legend.
        trained: the same training for every seed.
        key: of the measurements.
        attack: the perturbation of the measurements; None is the training's own.
        color: as for :class:`Curve`.
        dashed: as for :class:`Curve`.
        factor: what the number is multiplied with.
        between: the first and the last epoch that are shown.
    """
    paths = [path_of(t.records(attack), key) for t in trained]
    common = sorted(set.intersection(*(set(path) for path in paths)))
    epochs = [e for e in common if between[0] <= e <= between[1]]
    columns = [[path[e] * factor for path in paths] for e in epochs]
    return banded(label, epochs, columns, color=color, dashed=dashed)


def banded(
    label: str,
    x: Sequence[float],
    columns: Sequence[Sequence[float]],
    *,
    color: int = 0,
    dashed: bool = False,
) -> Curve:
    """A curve from one column of numbers a point, one number a seed."""
    several = bool(columns) and len(columns[0]) > 1
    return Curve(
        label,
        list(x),
        [sum(column) / len(column) for column in columns],
        [min(column) for column in columns] if several else (),
        [max(column) for column in columns] if several else (),
        color=color,
        dashed=dashed,
    )


def path_of(records: Records, key: str) -> dict[float, float]:
    """The finite numbers ``key`` by their epoch."""
    if key == UPPER:
        return {
            float(record["epoch"]): float(record["normalized_margin_quantiles"][_UPPER])
            for record in records
        }
    return {
        float(record["epoch"]): float(record[key])
        for record in records
        if record.get(key) is not None
    }


def epoch_panel(title: str, ylabel: str, curves: Sequence[Curve], *, late: bool = False) -> Panel:
    """A panel against the epoch, logarithmic from epoch 1 on (or altogether, without epoch 0)."""
    shown = [curve for curve in curves if len(curve.x)]
    return Panel(title, "epoch", ylabel, shown, xscale="log" if late else "symlog")


def margin_panel(title: str, curves: Sequence[Curve], *, late: bool = False) -> Panel:
    """A panel of γ̂_m, in units of 10⁻³."""
    return epoch_panel(title, "γ̂_m (×10⁻³)", in_thousandths(curves), late=late)


def in_thousandths(curves: Sequence[Curve]) -> list[Curve]:
    """Normalised margins in units of 10⁻³, their order of magnitude in deep networks."""

    def scaled(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else 1000 * value for value in values]

    return [
        dataclasses.replace(c, y=scaled(c.y), low=scaled(c.low), high=scaled(c.high))
        for c in curves
    ]


def accuracy_panel(title: str, curves: Sequence[Curve]) -> Panel:
    """A panel of accuracies in percent."""
    return epoch_panel(title, "correct (%)", curves)


def until(records: Records, last: float) -> Records:
    """The measurements up to the epoch ``last``."""
    return [record for record in records if record["epoch"] <= last]
