"""Trials in processes of this machine, by the standard library alone."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from marginflow.errors import MarginflowError
from marginflow.sweeps._executor import Executor

_GRACE = 60.0  # seconds for a step and its checkpoint, before a trial is killed
_COMMAND = (sys.executable, "-m", "marginflow.sweeps._worker")


class _Worker:
    """A process, the name of its task, and whether it has said that it is ready."""

    def __init__(self) -> None:
        # Its packages are found where this process finds them. A session of its own: Ctrl-C on the
        # terminal reaches the sweep alone, which tells each worker once.
        places = os.pathsep.join(place for place in sys.path if place)
        self.process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": places},
            start_new_session=True,
        )
        self.answers, self.tasks = _piped(self.process.stdout), _piped(self.process.stdin)
        self.task: str | None = None
        self.ready = False
        self._torn = b""

    def give(self, task: Mapping[str, Any]) -> None:
        """Send a task."""
        self.task = str(task["name"])
        # One that has just died is found out when its end of the pipe is read.
        with contextlib.suppress(BrokenPipeError):
            self.tasks.write(json.dumps(task).encode() + b"\n")
            self.tasks.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """The whole lines that have come; None at the end."""
        chunk = os.read(self.answers.fileno(), 1 << 16)
        if not chunk:
            return None
        *lines, self._torn = (self._torn + chunk).split(b"\n")
        return [json.loads(line) for line in lines]


class ProcessExecutor(Executor):
    """``jobs`` processes at most, made when they are needed and used again.

    Args:
        jobs: trials at a time.
    """

    name = "processes"

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []

    @property
    def pids(self) -> list[int]:
        """The processes' numbers."""
        return [worker.process.pid for worker in self._workers]

    def has_room(self) -> bool:
        """Whether a process is idle, or may be made."""
        busy = sum(worker.task is not None for worker in self._workers)
        return busy < self.jobs

    def start(self, task: Mapping[str, Any]) -> None:
        """Give the task to an idle process, or to a new one."""
        idle = [worker for worker in self._workers if worker.task is None]
        if not idle:
            worker = _Worker()
            self._workers.append(worker)
            self._selector.register(worker.answers, selectors.EVENT_READ, worker)
            idle = [worker]
        idle[0].give(task)

    def wait(self) -> list[tuple[str, dict[str, Any]]]:
        """Wait for answers.

        Raises:
            MarginflowError: processes that cannot even begin.
        """
        ended: list[tuple[str, dict[str, Any]]] = []
        while not ended and any(worker.task is not None for worker in self._workers):
            for key, _ in self._selector.select():
                ended += self._heard(key.data)
        return ended

    def stop(self) -> None:
        """Ctrl-C for every process with a task; those that do not end in a minute are killed."""
        for worker in self._workers:
            # Before it is ready there is nothing to keep, and nobody to handle the signal.
            worker.process.send_signal(signal.SIGINT if worker.ready else signal.SIGKILL)
        end = time.monotonic() + _GRACE
        while any(worker.task is not None for worker in self._workers):
            heard = self._selector.select(max(0.0, end - time.monotonic()))
            if not heard:
                break
            for key, _ in heard:
                self._heard(key.data)
        self.close()

    def close(self) -> None:
        """Kill what still runs."""
        for worker in list(self._workers):
            worker.process.kill()
            self._forget(worker)

    def _heard(self, worker: _Worker) -> list[tuple[str, dict[str, Any]]]:
        answers, ended = worker.read(), []
        if answers is None:
            self._forget(worker)
            code = worker.process.returncode
            if not worker.ready and code > 0:
                raise MarginflowError(
                    f"a process of the sweep ended before its first trial, with exit code {code}; "
                    "what it printed stands above"
                )
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            answers = [{"error": f"the process of the trial died ({cause})"}]
        for answer in answers:
            if "ready" in answer:
                worker.ready = True
            elif worker.task is not None:
                ended.append((worker.task, answer))
                worker.task = None
        return ended

    def _forget(self, worker: _Worker) -> None:
        worker.process.wait()
        self._selector.unregister(worker.answers)
        worker.answers.close()
        with contextlib.suppress(BrokenPipeError):
            worker.tasks.close()
        self._workers.remove(worker)


def _piped(pipe: IO[bytes] | None) -> IO[bytes]:
    """The pipe that was asked for, which the types do not know to be there."""
    if pipe is None:
        raise MarginflowError("a process was started without its pipes")
    return pipe
