"""A sweep on disk.

OUT/
  sweep.json       the job, the options and the names of all trials, versions
  attempts.jsonl   one line for each attempt at a trial that has ended, appended and fsynced
  trials/NAME/     the run directory of each trial
  results.csv      a row a trial: what was swept, what came out; results.jsonl holds the same
  report.html      written by ``marginflow sweep``
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from marginflow._reading import parse_json, read_file, read_versioned
from marginflow.errors import RunError
from marginflow.runs import (
    FolderLock,
    append_durably,
    lock_folder,
    own_folder,
    provenance,
    put_aside,
    remove_if_left,
    storing,
    write_atomically,
)
from marginflow.sweeps._plan import Plan

FORMAT_VERSION = 1
_OWN = ("attempts.jsonl", "results.csv", "results.jsonl", "report.html", "trials", "sweep.json")


class SweepDirectory:
    """The folder of a sweep. :meth:`open` locks it; reading needs no lock."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: FolderLock | None = None

    def check(self, plan: Plan, *, resume: bool, force: bool) -> None:
        """Refuse what :meth:`open` would refuse, without writing anything.

        Raises:
            RunError: a sweep or something else is there; or, with ``resume``, no sweep, or another.
        """
        if resume:
            self._check_same(plan)
        elif self.path.exists() and not self.path.is_dir():
            raise RunError(f"{str(self.path)!r} is a file; choose another directory")
        elif self.path.exists() and any(self.path.iterdir()):
            if not (self.path / "sweep.json").exists():
                if _begun_only(self.path):
                    return
                raise RunError(
                    f"{str(self.path)!r} holds files that are no sweep; choose another directory"
                )
            if not force:
                raise RunError(
                    f"{str(self.path)!r} already holds a sweep; continue it with resume=True (--resume), "
                    "replace it with force=True (--force), or choose another directory"
                )

    def open(self, plan: Plan, *, resume: bool, force: bool) -> None:
        """Make the folder or take it over, and lock it.

        Raises:
            RunError: as :meth:`check`; another sweep runs in the folder.
            StorageError: the file system refuses.
        """
        self.check(plan, resume=resume, force=force)
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.path)
        if self._lock is None:
            raise RunError(f"another process is carrying out the sweep {str(self.path)!r}")
        try:
            # Another sweep may have begun and ended here since the folder was looked at.
            self.check(plan, resume=resume, force=force)
            for name in _OWN:
                for left in self.path.glob(f".{name}.*"):
                    remove_if_left(left)
                # sweep.json is replaced last, so that a folder is never without it; attempts.jsonl goes
                # first, so that no trial counts as finished whose run is gone.
                if not resume and name != "sweep.json":
                    put_aside(self.path / name)
            self.check_inside(trial.name for trial in plan.trials)
            self._write(plan)
            own_folder(self.path / "trials", make=True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def run_path(self, name: str) -> Path:
        """The run directory of a trial."""
        return self.path / "trials" / name

    def check_inside(self, names: Iterable[str]) -> None:
        """Refuse to write trials to where a link leads out of the sweep.

        Raises:
            StorageError: ``trials``, or the folder of one of them, is a symbolic link.
        """
        for folder in (self.path / "trials", *map(self.run_path, names)):
            own_folder(folder)

    def add_attempt(self, record: Mapping[str, Any]) -> None:
        """Keep what came of an attempt.

        Raises:
            StorageError: the file system refuses.
        """
        append_durably(self.path / "attempts.jsonl", json.dumps(record, ensure_ascii=False))

    def attempts(self) -> dict[str, list[dict[str, Any]]]:
        """The attempts at each trial, in their order; a line that a crash cut short is left out.

        Raises:
            RunError: the file cannot be read.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        try:
            lines = read_file(self.path / "attempts.jsonl").split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RunError(f"cannot read the attempts in {str(self.path)!r}: {error}") from None
        for line in lines:
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if _is_attempt(record):
                found.setdefault(record["trial"], []).append(record)
        return found

    def finished(self) -> set[str]:
        """The trials that have ended well and whose runs are there."""
        return {
            name
            for name, records in self.attempts().items()
            if records[-1]["outcome"] == "finished"
            and os.path.exists(self.run_path(name) / "run.json")
        }

    def read(self) -> dict[str, Any]:
        """The content of ``sweep.json``.

        Raises:
            RunError: missing, damaged, or of a newer format.
        """
        path = self.path / "sweep.json"
        content = read_versioned(path, FORMAT_VERSION)
        if content is None:
            raise RunError(f"no sweep in {str(self.path)!r} (there is no sweep.json)")
        for key, (expected, fits) in _CONTENT.items():
            if not fits(content.get(key)):
                raise RunError(f"{str(path)!r} is damaged: {key}: expected {expected}")
        return content

    def _write(self, plan: Plan) -> None:
        content = {
            "format_version": FORMAT_VERSION,
            "name": plan.name,
            "job": plan.job,
            "retries": plan.retries,
            "certify": plan.certify,
            "cpus": plan.cpus,
            "gpus": plan.gpus,
            "options": dict(plan.options),
            "swept": list(plan.swept),
            "trials": _trials(plan),
            **provenance(),
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_atomically(self.path / "sweep.json", text + "\n")

    def _check_same(self, plan: Plan) -> None:
        stored = self.read()
        if stored["job"] != plan.job:
            raise RunError(
                f"cannot resume: the sweep there is of {stored['job']}, not of {plan.job}"
            )
        there = {trial["name"]: trial["options"] for trial in stored["trials"]}
        now = {trial["name"]: trial["options"] for trial in _trials(plan)}
        for name, options in there.items():
            if name not in now:
                raise RunError(
                    f"cannot resume: the sweep there has the trial {name!r}, which the file does not "
                    "name; trials may be added, not left out: use another directory"
                )
            if now[name] != options:
                keys = sorted(
                    k for k in {*options, *now[name]} if options.get(k) != now[name].get(k)
                )
                raise RunError(
                    f"cannot resume: the trial {name!r} has another {', '.join(keys)} there; use another "
                    "directory"
                )


def _begun_only(folder: Path) -> bool:
    """Whether ``folder`` has only what a process leaves that is killed before it writes sweep.json."""
    own = re.compile(r"\.lock|\.sweep\.json\.\w{8}")
    return all(own.fullmatch(path.name) for path in folder.iterdir())


def _is_attempt(record: object) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("trial"), str)
        and isinstance(record.get("outcome"), str)
        and all(isinstance(record.get(k), str | None) for k in ("error", "certificate"))
        and isinstance(record.get("seconds"), int | float | None)
    )


def _is_trial(value: object) -> bool:
    return (
        isinstance(value, dict)
        # The name is that of a folder, which lies nowhere but in the sweep.
        and isinstance(name := value.get("name"), str)
        and Path(name).name == name
        and name not in ("", ".", "..")
        and "\0" not in name
        and all(_is_table(value.get(key)) for key in ("swept", "options"))
    )


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, str | int | float | None) for entry in value.values()
    )


_CONTENT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("text", lambda v: isinstance(v, str)),
    "job": ("train, maximize or flow", lambda v: v in ("train", "maximize", "flow")),
    "certify": ("true or false", lambda v: isinstance(v, bool)),
    "options": ("options by name", lambda v: isinstance(v, dict)),
    "swept": (
        "a list of names",
        lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v),
    ),
    "trials": (
        "trials with the name of a folder, what is swept and the options",
        lambda v: isinstance(v, list) and all(map(_is_trial, v)),
    ),
    "versions": (
        "versions by name",
        lambda v: (
            v is None or (isinstance(v, dict) and all(isinstance(n, str) for n in v.values()))
        ),
    ),
}
"""What ``sweep.json`` holds, as far as it is read."""


def _trials(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"name": t.name, "swept": dict(t.swept), "options": dict(t.options)} for t in plan.trials
    ]
