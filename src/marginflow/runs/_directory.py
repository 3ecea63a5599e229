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
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from marginflow.distributed import first
from marginflow.errors import RunError
from marginflow.runs._files import (
    append_durably,
    lock_folder,
    storing,
    sync_folder,
    write_atomically,
)

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
        self._lock: int | None = None

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
            RunError: the directory holds a run and ``force`` is False, or holds other files.
        """
        folder = Path(path)
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise RunError(f"{str(folder)!r} exists and is no directory; choose another --out")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not (folder / "run.json").exists():
            raise RunError(f"{str(folder)!r} holds files that are no run; choose another --out")
        if not force:
            raise RunError(
                f"{str(folder)!r} already holds a run; continue it with --resume, "
                "replace it with --force, or choose another --out"
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
        with storing(run.path):
            for name in _OWN:
                old = run.path / name
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
            (run.path / "checkpoints").mkdir()
            sync_folder(run.path)
        run.write_config(config)
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
        run._remove_leftovers()
        return run

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _acquire(self) -> None:
        """Lock the directory for this process; the lock dies with it."""
        descriptor = lock_folder(self.path)
        if descriptor is None:
            raise RunError(
                f"another process is writing the run {str(self.path)!r}, or a monitor of this one "
                "that was not closed"
            )
        self._lock = descriptor

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote.

        Only under the lock, when nobody else can be writing them.
        """
        for name in (".", "checkpoints", "trajectory", "certificate"):
            folder = self.path / name
            for prefix in (*(f".{name}." for name in _OWN), ".step-", ".support-"):
                for path in folder.glob(f"{prefix}*"):
                    with storing(path):
                        path.unlink()

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
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"no run in {str(self.path)!r} (there is no run.json)") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{str(path)!r} is damaged: {error}") from None
        version = config.get("format_version") if isinstance(config, dict) else None
        if not isinstance(version, int):
            raise RunError(f"{str(path)!r} is damaged: it has no format_version")
        if version > FORMAT_VERSION:
            raise RunError(
                f"{str(path)!r} has format {version}; this marginflow reads up to {FORMAT_VERSION}: update it"
            )
        return dict(config)

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
            lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {str(self.metrics_path)!r}: {error}") from None
        records: list[dict[str, Any]] = []
        # split leaves "" behind the last newline: anything else there is a torn line.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise RunError(f"{str(self.metrics_path)!r}: line {number} is damaged")
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
        for path in (self.path / "trajectory").glob("step-*.safetensors"):
            if int(path.stem.removeprefix("step-")) > step:
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
        folder = self.path / "trajectory"
        with storing(folder):
            folder.mkdir(exist_ok=True)
        data = save_tensors({n: v.detach().cpu().contiguous() for n, v in weights.items()})
        write_atomically(folder / f"step-{step:08d}.safetensors", data)

    @first
    def read_weights(self) -> dict[int, dict[str, Tensor]]:
        """The kept weights by step, in order; empty where none were kept.

        Returns:
            by step, and by name each weight of its shape.

        Raises:
            RunError: a damaged file.
        """
        weights = {}
        for path in sorted((self.path / "trajectory").glob("step-*.safetensors")):
            try:
                weights[int(path.stem.removeprefix("step-"))] = load_tensors(path.read_bytes())
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
        folder = self.path / "checkpoints"
        path = folder / f"step-{info['step']:08d}.safetensors"
        data = save_tensors({name: value.cpu() for name, value in tensors.items()})
        side = {**info, "sha256": hashlib.sha256(data).hexdigest()}
        write_atomically(path, data)
        # The side file comes last: a checkpoint without it never counts.
        write_atomically(path.with_suffix(".json"), json.dumps(side) + "\n")
        for old in self._checkpoint_paths()[_KEPT_CHECKPOINTS:]:
            with contextlib.suppress(OSError):
                old.with_suffix(".json").unlink(missing_ok=True)
                old.unlink(missing_ok=True)
        return path

    @first
    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that reads back whole; damaged ones are named in the log."""
        for path in self._checkpoint_paths():
            try:
                return _read_checkpoint(path)
            except RunError as error:
                _log.warning("%s; using the checkpoint before it", error)
        return None

    def _checkpoint_paths(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"), reverse=True)


def _read_checkpoint(path: Path) -> Checkpoint:
    try:
        data = path.read_bytes()
        info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if hashlib.sha256(data).hexdigest() != info["sha256"]:
            raise RunError(f"the checkpoint {path.name} is damaged (its hash is another)")
        return Checkpoint(load_tensors(data), info, path)
    except FileNotFoundError:
        raise RunError(f"the checkpoint {path.name} was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"the checkpoint {path.name} is damaged: {error}") from None
