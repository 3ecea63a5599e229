"""docs/logging.md: its Python blocks and its commands run as they stand, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import marginflow as mf
from marginflow.cli import main

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "logging.md"
PARTS = re.compile(r"```python\n(.*?)```|^    (marginflow [^\n]*)$", re.DOTALL | re.MULTILINE)


def test_the_page_runs(
    mlflow_experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = PARTS.findall(PAGE.read_text(encoding="utf-8").replace("\\\n", ""))
    assert [bool(block) for block, _ in parts] == [True, *[False] * 2, *[True] * 2, *[False] * 3]
    names: dict[str, object] = {}
    for block, command in parts:
        if block:
            exec(block, names)
        else:
            assert main(shlex.split(command)[1:]) == 0, command
    out = capsys.readouterr().out
    assert "\ndone\n" in out
    assert out.splitlines()[-1].startswith("180,20,"), "the CSV on standard output"
    assert len(mf.load_run("runs/other").metrics) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "both.parquet",
        "logged.csv",
        "runs",
    ]
    for run in ("logged", "other"):
        assert (tmp_path / "runs" / run / "mlflow.json").exists()
        assert any((tmp_path / "runs" / run / "tensorboard").iterdir())
