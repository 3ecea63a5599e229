"""The measurements of runs as one table, and the table as CSV or Parquet.

Source: marginflow.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from marginflow._checks import optional
from marginflow.errors import RunError
from marginflow.runs._metrics import Metrics, kind_of
from marginflow.runs._run import Run

Table = Mapping[str, Sequence[Any]]
"""Columns of one length; None is a missing value."""


def table_of(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """One row a measurement, with the columns of :meth:`Metrics.columns`.

    Several runs lie below each other, and a column ``run`` names them: by the directory's name, or by
    its path where two have the same name.

    Args:
        runs: the runs.

    Raises:
        RunError: no run has a measurement.
    """
    if not any(run.metrics for run in runs):
        names = ", ".join(repr(run.name) for run in runs)
        raise RunError(f"there is nothing to export: no measurements in {names}")
    if len(runs) == 1:
        return runs[0].metrics.columns()
    count = Counter(run.name for run in runs)
    # Layers may differ from run to run, so that lists become columns before the runs are joined.
    rows = Metrics(
        {"run": str(run.path) if run.path and count[run.name] > 1 else run.name} | row
        for run in runs
        for row in run.metrics.flat()
    )
    return rows.columns()


def csv_of(table: Table) -> str:
    """CSV with a head line; numbers are written so that they read back to the last bit.

    Args:
        table: columns by name, as :func:`table_of` gives them.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))  # None becomes an empty field
    return text.getvalue()


def parquet_of(table: Table) -> bytes:
    """A Parquet file: int64, double, bool and string columns, with nulls.

    Args:
        table: columns by name, as :func:`table_of` gives them.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    pa = optional("pyarrow", "pyarrow", "a Parquet file", "parquet")
    parquet = optional("pyarrow.parquet", "pyarrow", "a Parquet file", "parquet")
    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    columns = [pa.array(values, types[kind_of(values)]) for values in table.values()]
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_arrays(columns, names=list(table)), sink)
    return bytes(sink.getvalue().to_pybytes())
