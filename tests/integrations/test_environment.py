"""The environment of these tests is the pinned one, and its pins are those of the ordinary one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.integrations

ROOT = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize(
    "package",
    [
        "accelerate",
        "lightning",
        "mlflow",
        "pandas",
        "polars",
        "pyarrow",
        "ray",
        "tensorboard",
        "torch",
    ],
)
def test_what_is_tested_is_what_is_pinned(package: str) -> None:
    installed = importlib.metadata.version(package).split("+")[0]
    assert installed == pins("constraints-integrations.txt")[package]


def test_the_pins_agree_with_those_of_the_ordinary_environment() -> None:
    here, base = pins("constraints-integrations.txt"), pins("constraints.txt")
    shared = here.keys() & base.keys()
    assert {"torch", "numpy", "pytest", "mypy", "ruff"} <= shared
    assert {name: here[name] for name in shared} == {name: base[name] for name in shared}
