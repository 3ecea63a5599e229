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
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marginflow.errors import RunError
from marginflow.runs import append_durably, lock_folder, provenance, storing, write_atomically
from marginflow.sweeps._plan import Plan

FORMAT_VERSION = 1
_OWN = ("sweep.json", "attempts.jsonl", "results.csv", "results.jsonl", "report.html", "trials")


class SweepDirectory:
    """The folder of a sweep. :meth:`open` locks it; reading needs no lock."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def check(self, plan: Plan, *, resume: bool, force: bool) -> None:
        """Refuse what :meth:`open` would refuse, without writing anything.

        Raises:
            RunError: a sweep or something else is there; or, with ``resume``, no sweep, or another.
        """
        if resume:
            self._check_same(plan)
        elif self.path.exists() and not self.path.is_dir():
            raise RunError(f"{str(self.path)!r} is a file; choose another --out")
        elif self.path.exists() and any(self.path.iterdir()):
            if not (self.path / "sweep.json").exists():
                raise RunError(
                    f"{str(self.path)!r} holds files that are no sweep; choose another --out"
                )
            if not force:
                raise RunError(
                    f"{str(self.path)!r} already holds a sweep; continue it with --resume, replace it "
                    "with --force, or choose another --out"
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
        if not resume:
            for name in _OWN:
                old = self.path / name
                with storing(old):
                    if old.is_dir() and not old.is_symlink():
                        shutil.rmtree(old)
                    else:
                        old.unlink(missing_ok=True)
        self._write(plan)
        with storing(self.path):
            (self.path / "trials").mkdir(exist_ok=True)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def run_path(self, name: str) -> Path:
        """The run directory of a trial."""
        return self.path / "trials" / name

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
            lines = (self.path / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read the attempts in {str(self.path)!r}: {error}") from None
        for line in lines:
            try:
                record = json.loads(line)
                found.setdefault(record["trial"], []).append(record)
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def finished(self) -> set[str]:
        """The trials that have ended well and whose runs are there."""
        return {
            name
            for name, records in self.attempts().items()
            if records[-1]["outcome"] == "finished" and (self.run_path(name) / "run.json").exists()
        }

    def read(self) -> dict[str, Any]:
        """The content of ``sweep.json``.

        Raises:
            RunError: missing, damaged, or of a newer format.
        """
        path = self.path / "sweep.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"no sweep in {str(self.path)!r} (there is no sweep.json)") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{str(path)!r} is damaged: {error}") from None
        if version > FORMAT_VERSION:
            raise RunError(
                f"{str(path)!r} has format {version}; this marginflow reads up to {FORMAT_VERSION}: "
                "update it"
            )
        return dict(content)

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
                    "name; trials may be added, not left out: use another --out"
                )
            if now[name] != options:
                keys = sorted(
                    k for k in {*options, *now[name]} if options.get(k) != now[name].get(k)
                )
                raise RunError(
                    f"cannot resume: the trial {name!r} has another {', '.join(keys)} there; use another "
                    "--out"
                )


def _trials(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"name": t.name, "swept": dict(t.swept), "options": dict(t.options)} for t in plan.trials
    ]
