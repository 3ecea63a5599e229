"""The examples that need Lightning and accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest

import marginflow as mf
from gallery import INTEGRATIONS, check_example

pytestmark = pytest.mark.integrations


@pytest.mark.parametrize("name", sorted(INTEGRATIONS))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "accuracy" in check_example(name, "--out", str(out))
    run = mf.load_run(out if (out / "run.json").exists() else out / "run")
    assert run.config["kind"] == "monitor"
