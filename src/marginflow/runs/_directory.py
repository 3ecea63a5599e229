"""One run directory: who may write it, what lies in it, and what of it can be trusted.

run.json                     configuration, versions, hash of the data, format version
metrics.jsonl                one line per measurement
checkpoints/step-….safetensors (+ .json)
    trajectory/step-….safetensors     the weights at each measurement, where they are kept

Source: marginflow.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from marginflow._reading import LARGEST_TEXT, parse_json, read_file, read_json, read_versioned
from marginflow.distributed import first
from marginflow.errors import RunError
from marginflow.runs._files import (
    FolderLock,
    append_durably,
    lock_folder,
    own_folder,
    put_aside,
    remove_if_left,
    storing,
    sync_folder,
    write_alone,
    write_atomically,
)
from marginflow.runs._schema import Config, check_config, check_record

FORMAT_VERSION = 1
"""Of run directories: one of a newer format is refused."""

_KEPT_CHECKPOINTS = 2
_OWN = (
    "run.json",
    "metrics.jsonl",
    "checkpoints",
    "trajectory",
    "figures",
    "report.html",
    "verdicts.json",
    "audit.json",
    "certificate.json",
    "certificate",
    "tensorboard",
    "mlflow.json",
    "bounds.json",
)

_log = logging.getLogger("marginflow")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was read back whole.

    Attributes:
        tensors: what was saved, by name, of any shape.
        info: its JSON side file: step, epoch and whatever else was given.
        path: the ``.safetensors`` file.
    """

    tensors: dict[str, Tensor]
    info: dict[str, Any]
    path: Path


class RunDirectory:
    """A run directory. :meth:`create` and :meth:`reopen` lock it; reading needs no lock.

    Of several processes that work together the first reads and writes, and the others learn from it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        """The folder."""
        self._lock: FolderLock | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The lock stays with the process that has it.
        return RunDirectory, (self.path,)

    @property
    def metrics_path(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / "metrics.jsonl"

    @classmethod
    @first
    def check_free(cls, path: str | os.PathLike[str], *, force: bool) -> None:
        """Refuse a path that :meth:`create` would refuse, without writing anything.

        Args:
            path: the folder.
            force: whether a run that is there may be replaced.

        Raises:
            RunError: the directory holds a run and ``force`` is False, or holds other files; a path
                that can be no directory.
        """
        folder = Path(path)
        try:
            is_other = folder.is_symlink() or (folder.exists() and not folder.is_dir())
        except OSError as error:  # a name that is too long
            raise RunError(
                f"{str(folder)!r} cannot be a directory: {error.strerror}; choose another one"
            ) from None
        if is_other:
            raise RunError(f"{str(folder)!r} exists and is no directory; choose another directory")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not (folder / "run.json").exists():
            if _begun_only(folder):
                return
            raise RunError(f"{str(folder)!r} holds files that are no run; choose another directory")
        if not force:
            raise RunError(
                f"{str(folder)!r} already holds a run; continue it with resume=True (--resume), "
                "replace it with force=True (--force), or choose another directory"
            )

    @classmethod
    @first
    def create(
        cls, path: str | os.PathLike[str], config: Mapping[str, Any], *, force: bool = False
    ) -> RunDirectory:
        """Make a new run directory and write its ``run.json``.

        Args:
            path: the folder.
            config: the content of ``run.json``.
            force: replace a run that is there.

        Raises:
            RunError: see :meth:`check_free`; or another process writes there.
            StorageError: the file system refuses.
        """
        cls.check_free(path, force=force)
        run = cls(path)
        with storing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        run._acquire()
        try:
            # Another process may have made a run here, and ended, since the path was looked at.
            cls.check_free(path, force=force)
            # run.json is replaced last: a process that is killed meanwhile leaves a run of which nothing
            # is measured, and no files that nobody knows. The checkpoints go first: without
            # them what is left cannot be continued with measurements missing.
            for name in sorted(_OWN, key=lambda name: name != "checkpoints"):
                if name != "run.json":
                    put_aside(run.path / name)
            run._remove_leftovers()
            with storing(run.path):
                (run.path / "checkpoints").mkdir()
                sync_folder(run.path)
            run.write_config(config)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    @first
    def reopen(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Open an existing run to continue it.

        Args:
            path: the folder.

        Raises:
            RunError: no run there, or another process writes there.
        """
        run = cls(path)
        run.read_config()
        run._acquire()
        try:
            run._remove_leftovers()
            with storing(run.path):
                # It is missing of a run whose replacing was cut short by a kill.
                (run.path / "checkpoints").mkdir(exist_ok=True)
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _acquire(self) -> None:
        """Lock the directory for this process; the lock dies with it."""
        self._lock = lock_folder(self.path)
        if self._lock is None:
            raise RunError(
                f"another process is writing the run {str(self.path)!r}, or a monitor of this one "
                "that was not closed; wait for it, or choose another directory"
            )

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of processes that were killed while they wrote."""
        for name in (".", "checkpoints", "trajectory", "certificate", "figures"):
            folder = self.path if name == "." else own_folder(self.path / name)
            for prefix in (*(f".{name}." for name in _OWN), ".step-", ".support-"):
                for path in folder.glob(f"{prefix}*"):
                    remove_if_left(path)

    @first
    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace ``run.json``.

        Args:
            config: the new content of ``run.json``.

        Raises:
            StorageError: the file system refuses.
        """
        content = {"format_version": FORMAT_VERSION, **config}
        write_atomically(
            self.path / "run.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        )

    @first
    def read_config(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            RunError: missing, damaged or of a newer format.
        """
        path = self.path / "run.json"
        config = read_versioned(path, FORMAT_VERSION)
        if config is None:
            trials = self.path / "trials"
            sweep = os.path.isfile(self.path / "sweep.json")
            advice = f"; it is a sweep, whose runs are in {str(trials)!r}" if sweep else ""
            raise RunError(f"no run in {str(self.path)!r} (there is no run.json){advice}")
        check_config(config, repr(str(path)))
        return Config(config)

    @first
    def append_metrics(self, *records: Mapping[str, Any]) -> None:
        """Append measurements, one line each.

        Args:
            records: measurements, one line each.

        Raises:
            StorageError: the file system refuses.
        """
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        append_durably(self.metrics_path, "\n".join(lines))

    @first
    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole measurements; a line that a crash cut short at the end is left out.

        Raises:
            RunError: a damaged line that is not the last.
        """
        try:
            lines = read_file(self.metrics_path).split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(
                f"cannot read {str(self.metrics_path)!r}: {error.strerror or error}"
            ) from None
        records: list[dict[str, Any]] = []
        # split leaves "" behind the last newline: anything else there is a torn line.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                if len(line) > LARGEST_TEXT:
                    raise ValueError("it is too long")
                record = parse_json(line)
                reason = check_record(record)
            except ValueError as error:
                reason = str(error)
            if reason is not None:
                raise RunError(f"{str(self.metrics_path)!r}: line {number} is damaged ({reason})")
            records.append(record)
        return records

    @first
    def truncate_metrics(self, step: int) -> None:
        """Keep the measurements and weights up to ``step``, those that a checkpoint vouches for.

        Args:
            step: the last step that is kept.

        Raises:
            RunError: damaged metrics.
            StorageError: the file system refuses.
        """
        kept = [record for record in self.read_metrics() if record.get("step", 0) <= step]
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomically(self.metrics_path, content)
        folder = own_folder(self.path / "trajectory")
        for number, path in _steps(folder):
            if number > step:
                with storing(path):
                    path.unlink()

    @first
    def save_weights(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights of ``step`` as a point of the trajectory.

        Args:
            step: at which they were taken.
            weights: by name, of any shape.

        Raises:
            StorageError: the file system refuses.
        """
        folder = own_folder(self.path / "trajectory", make=True)
        data = save_tensors({n: v.detach().cpu().contiguous() for n, v in weights.items()})
        write_alone(folder / f"step-{step:08d}.safetensors", data)

    @first
    def read_weights(self) -> dict[int, dict[str, Tensor]]:
        """The kept weights by step, in order; empty where none were kept.

        Returns:
            by step, and by name each weight of its shape.

        Raises:
            RunError: a damaged file.
        """
        weights = {}
        for step, path in _steps(self.path / "trajectory"):
            try:
                weights[step] = load_tensors(read_file(path))
            except (OSError, ValueError, SafetensorError) as error:
                raise RunError(f"{str(path)!r} is damaged: {error}") from None
        return weights

    @first
    def save_checkpoint(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Path:
        """Save ``tensors`` as the checkpoint of ``info["step"]`` and drop all but the newest two.

        Args:
            tensors: by name, of any shape.
            info: what the side file says besides.

        Raises:
            StorageError: the file system refuses; earlier checkpoints are untouched.
        """
        folder = own_folder(self.path / "checkpoints")
        path = folder / f"step-{info['step']:08d}.safetensors"
        data = save_tensors({name: value.cpu() for name, value in tensors.items()})
        side = {**info, "sha256": hashlib.sha256(data).hexdigest()}
        # The side file comes last: a checkpoint without it never counts. One of other content at the same
        # step goes first, or a process killed between the two would leave what looks damaged.
        beside = path.with_suffix(".json")
        same = _hash_in(beside) == side["sha256"]
        write_alone(path, data, outdated=None if same else lambda: beside.unlink(missing_ok=True))
        write_alone(beside, json.dumps(side) + "\n")
        for old in self._checkpoint_paths()[_KEPT_CHECKPOINTS:]:
            with contextlib.suppress(OSError):
                old.with_suffix(".json").unlink(missing_ok=True)
                old.unlink(missing_ok=True)
        return path

    @first
    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that reads back whole; damaged ones are named in the log."""
        return self._search_checkpoint()[0]

    @first
    def checkpoint_to_resume(self) -> Checkpoint | None:
        """The newest whole checkpoint; None if there was never one, and the run begins anew.

        Raises:
            RunError: there are checkpoints, and all are damaged: to begin anew would remove what
                was measured, and that is not decided here.
        """
        found, damage = self._search_checkpoint()
        if found is None and damage:
            raise RunError(
                f"no checkpoint of {str(self.path)!r} is whole ({'; '.join(damage)}); put back a copy of "
                "the directory, or train anew with --force"
            )
        if found is None and self.read_metrics():
            _log.warning(
                "%r has measurements but no checkpoint: it begins at step 0, and they are made again",
                str(self.path),
            )
        return found

    def _search_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and what is wrong with newer ones that were whole once."""
        while True:
            paths = self._checkpoint_paths()
            found, damage = None, []
            for path in paths:
                try:
                    found = _read_checkpoint(path)
                    break
                except _UnfinishedError as error:
                    unfinished = str(error)
                    if path.exists():
                        _log.warning("%s; using the checkpoint before it", unfinished)
                except RunError as error:
                    damage.append(str(error))
                    _log.warning("%s; using the checkpoint before it", error)
            # A run that is being written drops old checkpoints while they are looked at.
            if found is not None or paths == self._checkpoint_paths():
                return found, damage

    def _checkpoint_paths(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return [path for _, path in reversed(_steps(self.path / "checkpoints"))]


def _is_side(info: object) -> bool:
    if not isinstance(info, dict):
        return False
    step, seconds = info.get("step"), info.get("elapsed_seconds", 0.0)
    whole = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    return whole and isinstance(seconds, int | float)


_STEP = re.compile(r"step-(\d{8,18})\.safetensors", re.ASCII)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The files of weights in ``folder`` by their steps, in order; others are none of ours."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step-*.safetensors"))
    return sorted((int(name[1]), path) for name, path in found if name)


class _UnfinishedError(RunError):
    """A checkpoint without its side file, which comes last."""


def _begun_only(folder: Path) -> bool:
    """Whether ``folder`` has nothing but what processes leave that are killed before run.json is written."""
    # The next one puts an empty checkpoints/ aside, and may be killed at that.
    left = re.compile(rf"\.lock|\.({'|'.join(map(re.escape, _OWN))})\.\w{{8}}", re.ASCII)
    return all(
        left.fullmatch(path.name)
        or (path.name == "checkpoints" and path.is_dir() and not any(path.iterdir()))
        for path in folder.iterdir()
    )


def _hash_in(side: Path) -> object:
    """The hash that a side file tells; None if there is none to be read."""
    try:
        found = read_json(side)
    except (OSError, ValueError):
        return None
    return found.get("sha256") if isinstance(found, dict) else None


def _read_checkpoint(path: Path) -> Checkpoint:
    try:
        data = read_file(path)
        info = read_json(path.with_suffix(".json"))
        if not _is_side(info):
            raise RunError(f"the checkpoint {path.name} is damaged (its step or its time is none)")
        if hashlib.sha256(data).hexdigest() != info["sha256"]:
            raise RunError(f"the checkpoint {path.name} is damaged (its hash is another)")
        return Checkpoint(load_tensors(data), info, path)
    except RunError:  # a ValueError too
        raise
    except FileNotFoundError:
        raise _UnfinishedError(f"the checkpoint {path.name} was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"the checkpoint {path.name} is damaged: {error}") from None
