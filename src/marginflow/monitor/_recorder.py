"""A monitored loop on disk: a run directory like that of our own training."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from marginflow.distributed import first
from marginflow.errors import RunError
from marginflow.runs import Metrics, RunDirectory, provenance

_SHARE = 0.003
"""The part of the time, at most, that goes into checkpoints before the last one."""

_FIXED = ("data_sha256", "measure_with", "loss", "model_spec", "shapes", "strong")
"""What must be the same of a run that is continued: its measurements would not compare otherwise."""


class Recorder:
    """Writes measurements and weights as they come.

    A measurement is on disk before the checkpoint of its weights. Checkpoints are taken at measurements
    while they cost less than 0.3 % of the time; the weights of the last measurement are kept
    in memory for :meth:`close`. The directory is locked until then, or until the process ends.

    Args:
        out: the run directory.
        config: the content of ``run.json``.
        keep_weights: keep the weights of every measurement.
        resume: continue the run that lies there.
        force: replace it.

    Raises:
        RunError: ``out`` is taken, or holds a run that cannot be continued so.
        StorageError: the disk refuses.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        keep_weights: bool,
        resume: bool,
        force: bool,
    ) -> None:
        self.keep_weights = keep_weights
        self.records: list[dict[str, Any]] = []
        self._continuing = resume and first(os.path.exists)(os.path.join(out, "run.json"))
        self._began = time.monotonic()
        self._spent = 0.0
        self._unsaved: tuple[int, dict[str, Tensor]] | None = None
        self.directory: RunDirectory
        if not self._continuing:
            self.directory = RunDirectory.create(out, {**config, **provenance()}, force=force)
            return
        self.directory = RunDirectory.reopen(out)
        try:
            _check_same(self.directory.read_config(), config, out)
            self.records = self.directory.read_metrics()
        except BaseException:
            self.directory.close()
            raise

    def begin(self, step: int, records: Metrics) -> None:
        """Before the measurement of ``step``: cut off those of ``records`` that it replaces.

        A loop that was killed goes on from its own checkpoint, which may lie before the last
        measurement: those of ``step`` and later ones are then measured again.
        """
        if not self._continuing:
            return
        self._continuing = False
        kept = [record for record in records if record["step"] < step]
        if len(kept) < len(records):
            self.directory.truncate_metrics(step - 1)
            records[:] = kept

    def write(self, record: Mapping[str, Any], model: nn.Module) -> None:
        """Append a measurement, then save the weights it is of, or keep them."""
        self.directory.append_metrics(record)
        self._unsaved = None
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            return  # the last good checkpoint is worth more
        # Of several processes the first decides by its clock.
        if not self.keep_weights and first(self._dear)():
            self._unsaved = (record["step"], _copied(model))
            return
        self._save(record["step"], _copied(model))

    def _dear(self) -> bool:
        """Whether checkpoints have taken more than their share of the time."""
        return self._spent > _SHARE * (time.monotonic() - self._began)

    def close(self) -> None:
        """Save the weights of the last measurement, and release the directory."""
        if self._unsaved is not None:
            self._save(*self._unsaved)
            self._unsaved = None
        self.directory.close()

    def _save(self, step: int, weights: Mapping[str, Tensor]) -> None:
        started = time.monotonic()
        if self.keep_weights:
            self.directory.save_weights(step, weights)
        tensors = {f"model.{name}": value for name, value in weights.items()}
        self.directory.save_checkpoint(tensors, {"step": step})
        self._spent += time.monotonic() - started


def _copied(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers, each in memory of its own: safetensors refuses shared ones."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in model.state_dict().items()
    }


def _check_same(
    stored: Mapping[str, Any], config: Mapping[str, Any], out: str | os.PathLike[str]
) -> None:
    if stored.get("kind") != "monitor":
        raise RunError(
            f"{os.fspath(out)!r} is a run of marginflow's own training; choose another out"
        )
    for key in _FIXED:
        if stored.get(key) != config.get(key):
            raise RunError(
                f"cannot continue {os.fspath(out)!r}: {key} is {stored.get(key)!r} there, "
                f"{config.get(key)!r} now; choose another out"
            )
