"""The peak memory of a job, in a process of its own, above what it had before."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak(prepare: Callable[..., Callable[[], object]], *given: Any) -> float:
    """MiB that one call of ``prepare(*given)`` needs at most; NaN where the system cannot tell.

    Args:
        prepare: a function of a module's top level; what it returns is the job.
        given: its arguments.
    """
    if not _CLEAR.exists():
        return math.nan
    # Blocks go back to the system when they are freed: nothing that is kept hides a peak.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["marginflow.workflow", "marginflow.engine"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, given))
    process.start()
    sender.close()
    try:
        found: float = receiver.recv()
    except EOFError:
        found = math.nan
    process.join()
    return found


def _measure(
    sender: Connection, prepare: Callable[..., Callable[[], object]], given: tuple[Any, ...]
) -> None:
    job = prepare(*given)
    _CLEAR.write_text("5")  # the kernel's word for: begin the peak anew
    before = _kib("VmRSS")
    job()
    sender.send((_kib("VmHWM") - before) / 1024)


def _kib(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"expected {name} in {_STATUS}")
