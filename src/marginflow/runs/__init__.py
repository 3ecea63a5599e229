"""Runs on disk: configuration, metrics, checkpoints, each either whole or absent."""

from marginflow.runs._directory import FORMAT_VERSION, Checkpoint, RunDirectory
from marginflow.runs._export import csv_of, parquet_of, table_of
from marginflow.runs._files import (
    alone_in,
    append_durably,
    lock_folder,
    storing,
    write_atomically,
)
from marginflow.runs._metrics import QUANTILES, Metrics, layer_names
from marginflow.runs._provenance import provenance
from marginflow.runs._run import Run, load_run
from marginflow.runs._sinks import SINKS, Log, Sink, Sinks, check_sinks, open_sinks, sinks_of

__all__ = [
    "FORMAT_VERSION",
    "QUANTILES",
    "SINKS",
    "Checkpoint",
    "Log",
    "Metrics",
    "Run",
    "RunDirectory",
    "Sink",
    "Sinks",
    "alone_in",
    "append_durably",
    "check_sinks",
    "csv_of",
    "layer_names",
    "load_run",
    "lock_folder",
    "open_sinks",
    "parquet_of",
    "provenance",
    "sinks_of",
    "storing",
    "table_of",
    "write_atomically",
]
