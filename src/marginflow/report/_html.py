"""The report: one HTML file that needs no network, no script and no other file.

Source: marginflow.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import marginflow
from marginflow.errors import InputError
from marginflow.experiments import FigureData
from marginflow.report._bounds import bounds_section
from marginflow.report._certificate import certificate_section
from marginflow.report._clock import is_flow
from marginflow.report._command import reproduction
from marginflow.report._curves import captioned_panels
from marginflow.report._draw import draw
from marginflow.report._panels import Captioned
from marginflow.report._save import make_folder, rendered
from marginflow.report._settings import settings_table, versions_table
from marginflow.report._statement import (
    caveats,
    default_title,
    question,
    remarks,
    setting,
    statement,
)
from marginflow.report._svg import describe, formula, inline_svg, style_variables, symbols
from marginflow.report._tables import course_tables, final_table, layer_tables
from marginflow.report._text import check_runs, run_names
from marginflow.report._theme import theme_named
from marginflow.report._verdicts import outcomes_table, theories
from marginflow.runs import Run, write_atomically

if TYPE_CHECKING:
    from jinja2 import Environment

_PANEL_INCHES = 3.6  # its letters are then about 11 pixels high on a phone, 12 on a desk


def write_report(
    runs: Sequence[Run], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Write the page of one run, or of several beside each other.

    Contents: the question and the answer in one sentence, the final numbers, the figures of
    :func:`comparison`, the verdicts of ``marginflow verify`` where a run has them, the way there,
    the layers, the certificates and bounds that lie in the run directories, the settings, the command lines
    that train the runs again, and the versions. Everything lies in the one file, in light and
    dark colours and for paper; strings from the runs are escaped. The same runs give the same bytes.

    Args:
        runs: measured runs, in the order of their colours.
        path: the HTML file; its folder is made if needed.
        title: the page's title; by default the names of the runs.

    Returns:
        the path of the page.

    Raises:
        InputError: no runs, or a path that does not end in ``.html``.
        RunError: a run without measurements. (A damaged certificate is said on the page.)
        StorageError: the file system refuses; an old page is then untouched.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{str(path)!r}: expected a file name that ends in .html")
    page = _page(runs, title)
    make_folder(path.parent)
    write_atomically(path, page)
    return path


def environment() -> Environment:
    """The templates, escaping everything."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("marginflow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"symbols": symbols, "formula": formula}
    return found


def _page(runs: Sequence[Run], title: str | None) -> str:
    check_runs(runs)
    names = run_names(runs)
    certificate, damaged = certificate_section(runs)
    bounds, without = bounds_section(runs)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=default_title(runs) if title is None else title,
            question=question(runs),
            answer=statement(runs),
            caveats=[*caveats(runs), *damaged, *without],
            final=final_table(runs),
            figures=_figures(runs),
            theories=theories(runs),
            outcomes=outcomes_table(runs),
            courses=course_tables(runs),
            course_title=_course_title(runs),
            remarks=remarks(runs),
            flows=any(map(is_flow, runs)),
            layers=layer_tables(runs),
            certificate=certificate,
            residuals=certificate and captioned_figure(certificate.curves, "r"),
            bounds=bounds,
            accuracies=bounds and bounds.curves and captioned_figure(bounds.curves, "b"),
            settings=settings_table(runs),
            commands=[(name, *reproduction(run)) for run, name in zip(runs, names, strict=True)],
            versions=versions_table(runs),
            palette=len(theme_named("light").palette),
            light=style_variables("light"),
            dark=style_variables("dark"),
            marginflow_version=marginflow.__version__,
        )
    )


def _course_title(runs: Sequence[Run]) -> str:
    if not any(map(is_flow, runs)):
        return "Course of training"
    if not all(map(is_flow, runs)):
        return "Course of the runs"
    return "Course of the flow" if len(runs) == 1 else "Course of the flows"


def _figures(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Every panel as a drawing of its own: a phone shows them below each other."""
    return [
        captioned_figure(
            dataclasses.replace(part, caption=f"{part.caption} {setting(runs)}."), f"f{k}"
        )
        for k, part in enumerate(captioned_panels(runs), start=1)
    ]


def captioned_figure(part: Captioned, prefix: str) -> dict[str, str]:
    """A panel as a drawing; ``prefix`` begins the names inside it, which the page shares."""
    # The page has the title and the caption as text, where they can be read and searched.
    alone = dataclasses.replace(part.panel, title="")
    drawn = draw(FigureData("figure", "", "", (alone,)), width_inches=_PANEL_INCHES)
    svg = inline_svg(rendered(drawn, "svg"), prefix, describe(part.panel))
    return {"title": part.panel.title, "caption": part.caption, "svg": svg}
