"""The figures of runs as files of their own, for a paper.

Source: marginflow.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from marginflow._checks import choice
from marginflow.experiments import FigureData
from marginflow.report._curves import captioned_panels
from marginflow.report._draw import draw
from marginflow.report._save import FORMATS, save_figure
from marginflow.runs import Run

_INCHES = 4.5
_WORDS = {"γ̂_m near zero": "margin near zero", "γ̂_m": "", "ρ_k": "", "ρ": "", "∇L": "gradient"}


def write_panels(
    runs: Sequence[Run], folder: str | os.PathLike[str], form: str = "pdf"
) -> list[Path]:
    """Write each panel of :func:`comparison` as a file: ``normalised-margin.pdf``, ``loss.pdf`` …

    Each is 4.5 inches wide, in light colours, with its legend and without title and caption: a
    paper has its own. The same runs give the same bytes.

    Args:
        runs: measured runs, in the order of their colours.
        folder: where to write them; made if needed.
        form: ``pdf``, ``png`` or ``svg``.

    Returns:
        the paths, in the order of the panels.

    Raises:
        InputError: no runs.
        SpecificationError: another format.
        RunError: a run without measurements.
        StorageError: the file system refuses.
    """
    choice("format", form, FORMATS)
    written = []
    for part in captioned_panels(runs):
        name = file_name(part.panel.title)
        panel = dataclasses.replace(part.panel, title="")
        drawn = draw(FigureData(name, "", "", (panel,)), width_inches=_INCHES)
        written.append(save_figure(drawn, Path(folder) / f"{name}.{form}"))
    return written


def file_name(title: str) -> str:
    """``normalised-margin`` for ``Normalised margin γ̂_m``."""
    for symbol, words in _WORDS.items():
        title = title.replace(symbol, words)
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))
