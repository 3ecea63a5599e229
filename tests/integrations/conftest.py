"""A store of MLflow for the session: making its tables takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store in one file."""
    folder: Path = tmp_path_factory.mktemp("mlflow")
    return f"sqlite:///{folder / 'store.db'}"


@pytest.fixture
def mlflow_experiment(
    mlflow_store: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """An experiment of the test's own, as a user's environment would name it."""
    name = str(request.node.name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    return name
