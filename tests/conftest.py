"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_ELSEWHERE = tuple(Path(__file__).parent / name for name in ("extras", "integrations", "package"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests that need an environment of their own run only where ``-m`` asks for them.

    `make test` has an environment without other people's libraries and does not even read these tests; `make
    test-extras` and `make package` run them, and there a missing library fails.
    """
    if config.getoption("markexpr"):
        return None  # -m decides
    return True if any(map(collection_path.is_relative_to, _ELSEWHERE)) else None


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: the suite's networks are tiny, and results do not hang on the machine's load."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder with the real MNIST; a missing oracle fails, it does not skip."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MARGINFLOW_DATA") or shared)
    if not (folder / "mnist" / "train-images-idx3-ubyte.gz").is_file():
        pytest.fail(f"no mnist/train-images-idx3-ubyte.gz in {folder}; set MARGINFLOW_DATA")
    return folder
