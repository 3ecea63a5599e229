"""A run and a sweep of which every text is markup, and what an HTML page is made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hostile_mutations import places

NAME = "<script>window.pwned=1<img src=x onerror=window.pwned=1>\"'"
"""For a folder, whose name holds no slash."""

_KEPT = {
    "kind", "derivative", "dtype", "sha256", "p", "certified_by", "outcome", "trial", "job",
}  # fmt: skip
"""Keys whose text has to be one of a few."""


def marked(path: Path, marker: str) -> int:
    """Put ``marker`` behind every text in a JSON file, or in lines of them; how many there were."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    count, written = 0, []
    for line in lines:
        content = json.loads(line)
        for inside, key in places(content):
            if isinstance(inside[key], str) and key not in _KEPT:
                inside[key] = _with(inside[key], marker)
                count += 1
        written.append(json.dumps(content))
    path.write_text("\n".join(written) + "\n")
    return count


def _with(text: str, marker: str) -> str:
    return f"{text}{marker}"


def marked_run(run: Path, target: Path, marker: str) -> Path:
    """A copy of ``run`` under ``target`` whose every file says ``marker``; its path."""
    shutil.copytree(run, target, symlinks=True)
    for name in ("run.json", "verdicts.json", "audit.json", "certificate.json", "bounds.json"):
        assert marked(target / name, marker)
    lines = (target / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"method": marker, marker: marker} for line in lines]
    (target / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return target


def marked_sweep(sweep: Path, target: Path, marker: str) -> Path:
    """A copy of ``sweep`` likewise; its trials keep their names, and one of them has failed."""
    shutil.copytree(sweep, target, symlinks=True)
    path = target / "sweep.json"
    content: dict[str, Any] = json.loads(path.read_text())
    names = [trial.pop("name") for trial in content["trials"]]
    path.write_text(json.dumps(content))
    assert marked(path, marker)
    content = json.loads(path.read_text())
    for trial, name in zip(content["trials"], names, strict=True):
        trial["name"] = name
        trial["swept"] = {f"{k}{marker}": f"{v}{marker}" for k, v in trial["swept"].items()}
    content["versions"][marker] = marker
    path.write_text(json.dumps(content))
    failed = {"trial": names[0], "outcome": "failed", "error": marker, "certificate": marker}
    with (target / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(failed) + "\n")
    return target


class _Parts(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parts(page: str) -> tuple[list[tuple[str, dict[str, str | None]]], str]:
    """The elements of a page with their attributes, and its text."""
    parser = _Parts()
    parser.feed(page)
    parser.close()
    return parser.elements, "".join(parser.text)


def kinds(page: str) -> set[tuple[str, str]]:
    """Which elements a page has, with which attributes."""
    elements, _ = parts(page)
    return {(tag, name) for tag, attributes in elements for name in ("", *attributes)}


Draw = Callable[[Path], str]
