"""The same seed gives the same bits: every command, in two fresh processes that have little in common."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import every_command
import pytest

from marginflow.cli._app import app

# Files that hold a time or a place, with what is left out of each. Everything else is compared byte by byte.
LEFT_OUT: dict[str, str] = {
    "checkpoints/*.json": r'"elapsed_seconds": [\d.e-]+',
    "sweep/*.jsonl": r'"seconds": [\d.]+',
    "sweep/results.csv": r"(?<=finished,1,)[\d.]+",  # the column of seconds
    "sweep/report.html": r"(?<=<td>2</td>\n<td>)[\d.]+(?=</td>\n</tr>)",
    "reproduce/index.html": r"(?<=The trainings took )[\d.]+ (s|min)",
    "reproduce/fig*.json": r'"training_seconds": [\d.]+',
}
COMMANDS = every_command.MAKERS | every_command.READERS | every_command.SHOWERS
PRINTED = r"\d+(\.\d+)? (s|min)\b"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two processes: another hash seed, place, time zone, language, order of commands."""
    places = tmp_path_factory.mktemp("here") / "one", tmp_path_factory.mktemp("elsewhere") / "one"
    settings = [
        ("forwards", {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C.UTF-8"}),
        ("backwards", {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C"}),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "COLUMNS"))}
    running = [
        subprocess.Popen(
            [sys.executable, every_command.__file__, str(place), order],
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for place, (order, variables) in zip(places, settings, strict=True)
    ]
    for process in running:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text.decode()
    return places


def results(place: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(place.with_suffix(".json").read_text())
    return found


def test_every_command_is_among_them() -> None:
    commands = {words[0] for words in COMMANDS.values()}
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert commands == known


def test_every_command_works(both: tuple[Path, Path]) -> None:
    for place in both:
        for name, result in results(place).items():
            # 1: a statement fails, a goal is not reached, a claim is not
            assert result["code"] in (0, 1), f"{name}: {result['err']}"
            assert "Traceback" not in result["err"]


def test_every_command_prints_the_same(both: tuple[Path, Path]) -> None:
    one, two = map(results, both)
    assert one.keys() == two.keys()
    for name in one:
        for stream in ("out", "err"):
            assert shown(one[name][stream]) == shown(two[name][stream]), name
        assert one[name]["code"] == two[name]["code"], name


def shown(text: str) -> str:
    # A line that holds a time may break elsewhere.
    return " ".join(re.sub(PRINTED, "TIME", text).split())


def test_every_file_is_the_same(both: tuple[Path, Path]) -> None:
    one, two = (
        {str(p.relative_to(b)): p for p in sorted(b.rglob("*")) if p.is_file()} for b in both
    )
    assert one.keys() == two.keys()
    differing = [name for name in one if content(one[name], both[0]) != content(two[name], both[1])]
    assert differing == []
    kinds = {Path(name).suffix for name in one}
    assert {".json", ".jsonl", ".safetensors", ".html", ".svg", ".csv", ".png"} <= kinds
    assert len(one) > 150


def content(path: Path, root: Path) -> bytes:
    data = path.read_bytes()
    name = str(path.relative_to(root))
    for pattern, time in LEFT_OUT.items():
        if Path(name).match(pattern):
            data = re.sub(time.encode(), b"TIME", data)
    return data
