"""Drawn figures as files: SVG, PNG, PDF.

Source: marginflow.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from marginflow.errors import InputError, StorageError
from marginflow.experiments import FigureData
from marginflow.report._draw import draw, own_settings
from marginflow.runs import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "png", "svg")
_SUFFIXES = {f".{form}": form for form in FORMATS}


def save_figure(figure: Figure | FigureData, path: str | os.PathLike[str]) -> Path:
    """Write ``figure`` as SVG, PNG or PDF, by the suffix of ``path``; the folder is made if needed.

    The same figure gives the same bytes. Text in SVG is drawn as paths, so it looks the
    same everywhere.

    Args:
        figure: a drawn figure, or the data of one, which is then drawn in light colours.
        path: where to write it.

    Raises:
        InputError: another suffix, or data that :func:`draw` refuses.
        StorageError: the file system refuses; an old file is then untouched.
    """
    path = Path(path)
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"{str(path)!r}: expected a file name that ends in {', '.join(sorted(_SUFFIXES))}"
        )
    content = rendered(draw(figure) if isinstance(figure, FigureData) else figure, kind)
    make_folder(path.parent)
    write_atomically(path, content)
    return path


def rendered(figure: Figure, kind: str) -> bytes:
    """``figure`` in the format ``svg``, ``png`` or ``pdf``, without the date of drawing."""
    dates: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with own_settings():
        figure.savefig(
            buffer,
            format=kind,
            dpi=200,
            metadata=dates.get(kind),
            facecolor=figure.get_facecolor(),
        )
    return buffer.getvalue()


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents.

    Raises:
        StorageError: the file system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error
