"""The Python blocks of docs/attack-libraries.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from marginflow.attacks import build
from page_blocks import DOCS, run_page

PAGE = DOCS / "attack-libraries.md"
TEXT = PAGE.read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.extras,
    # foolbox imports scipy.ndimage.filters, which scipy 2 will not have.
    pytest.mark.filterwarnings(
        "ignore:Please import `gaussian_filter` from the `scipy.ndimage` namespace:DeprecationWarning"
    ),
]


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_page(PAGE, tmp_path, monkeypatch) == 2
    out = capsys.readouterr().out
    for said in ("torchattacks:PGDL2", "foolbox:Linf", "art:Fast", "autoattack-linf", "Robust"):
        assert said in out


def test_its_specification_strings_are_attacks() -> None:
    strings = re.findall(r"--attack (\S+)", TEXT)
    assert len(strings) == 4
    assert all(build(spec) is not None for spec in strings)
