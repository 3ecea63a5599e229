"""A matrix of numbers on coloured cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from marginflow.errors import InputError
from marginflow.experiments import Matrix
from marginflow.report._axes import label_text
from marginflow.report._theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEEPEST = 0.55  # opacity of the largest number's ground: the ink stays legible on it


def check_matrix(matrix: Matrix) -> None:
    """Refuse a matrix whose parts do not fit.

    Raises:
        InputError: no cells, or rows of other lengths than the columns.
    """
    if not matrix.rows or not matrix.columns:
        raise InputError(f"the matrix {matrix.title!r} has no cells to draw")
    lengths = {len(row) for row in matrix.values}
    if lengths != {len(matrix.columns)} or len(matrix.values) != len(matrix.rows):
        raise InputError(
            f"the matrix {matrix.title!r}: expected {len(matrix.rows)} rows of {len(matrix.columns)} "
            f"numbers, got {len(matrix.values)} of {sorted(lengths)}"
        )


def draw_matrix(axes: Axes, matrix: Matrix, title: str, colors: Theme) -> None:
    """Draw ``matrix``: each column's largest number in bold, the ground by rank within the column."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    rows, columns = len(matrix.rows), len(matrix.columns)
    for j in range(columns):
        column = [row[j] for row in matrix.values]
        known = sorted(v for v in column if math.isfinite(v))
        for i, value in enumerate(column):
            rank = known.index(value) / max(1, len(known) - 1) if math.isfinite(value) else 0.0
            ground = to_rgba(colors.palette[0], _DEEPEST * rank)
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=ground, edgecolor=colors.paper))
            best = bool(known) and value == known[-1]
            text = _cell(value, matrix.decimals) if math.isfinite(value) else "–"
            axes.text(
                j + 0.5,
                i + 0.5,
                text.replace("-", "−"),
                ha="center",
                va="center",
                fontweight="bold" if best else "normal",
            )
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks(
        [j + 0.5 for j in range(columns)], labels=[label_text(c) for c in matrix.columns]
    )
    axes.set_yticks([i + 0.5 for i in range(rows)], labels=[label_text(r) for r in matrix.rows])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(title)
    axes.set_xlabel(label_text(matrix.xlabel))
    axes.set_ylabel(label_text(matrix.ylabel))


def _cell(value: float, decimals: int) -> str:
    """Three digits before the point leave no room for more behind it."""
    return f"{value:,.{decimals if abs(value) < 100 else 0}f}"


def describe_matrix(matrix: Matrix) -> str:
    """The matrix in words, row by row."""
    parts = [f"{matrix.title}. Table of {matrix.ylabel} (rows) by {matrix.xlabel} (columns)."]
    for name, row in zip(matrix.rows, matrix.values, strict=True):
        cells = ", ".join(
            f"{column} {value:,.{matrix.decimals}f}"
            for column, value in zip(matrix.columns, row, strict=True)
        )
        parts.append(f"{name}: {cells}.")
    return " ".join(parts)
