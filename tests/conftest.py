from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder with the real MNIST; a missing oracle fails, it does not skip."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MARGINFLOW_DATA") or shared)
    if not (folder / "mnist" / "train-images-idx3-ubyte.gz").is_file():
        pytest.fail(f"no mnist/train-images-idx3-ubyte.gz in {folder}; set MARGINFLOW_DATA")
    return folder
