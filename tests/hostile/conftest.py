"""One set of valid files for all tests here; nobody changes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_runs import make_all


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, a sweep, data, weights and plans."""
    folder = tmp_path_factory.mktemp("hostile") / "valid"
    folder.mkdir()
    make_all(folder)
    return folder


@pytest.fixture
def copied(valid: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies one of the valid folders, a training unless another is named."""

    def copy(name: str, of: str = "train") -> Path:
        return Path(shutil.copytree(valid / of, tmp_path / name, symlinks=True))

    return copy
