"""Starting the processes of a data-parallel job as a user does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def command(processes: int, *arguments: str | Path, launcher: tuple[str, ...] = ()) -> list[str]:
    """``torchrun --nproc-per-node N …``, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*run, "--master-port", str(port), *launcher, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(
    processes: int, *arguments: str | Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run to the end; a job that hangs fails the test."""
    return subprocess.run(
        command(processes, *arguments, launcher=launcher),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )
