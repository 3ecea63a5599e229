"""MLflow: the measurements as metrics of an MLflow run, the configuration as its parameters."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marginflow._checks import optional
from marginflow._reading import read_json
from marginflow.runs._files import write_atomically
from marginflow.runs._metrics import layer_names, numbers_in
from marginflow.runs._run import run_name

_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow tries for four minutes by default, in which a training would stand still."""

_LONGEST = 500
"""Characters of a parameter: older servers take no more."""

_MOST = 1000
"""Metrics that a server takes at once."""

_TAGS = ("data_sha256", "format_version", "git_revision", "machine", "threads", "kind")
_LEFT_OUT = (
    *_TAGS, "layers", "versions", "float32_matmul_precision", "ended", "notes", "advice",
    "perturbation_effect",
)  # fmt: skip


class MlflowSink:
    """An MLflow run, where ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say.

    Its id is kept in ``RUN/mlflow.json``, so that a run which is resumed goes on with it. Inside a
    run that the caller has started it is a nested one.

    Args:
        directory: the run directory, or None.
        config: the content of ``run.json``.

    Attributes:
        error: what ended the run before its time, if anything did; decides the status.

    Raises:
        MissingDependencyError: mlflow is not installed.
        Exception: whatever MLflow raises.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, config: Mapping[str, Any]) -> None:
        self.error: BaseException | None = None
        self._mlflow = optional("mlflow", "mlflow", "log 'mlflow'", "mlflow")
        self._layers = layer_names(config)
        self._there: dict[tuple[str, int], float] = {}
        with _impatient():
            self._client = self._mlflow.MlflowClient()
            self._id = self._continued(directory, config) or self._begun(directory, config)
            self._client.update_run(self._id, status="RUNNING")

    @staticmethod
    def file(directory: str | os.PathLike[str]) -> Path:
        """Where the id is kept."""
        return Path(directory) / "mlflow.json"

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log the numbers of ``records`` at their steps, but for those that are there already.

        Where a run was resumed from an earlier step, the new value comes after the one that it replaces:
        MLflow deletes no points, and takes the later one for the value of the step.
        """
        metric, now = self._mlflow.entities.Metric, int(time.time() * 1000)
        found = [
            metric(_allowed(name), value, now, int(record["step"]))
            for record in records
            for name, value in numbers_in(record, self._layers).items()
        ]
        new = iter([m for m in found if self._there.get((m.key, m.step)) != m.value])
        with _impatient():
            while batch := list(itertools.islice(new, _MOST)):
                self._client.log_batch(self._id, metrics=batch)

    def close(self) -> None:
        """End the MLflow run: finished, killed (by Ctrl-C) or failed."""
        status = "FINISHED"
        if self.error is not None:
            status = "KILLED" if isinstance(self.error, KeyboardInterrupt) else "FAILED"
        with _impatient():
            self._client.set_terminated(self._id, status)

    def _continued(
        self, directory: str | os.PathLike[str] | None, config: Mapping[str, Any]
    ) -> str | None:
        """The run of ``mlflow.json``, and what it has; None if there is none at this server."""
        if directory is None or not self.file(directory).exists():
            return None
        try:
            name = str(read_json(self.file(directory))["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        try:
            run = self._client.get_run(name)
        except self._mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if run.info.lifecycle_stage != "active":
            return None
        for key in run.data.metrics:
            history = self._client.get_metric_history(name, key)
            # Of several at a step the latest counts, by MLflow's own order.
            history = sorted(history, key=lambda point: (point.timestamp, point.value))
            self._there |= {(point.key, int(point.step)): point.value for point in history}
        # Parameters of an MLflow run are fixed: what has changed since becomes a tag.
        for key, value in _params(config).items():
            if run.data.params.get(key, value) != value:
                self._client.set_tag(name, f"marginflow.{key}", value)
        return name

    def _begun(self, directory: str | os.PathLike[str] | None, config: Mapping[str, Any]) -> str:
        """A new run, with its name, parameters and tags."""
        path = None if directory is None else Path(directory)
        # start_run finds the experiment, and the user's own run around this one; but what it
        # opens is for all logging of this thread, so it is left at once.
        with (
            _impatient(MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true"),
            self._mlflow.start_run(
                run_name=_name(config, path),
                nested=True,
                tags=_tags(config),
                log_system_metrics=False,
            ) as begun,
        ):
            name = str(begun.info.run_id)
        entities = self._mlflow.entities
        params = [entities.Param(key, value) for key, value in _params(config).items()]
        self._client.log_batch(name, params=params[:100])
        if path is not None:
            content = {"run_id": name, "experiment_id": str(begun.info.experiment_id)}
            write_atomically(self.file(path), json.dumps(content, indent=2) + "\n")
        return name


@contextlib.contextmanager
def _impatient(**more: str) -> Iterator[None]:
    """Give a server that does not answer up soon, unless the environment says how long to try.

    Args:
        more: further variables, where the environment does not have them.
    """
    own = {name: value for name, value in (_PATIENCE | more).items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


def _name(config: Mapping[str, Any], path: Path | None) -> str:
    """The run's name; that of one of several seeds with the folder of them all."""
    name = run_name(config, path)
    if path is not None and re.fullmatch(r"seed-\d+", name):
        return f"{path.resolve().parent.name}/{name}"
    return name


def _params(config: Mapping[str, Any]) -> dict[str, str]:
    """What was asked for, as text."""
    given = {k: v for k, v in config.items() if k not in _LEFT_OUT and v is not None}
    text = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in given.items()
    }
    return {
        _allowed(key): value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
        for key, value in text.items()
    }


def _tags(config: Mapping[str, Any]) -> dict[str, str]:
    """Where the run came from, as text."""
    versions = {f"version.{name}": v for name, v in (config.get("versions") or {}).items()}
    tags = versions | {name: config[name] for name in _TAGS if config.get(name) is not None}
    return {f"marginflow.{name}": str(value) for name, value in tags.items()}


def _allowed(name: str) -> str:
    """``name`` in the letters that MLflow takes."""
    return re.sub(r"[^\w.\-/ :]", "_", name)
