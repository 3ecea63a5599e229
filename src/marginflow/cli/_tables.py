"""Tables on the terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from marginflow.report import comparison_table
from marginflow.runs import Run


def print_prose(text: str) -> None:
    """Print a sentence; on a terminal its lines break between words."""
    if sys.stdout.isatty():
        text = textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)
    print(text)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, highlight=False, markup=False).print(table)


def print_runs(runs: Sequence[Run]) -> None:
    """Print what came out of ``runs``, one column each: it fits in 80 characters."""
    headers, rows = comparison_table(runs)
    print_table(
        [headers[0], *(row[0] for row in rows)],
        list(zip(*([headers[1:]] + [r[1:] for r in rows]), strict=True)),
    )
