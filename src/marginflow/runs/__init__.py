"""Runs on disk: configuration, metrics, checkpoints, each either whole or absent."""

from marginflow.runs._directory import FORMAT_VERSION, Checkpoint, RunDirectory
from marginflow.runs._files import alone_in, storing, write_atomically
from marginflow.runs._provenance import provenance
from marginflow.runs._run import Run, load_run

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "Run",
    "RunDirectory",
    "alone_in",
    "load_run",
    "provenance",
    "storing",
    "write_atomically",
]
