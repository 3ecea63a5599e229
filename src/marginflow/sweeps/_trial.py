"""One attempt at a trial, in whatever process it takes place: from its task to its outcome, as JSON."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from marginflow._version import __version__
from marginflow.datasets import Dataset, load
from marginflow.errors import MarginflowError, RunError
from marginflow.kkt import certify_run, read_certificate
from marginflow.runs import Run, lock_folder
from marginflow.workflow import gradient_flow, maximize, train

_PATIENCE = 30.0  # seconds for a process that the sweep before this one has left to end
_LINEAR = ("dual", "normalized")
"""Methods of ``maximize`` that take seconds and cannot be resumed."""


def attempt(task: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out or resume the trial of ``task``; what came of it, errors too, as a value.

    Args:
        task: ``name``, ``job``, ``options``, ``path`` (its run directory), ``folder`` (in which relative
            paths are read), ``certify``, ``version``.

    Returns:
        ``seconds``; ``certificate``, why there is none; and one of ``error`` (with ``trace``, if it is
        none of marginflow's own) and ``interrupted``, or neither.
    """
    began = time.monotonic()
    found: dict[str, Any] = {}
    try:
        if task["version"] != __version__:
            raise RunError(
                f"the sweep is of marginflow {task['version']}, this machine has {__version__}; "
                "install the same version everywhere"
            )
        # Ray's processes on other machines begin in folders of their own.
        with contextlib.chdir(task["folder"]):
            found = _carry_out(task)
    except KeyboardInterrupt:
        found = {"interrupted": True}
    except MemoryError as error:
        found = {"error": str(error) if isinstance(error, MarginflowError) else "out of memory"}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
        if not isinstance(error, MarginflowError):
            found["trace"] = traceback.format_exc()
    return {**found, "seconds": round(time.monotonic() - began, 3)}


def _carry_out(task: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(task["options"])
    torch.set_num_threads(options.pop("threads", 1))
    data_dir = options.pop("data_dir", None)
    data = _data(options.pop("data"), data_dir, os.getcwd())
    log = options.pop("log", ())
    if "from" in options:
        options["start"] = options.pop("from")
    path = Path(task["path"])
    _wait_for(path)
    exists = (path / "run.json").exists()
    if path.exists() and not exists:
        shutil.rmtree(path)  # a process was killed while it made the folder: nothing is in it
    once = task["job"] == "maximize" and str(options.get("method")).startswith(_LINEAR)
    run = _JOBS[task["job"]](
        options.pop("model"),
        data,
        **options,
        out=path,
        resume=exists and not once,
        force=exists and once,
        log=[log] if isinstance(log, str) else log,
    )
    if not task["certify"]:
        return {}
    try:
        _certify(run, data)
    except MarginflowError as error:
        return {"certificate": str(error)}
    return {}


def _flow(*given: Any, **options: Any) -> Run:
    return gradient_flow(*given, **options).run


_JOBS: dict[str, Callable[..., Run]] = {"train": train, "maximize": maximize, "flow": _flow}


@functools.lru_cache(maxsize=1)
def _data(spec: str, data_dir: str | None, folder: str) -> Dataset:
    """The data set of the trial, kept for the next one; ``folder`` is where relative paths begin."""
    return load(spec, data_dir=data_dir)


def _certify(run: Run, data: Dataset) -> None:
    """Leave a certificate of the last weights in the run directory, if it is not there."""
    path = Path(str(run.path))
    there = read_certificate(path)
    if there is None or there.content.get("step") != run.checkpoint().info.get("step"):
        certify_run(run, data).save(path)


def _wait_for(path: Path) -> None:
    """Wait a little until no process of an earlier sweep writes the run any more."""
    end = time.monotonic() + _PATIENCE
    while (path / ".lock").exists() and time.monotonic() < end:
        lock = lock_folder(path)
        if lock is not None:
            lock.close()
            return
        time.sleep(0.1)
