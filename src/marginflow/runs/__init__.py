"""Runs on disk: configuration, metrics, checkpoints, each either whole or absent."""

from marginflow.runs._compare import Difference, compare_records, compare_weights
from marginflow.runs._directory import FORMAT_VERSION, Checkpoint, RunDirectory
from marginflow.runs._export import csv_of, parquet_of, table_of
from marginflow.runs._files import (
    FolderLock,
    alone_in,
    append_durably,
    lock_folder,
    own_folder,
    put_aside,
    remove_if_left,
    storing,
    write_atomically,
)
from marginflow.runs._metrics import QUANTILES, Metrics, layer_names
from marginflow.runs._provenance import provenance, weights_digest
from marginflow.runs._run import Run, load_run
from marginflow.runs._sinks import SINKS, Log, Sink, Sinks, check_sinks, open_sinks, sinks_of

__all__ = [
    "FORMAT_VERSION",
    "QUANTILES",
    "SINKS",
    "Checkpoint",
    "Difference",
    "FolderLock",
    "Log",
    "Metrics",
    "Run",
    "RunDirectory",
    "Sink",
    "Sinks",
    "alone_in",
    "append_durably",
    "check_sinks",
    "compare_records",
    "compare_weights",
    "csv_of",
    "layer_names",
    "load_run",
    "lock_folder",
    "open_sinks",
    "own_folder",
    "parquet_of",
    "provenance",
    "put_aside",
    "remove_if_left",
    "sinks_of",
    "storing",
    "table_of",
    "weights_digest",
    "write_atomically",
]
