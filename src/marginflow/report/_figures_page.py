"""All reproduced figures on one page, each with its claims judged.

Source: marginflow.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import marginflow
from marginflow.errors import InputError
from marginflow.experiments import FigureData
from marginflow.report._draw import draw
from marginflow.report._html import environment
from marginflow.report._save import make_folder, rendered
from marginflow.report._svg import describe, inline_svg, style_variables
from marginflow.report._theme import theme_named
from marginflow.runs import write_atomically

_PANEL_INCHES = 3.6  # as in the report
_SCALES = {
    "demo": "the bundled digits, 8 × 8 pixels: analogues of the paper's figures, in minutes",
    "mnist": "the paper's data and networks, fewer epochs",
    "paper": "the paper's data, networks and epochs",
}


def write_figures(
    figures: Sequence[tuple[FigureData, float]],
    path: str | os.PathLike[str],
    *,
    scale: str,
    command: str,
) -> Path:
    """Write one self-contained page of figures: statement, panels, verdicts, settings of each.

    Args:
        figures: each figure with the seconds that its trainings took.
        path: the HTML file; its folder is made if needed.
        scale: ``demo``, ``mnist`` or ``paper``.
        command: the command line that makes the page again.

    Raises:
        InputError: no figures, or a path that does not end in ``.html``.
        StorageError: the file system refuses; an old page is then untouched.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{str(path)!r}: expected a file name that ends in .html")
    if not figures:
        raise InputError("figures: expected at least one, got none")
    page = (
        environment()
        .get_template("figures.html.j2")
        .render(
            title="Figures of Lyu & Zhu (ICLR 2022), and more",
            scale=f"--scale {scale}: {_SCALES.get(scale, scale)}",
            figures=[_figure(figure, seconds) for figure, seconds in figures],
            command=command,
            palette=len(theme_named("light").palette),
            light=style_variables("light"),
            dark=style_variables("dark"),
            marginflow_version=marginflow.__version__,
        )
    )
    make_folder(path.parent)
    write_atomically(path, page)
    return path


def _figure(figure: FigureData, seconds: float) -> dict[str, object]:
    panels = []
    for k, panel in enumerate(figure.panels):
        alone = dataclasses.replace(panel, title="")
        drawn = draw(FigureData(figure.name, "", "", (alone,)), width_inches=_PANEL_INCHES)
        svg = inline_svg(rendered(drawn, "svg"), f"{figure.name}-{k}", describe(panel))
        panels.append({"title": panel.title, "svg": svg})
    return {
        "name": figure.name,
        "title": figure.title,
        "statement": figure.statement,
        "panels": panels,
        "verdicts": figure.verdicts,
        "outcomes": ", ".join(
            f"{count} {outcome}"
            for outcome, count in Counter(v.outcome for v in figure.verdicts).items()
        ),
        "notes": figure.notes,
        "minutes": f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s",
    }
