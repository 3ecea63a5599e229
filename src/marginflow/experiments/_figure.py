"""Figures as data: what an experiment returns and what ``report/`` draws.

Source: marginflow; the figures are those of the paper and of marginflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from marginflow.theorems import Verdict

Scale = Literal["linear", "log", "symlog"]
"""How an axis is divided."""


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        label: its name in the legend.
        x, y: its points, in the units of the panel's labels; a y of None is a gap.
        low, high: a band around it (quantiles, seeds), in the units of y, or empty.
        color: index into the palette; curves that belong together share it.
        dashed: drawn dashed, the second of a pair.
        measured: False for a prediction, drawn thin and grey, without marks.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    color: int = 0
    dashed: bool = False
    measured: bool = True


@dataclass(frozen=True)
class Panel:
    """One set of axes. Labels carry the unit.

    Attributes:
        title: what the panel shows.
        xlabel, ylabel: the axes, with their units.
        curves: the lines, in drawing order.
        xscale, yscale: the axes' scales.
        xthreshold: where a symlog x-axis turns linear, in the units of x; None finds a place by its
            values.
    """

    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    xscale: Scale = "linear"
    yscale: Scale = "linear"
    xthreshold: float | None = None


@dataclass(frozen=True)
class Matrix:
    """A table of numbers on a coloured ground, the larger the deeper.

    Attributes:
        title: what the numbers are, with their unit.
        xlabel, ylabel: what the columns and the rows are.
        columns, rows: their names.
        values: one row each, in the unit that the title names.
        decimals: of every number; none is drawn from 100 on.
    """

    title: str
    xlabel: str
    ylabel: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]
    decimals: int = 1


@dataclass(frozen=True)
class FigureData:
    """A figure before it is drawn.

    Attributes:
        name: short name, used for files.
        title: what it shows.
        statement: the answer in one sentence, with its numbers.
        panels: the axes, in reading order.
        notes: caption lines: settings, n, seeds, caveats.
        verdicts: what is claimed of the figure, each claim judged.
    """

    name: str
    title: str
    statement: str
    panels: Sequence[Panel | Matrix]
    notes: Sequence[str] = field(default=())
    verdicts: Sequence[Verdict] = field(default=())
