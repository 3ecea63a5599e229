"""Small commands of every kind, what they leave, and file systems that refuse."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import marginflow.sweeps._sweep as sweeping
from marginflow.cli import main
from marginflow.runs import RunDirectory
from marginflow.sweeps._executor import Executor
from marginflow.sweeps._trial import attempt

_DATA = ("--data", "separable:n=16,d=6,margin=0.3", "--quiet")
_LINEAR = ("--model", "deep-linear:4", "--attack", "exact-linear:p=2,eps=0.05")
JOBS = {
    "train": ("train", *_DATA, *_LINEAR, "--epochs", "6", "--lr", "0.5", "--dtype", "float64"),
    "flow": ("flow", *_DATA, *_LINEAR, "--log-time", "3"),
    "maximize": ("maximize", *_DATA, "--model", "mlp:4", "--attack", "fgsm:eps=0.02", "--epochs", "4"),
}  # fmt: skip
"""Commands that make a run; --out is to come."""

READERS = {
    "report": ("report", "RUN", "--format", "svg"),
    "verify": ("verify", "RUN"),
    "certify": ("certify", "RUN"),
    "measure": ("measure", "RUN", "--certified", "auto"),
}
"""Commands that leave results in a run."""


def made(kind: str, out: Path, *more: str) -> Path:
    """The run of a command that ends well."""
    assert main([*JOBS[kind], "--out", str(out), *more]) == 0
    return out


def of(words: tuple[str, ...], run: Path) -> list[str]:
    """The words, with the run in its place."""
    return [str(run) if word == "RUN" else word for word in words]


def sweep_words(folder: Path, out: Path, *more: str) -> list[str]:
    """A sweep of two tiny trainings."""
    file = folder / "plan.toml"
    if not file.exists():
        file.write_text(
            '[sweep]\nname = "two"\ncertify = false\n[options]\ndata = "separable:n=16,d=6,margin=0.3"\n'
            'model = "deep-linear:4"\nepochs = 3\nlr = 0.5\n[grid]\nseed = [0, 1]\n'
        )
    return ["sweep", str(file), "--out", str(out), "--executor", "processes", "--quiet", *more]


class Here(Executor):
    """Trials in this very process, one at a time: new ones need seconds to begin."""

    name = "here"

    def __init__(self) -> None:
        self.tasks: list[Mapping[str, Any]] = []

    def has_room(self) -> bool:
        return not self.tasks

    def start(self, task: Mapping[str, Any]) -> None:
        self.tasks.append(task)

    def wait(self) -> list[tuple[str, dict[str, Any]]]:
        task = self.tasks.pop()
        return [(str(task["name"]), attempt(task))]

    def stop(self) -> None:
        self.close()

    def close(self) -> None:
        self.tasks.clear()


def sweep_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sweeps run in this process."""
    monkeypatch.setattr(sweeping, "_executor", lambda *_: Here())


def content(folder: Path) -> dict[str, str]:
    """Every file but locks and temporary ones, with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def bits(run: Path) -> tuple[bytes, dict[str, bytes]]:
    """``metrics.jsonl`` and the tensors of the last checkpoint."""
    checkpoint = RunDirectory(run).latest_checkpoint()
    assert checkpoint is not None
    tensors = {name: value.numpy().tobytes() for name, value in checkpoint.tensors.items()}
    return (run / "metrics.jsonl").read_bytes(), tensors


def leftovers(folder: Path) -> list[Path]:
    """Temporary files."""
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


@contextlib.contextmanager
def refusing(at: int, number: int, folder: Path) -> Iterator[list[str]]:
    """Inside, the call number ``at`` that needs room below ``folder``, and all after it, raise ``number``.

    A write puts half of its bytes first, as a disk that fills up does. The list has the calls so far.
    """
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "replace")}
    calls: list[str] = []
    opened: set[int] = set()

    def counted(name: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if name in ("open", "mkdir", "replace"):
                inside = Path(os.fsdecode(args[0])).is_relative_to(folder)
                inside &= name != "open" or bool(args[1] & os.O_CREAT)
            else:
                inside = args[0] in opened
            if inside:
                calls.append(name)
                if at and len(calls) >= at:
                    if name == "write":
                        real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
                    raise OSError(number, os.strerror(number))
            result = real[name](*args, **kwargs)
            if name == "open":
                (opened.add if inside else opened.discard)(result)
            return result

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(os, name, counted(name))
        yield calls


FULL, READ_ONLY = errno.ENOSPC, errno.EROFS


def main_silently(words: list[str]) -> int:
    """The exit code of a command in a script of its own, where what it prints is of no interest."""
    with contextlib.redirect_stdout(sys.stderr):
        return main(words)
