"""``marginflow export``: the measurements of runs as a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def export(
    runs: Annotated[list[Path], typer.Argument(help="One or more run directories.")],
    csv: Annotated[
        Path | None, typer.Option("--csv", help="CSV file; - writes it to standard output.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option("--parquet", help="Parquet file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write measurements as a table: a row a measurement, a column a number.

    Lists become several columns, named by layer (layer_norms/linear1.weight) or level
    (normalized_margin_quantiles/0.05). Of several runs a column run gives the name.
    """
    from marginflow.errors import InputError
    from marginflow.runs import csv_of, load_run, parquet_of, table_of, write_atomically

    out = csv if parquet is None else parquet
    if out is None or (csv is not None and parquet is not None):
        raise InputError("export: expected one of --csv FILE and --parquet FILE")
    if str(out) == "-" and parquet is not None:
        raise InputError("--parquet: expected a file, got -; only --csv writes to standard output")
    if out.is_dir():
        raise InputError(
            f"export: expected a file to write, got the folder {str(out)!r}; name one in it"
        )
    if str(out) != "-" and out.exists() and not force:
        raise InputError(f"{str(out)!r} exists; replace it with --force, or choose another name")
    table = table_of([load_run(run) for run in runs])
    content = csv_of(table) if parquet is None else parquet_of(table)
    if str(out) == "-":
        sys.stdout.write(str(content))
        return
    write_atomically(out, content)
    rows = len(next(iter(table.values())))
    print(f"{rows} measurements, {len(table)} columns, in {out}")
