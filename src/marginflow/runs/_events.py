"""TensorBoard: the measurements as scalars of event files, written without a thread."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marginflow._checks import optional
from marginflow.runs._files import own_folder
from marginflow.runs._metrics import layer_names, numbers_in

EVENTS = "tensorboard"
"""The folder of a run directory that TensorBoard reads."""

_PURPOSE = "log 'tensorboard'"


class TensorBoardSink:
    """Event files in ``RUN/tensorboard``, single precision as TensorBoard has it.

    Each process that works on the run adds a file. A file begins with the step from which on those
    before it no longer count, so that what a crash cut off a run is not shown twice.

    torch's ``SummaryWriter`` is not used: it hands its events to a thread, and once a full disk has
    stopped that thread, waiting for it never ends.

    Args:
        directory: the run directory.
        config: the content of ``run.json``.
        records: the measurements that the run has already.

    Raises:
        OSError: the disk refuses.
        MissingDependencyError: tensorboard is not installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any],
        records: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        folder = own_folder(Path(directory) / EVENTS, make=True)
        self._layers = layer_names(config)
        self._event = _module("tensorboard.compat.proto.event_pb2")
        self._summary = _module("tensorboard.compat.proto.summary_pb2")
        written = _module("tensorboard.summary.writer.record_writer")
        before = sorted(folder.glob("events.out.tfevents.*"))
        first = records[-1]["step"] + 1 if records else 0
        self._there = _points(folder, below=first) if before else set()
        self._file = open(_new_file(folder, before), "xb")  # noqa: SIM115
        self._writer = written.RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if before:
            log = self._event.SessionLog(status=self._event.SessionLog.START)
            self._add(step=first, session_log=log)
        self._file.flush()

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the numbers of ``records`` at their steps, at once to be seen."""
        try:
            self._write(records)
            self._file.flush()
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            step = int(record["step"])
            values = [
                self._summary.Summary.Value(tag=name, simple_value=value)
                for name, value in numbers_in(record, self._layers).items()
                if (name, step) not in self._there
            ]
            if values:
                self._add(step=step, summary=self._summary.Summary(value=values))

    def _add(self, **content: Any) -> None:
        event = self._event.Event(wall_time=time.time(), **content)
        self._writer.write(event.SerializeToString())


def _module(name: str) -> Any:
    return optional(name, "tensorboard", _PURPOSE, "tensorboard")


def _points(folder: Path, *, below: int) -> set[tuple[str, int]]:
    """The points that TensorBoard shows, of steps before ``below``."""
    reading = _module("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(folder), size_guidance={reading.SCALARS: 0})
    found.Reload()
    tags = found.Tags()[reading.SCALARS]
    points = {(tag, int(event.step)) for tag in tags for event in found.Scalars(tag)}
    return {point for point in points if point[1] < below}


def _new_file(folder: Path, before: Sequence[Path]) -> Path:
    """A name that sorts behind those ``before``: TensorBoard reads files in the order of their names."""
    stamp = int(time.time())
    for path in before:
        with contextlib.suppress(ValueError, IndexError):
            stamp = max(stamp, int(path.name.split(".")[3]) + 1)
    return folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
