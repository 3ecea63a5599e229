"""Killing commands of marginflow, looking at what they left, comparing runs: for faults.py and tests/faults.

A command runs in a child that is forked from this process, in which everything is imported already: kills
then fall into the work. Forking is safe as long as this process has computed nothing with threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import RunError
from marginflow.runs import RunDirectory

CALLS = ("write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate", "open")
"""What changes a file system, as Python calls it."""


class Fault:
    """Counts the calls that change files, and at one of them does something.

    Args:
        at: the number of the call, from 1; 0 only counts.
        act: called with the operating system's function and its arguments, instead of it.
    """

    def __init__(self, at: int, act: Callable[..., Any]) -> None:
        self.at = at
        self.act = act
        self.count = 0

    def install(self) -> None:
        """Put counting functions in place of those of ``os``, for the rest of the process."""
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                return real(*args, **kwargs)
            self.count += 1
            if self.count == self.at:
                return self.act(name, real, *args, **kwargs)
            return real(*args, **kwargs)

        return called


def kill_here(rng: random.Random) -> Callable[..., NoReturn]:
    """SIGKILL before a call, in the middle of it (a part of the bytes is written), or behind it."""

    def act(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
        when = rng.choice(("before", "torn", "after"))
        if when == "torn" and name == "write":
            real(args[0], bytes(args[1])[: rng.randrange(len(args[1]))])
        elif when == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
        raise SystemExit  # not reached

    return act


def start(
    words: Sequence[str], log: Path, *, fault: Fault | None = None, tally: Path | None = None
) -> int:
    """Fork a child that carries out ``marginflow WORDS``; its number.

    Args:
        words: of the command line.
        log: what the child prints goes behind what is there.
        fault: installed in the child.
        tally: where the child leaves the fault's count when it ends.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(place, 1)
        os.dup2(place, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        logging.getLogger().handlers.clear()
        if fault is not None:
            fault.install()
        code = main(list(words))
        if fault is not None and tally is not None:
            tally.write_text(str(fault.count))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def start_process(words: Sequence[str], log: Path) -> int:
    """The same in a new process, as a user starts it."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "marginflow", *words], stdout=file, stderr=file
        ).pid


def ended(child: int, *, within: float | None = None) -> int | None:
    """Wait for a child: its exit code, negative for a signal; None if it runs longer than that."""
    end = None if within is None else time.monotonic() + within
    while True:
        done, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            return None
        time.sleep(0.0005)


def carry_out(words: Sequence[str], log: Path) -> float:
    """The command to its end; the seconds it took.

    Raises:
        RuntimeError: another exit code than 0.
    """
    began = time.monotonic()
    code = ended(start(words, log))
    if code != 0:
        raise RuntimeError(f"marginflow {' '.join(words)}: exit code {code}\n{log.read_text()}")
    return time.monotonic() - began


def counted(words: Sequence[str], log: Path, tally: Path) -> int:
    """The command to its end; how many calls of it change files.

    Raises:
        RuntimeError: another exit code than 0.
    """
    code = ended(start(words, log, fault=Fault(0, kill_here(random.Random(0))), tally=tally))
    if code != 0:
        raise RuntimeError(f"marginflow {' '.join(words)}: exit code {code}\n{log.read_text()}")
    return int(tally.read_text())


def damage(folder: Path) -> list[str]:
    """What is half-written or does not fit in ``folder`` and below it; temporary files do not count."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_dir() or hidden:
            continue
        try:
            _read(path)
        except FileNotFoundError:
            continue  # of a worker that ends just now
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
    for run in run_folders(folder):
        try:
            mf.load_run(run)
        except RunError as error:
            if (run / "run.json").exists() or "no run in" not in str(error):
                found.append(f"{run}: {error}")
    return found


def _read(path: Path) -> None:
    """Read a file as a whole, by its kind."""
    data = path.read_bytes()
    if path.suffix == ".json":
        info = json.loads(data)
        if path.parent.name == "checkpoints":
            tensors = path.with_suffix(".safetensors").read_bytes()
            if hashlib.sha256(tensors).hexdigest() != info["sha256"]:
                raise ValueError("the tensors have another hash")
    elif path.suffix == ".jsonl":
        lines = data.split(b"\n")
        if lines[-1] and path.name not in ("metrics.jsonl", "attempts.jsonl"):
            raise ValueError("the last line has no end")
        for line in lines[:-1]:
            json.loads(line)
    elif path.suffix == ".safetensors":
        safetensors.torch.load(data)
    elif path.suffix in (".html", ".svg"):
        if not data.rstrip().endswith(f"</{path.suffix[1:]}>".encode()):
            raise ValueError("it does not end")
    elif path.suffix == ".csv" and (not data.endswith(b"\n") or len(_widths(data)) > 1):
        raise ValueError("its rows differ in length")


def _widths(data: bytes) -> set[int]:
    import csv

    return {len(row) for row in csv.reader(data.decode().splitlines())}


def run_folders(folder: Path) -> Iterator[Path]:
    """The folders at or below ``folder`` in which a run is, or was begun."""
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_dir() and ((path / "run.json").exists() or (path / "checkpoints").is_dir()):
            yield path


def stage(folder: Path) -> str:
    """How far the run in ``folder`` is (of several, the first)."""
    runs = list(run_folders(folder))
    if not any((run / "run.json").exists() for run in runs):
        return "before run.json"
    if not any(list(run.glob("checkpoints/step-*.json")) for run in runs):
        return "before a checkpoint"
    return "later"


def differences(one: Path, other: Path) -> list[str]:
    """In what two run directories, or folders of them, differ: weights, measurements, settings; leftovers."""
    found = []
    names = [str(run.relative_to(one)) for run in run_folders(one)]
    if names != [str(run.relative_to(other)) for run in run_folders(other)]:
        return ["other runs"]
    for name in names:
        a, b = one / name, other / name
        for file in ("metrics.jsonl", "run.json"):
            if (a / file).read_bytes() != (b / file).read_bytes():
                found.append(f"{name}/{file}")
        first, second = (RunDirectory(run).latest_checkpoint() for run in (a, b))
        if first is None or second is None or not _same(first.tensors, second.tensors):
            found.append(f"{name}: the last checkpoint's tensors")
        elif _told(first.info) != _told(second.info):
            found.append(f"{name}: the last checkpoint's numbers")
        kept = [sorted(p.name for p in run.glob("trajectory/*")) for run in (a, b)]
        if kept[0] != kept[1]:
            found.append(f"{name}/trajectory: other files")
        elif any(
            (a / "trajectory" / n).read_bytes() != (b / "trajectory" / n).read_bytes()
            for n in kept[0]
        ):
            found.append(f"{name}/trajectory: other bytes")
    left = [p for p in other.rglob(".*") if p.name != ".lock"]
    return found + [f"left behind: {path.relative_to(other)}" for path in left]


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.numpy().tobytes() == other[name].numpy().tobytes()
        for name, value in one.items()
    )


def _told(info: dict[str, Any]) -> str:
    return json.dumps(
        {key: value for key, value in info.items() if key not in ("elapsed_seconds", "sha256")}
    )


@dataclass
class Row:
    """What came of the kills of one job."""

    name: str
    seconds: float = 0.0
    kills: int = 0
    resumes: int = 0
    same: int = 0
    half: int = 0
    in_writes: int = 0
    processes: int = 0
    replaced: int = 0
    before_run: int = 0
    before_checkpoint: int = 0
    later: int = 0

    def fell(self, where: str) -> None:
        """Count a kill by what it left."""
        self.kills += 1
        self.before_run += where == "before run.json"
        self.before_checkpoint += where == "before a checkpoint"
        self.later += where == "later"
