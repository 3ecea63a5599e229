"""Where measurements go beside ``metrics.jsonl``: TensorBoard, MLflow, anything with ``write``.

Source: marginflow.
"""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from marginflow._checks import choice, optional
from marginflow.errors import InputError
from marginflow.runs._events import EVENTS, TensorBoardSink
from marginflow.runs._tracking import MlflowSink

_log = logging.getLogger("marginflow")

SINKS = ("mlflow", "tensorboard")
"""The sinks that have a name."""


@runtime_checkable
class Sink(Protocol):
    """What takes measurements as they are made.

    A sink may fail: it is then said once, and it gets no more of them; the run goes on.
    """

    def write(self, records: Sequence[Mapping[str, Any]], /) -> None:
        """Take new measurements, as ``metrics.jsonl`` has them, oldest first.

        Args:
            records: measurements, oldest first.
        """
        ...

    def close(self) -> None:
        """No more will come."""
        ...


Log = str | Sink | Iterable[str | Sink]
"""What ``log=`` takes: names of :data:`SINKS`, objects with ``write`` and ``close``, or several."""


def check_sinks(log: Log, *, out: str | os.PathLike[str] | None) -> tuple[str | Sink, ...]:
    """The sinks that ``log`` names, each known and installed; nothing is written.

    Args:
        log: names (``tensorboard``, ``mlflow``), objects with ``write`` and ``close``, or several.
        out: the run directory, or None.

    Raises:
        SpecificationError: an unknown name.
        InputError: no sink; or TensorBoard without a run directory.
        MissingDependencyError: with the exact install command.
    """
    named: list[str | Sink] = []
    several: Iterable[Any] = log if isinstance(log, Iterable) else [log]
    for sink in [log] if isinstance(log, str | Sink) else several:
        if not isinstance(sink, str | Sink) or isinstance(sink, type):
            raise InputError(
                f"log: expected {' or '.join(map(repr, SINKS))}, or an object with write and close, "
                f"got {sink!r}"
            )
        if isinstance(sink, str):
            choice("log", sink, SINKS)
        if sink not in named:
            named.append(sink)
    if "tensorboard" in named:
        if out is None:
            raise InputError("log 'tensorboard' writes into the run directory: give one with out=…")
        optional("tensorboard", "tensorboard", "log 'tensorboard'", "tensorboard")
    if "mlflow" in named:
        optional("mlflow", "mlflow", "log 'mlflow'", "mlflow")
    return tuple(named)


def sinks_of(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the sinks that the run in ``directory`` has been written to.

    Args:
        directory: the run directory.
    """
    found = {"mlflow": MlflowSink.file(directory).exists()}
    found["tensorboard"] = (Path(directory) / EVENTS).is_dir()
    return tuple(name for name, there in found.items() if there)


class Sinks:
    """The open sinks of a run. None of them can stop it: one that fails is warned of and dropped.

    Args:
        sinks: those that are written to.
    """

    def __init__(self, sinks: Iterable[tuple[str, Sink]] = ()) -> None:
        self._open = list(sinks)

    def __bool__(self) -> bool:
        return bool(self._open)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Hand new measurements to every sink.

        Args:
            records: measurements, oldest first.
        """
        if not records:
            return
        for name, sink in tuple(self._open):
            try:
                sink.write(records)
            except Exception as error:
                self._open.remove((name, sink))
                _complain(name, error)

    def close(self, error: BaseException | None = None) -> None:
        """Close every sink; closing twice does nothing.

        Args:
            error: what ended the run before its time, if anything did.
        """
        sinks, self._open = self._open, []
        for name, sink in sinks:
            try:
                if isinstance(sink, MlflowSink):
                    sink.error = error
                sink.close()
            except Exception as failure:
                _complain(name, failure)


def open_sinks(
    log: Log,
    directory: str | os.PathLike[str] | None,
    config: Mapping[str, Any],
    *,
    records: Sequence[Mapping[str, Any]] = (),
) -> Sinks:
    """Open what :func:`check_sinks` has checked, once the run directory is there.

    Sinks with a name that the run had before go on where they were: the same TensorBoard folder, the same
    MLflow run. They are given those of ``records`` that they lack, so that no point is missing
    and none is there twice. A sink that does not open is warned of and left out.

    Args:
        log: as :func:`check_sinks` gave it, or as it was given to that.
        directory: the run directory, or None.
        config: the content of ``run.json``.
        records: the measurements that a run which is resumed has already. A sink without a name does
            not get them.
    """
    opened: list[tuple[str, Sink]] = []
    for sink in check_sinks(log, out=directory):
        if not isinstance(sink, str):
            opened.append((type(sink).__name__, sink))
            continue
        try:
            made: Sink
            if directory is not None and sink == "tensorboard":
                made = TensorBoardSink(directory, config, records)
            else:
                made = MlflowSink(directory, config)
            made.write(records)
            opened.append((sink, made))
        except Exception as error:
            _complain(sink, error)
    return Sinks(opened)


def _complain(name: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()
    _log.warning(
        "log %s failed and gets no more measurements (%s: %s); the run goes on, and keeps its own",
        name,
        type(error).__name__,
        textwrap.shorten(reason[0], 200, placeholder=" …") if reason else "no message",
    )
