"""docs/logging.md: its Python blocks and its commands run as they stand, in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

import marginflow as mf
from page_blocks import DOCS, blocks_of, run_page

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

PAGE = DOCS / "logging.md"


def test_the_page_runs(
    mlflow_experiment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = [block.language for block in blocks_of(PAGE) if block.runnable]
    assert ran == ["python", "bash", "python", "python", "bash"]
    assert run_page(PAGE, tmp_path, monkeypatch) == 5
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
