"""The environment of these tests is the pinned one, and its pins are those of the ordinary one."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.integrations

ROOT = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = dict(re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE))
    for other in re.findall(r"^-r (\S+)$", text, re.MULTILINE):
        found |= pins(other)
    return found


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
