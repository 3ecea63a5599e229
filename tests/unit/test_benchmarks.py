"""The benchmarks' command lines: `make bench` gives each of them --short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("[!_]*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_says_how_it_is_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # as Python itself does for a script
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    shared = {path.stem for path in FOLDER.glob("_*.py")}
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
    finally:
        for module in shared:
            sys.modules.pop(module, None)
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--short" in printed
    assert printed.startswith(f"usage: {name}")
