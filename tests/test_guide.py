"""The guide's Python blocks run one after the other, as they stand; its gallery is that of examples/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gallery import FOLDER
from page_blocks import DOCS, run_page

GUIDE = DOCS / "in-your-project.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_page(GUIDE, tmp_path, monkeypatch) == 5
    lines = capsys.readouterr().out.splitlines()
    assert 0 <= float(lines[0]) <= 1
    assert "norm_product" in lines[1]
    assert "the module '2' (BatchNorm1d) does not scale" in lines[2]
    assert 0 <= float(lines[3]) <= 1
    assert lines[4] == "21"
    assert "Lemma 3" in lines[5]
    assert (tmp_path / "runs" / "mine" / "run.json").exists()


def test_the_gallery_is_complete() -> None:
    listed = re.findall(r"\]\(\.\./examples/(\w+\.py)\)", TEXT)
    assert sorted(listed) == sorted(path.name for path in FOLDER.glob("*.py"))
