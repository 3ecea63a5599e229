"""Versions agree with each other, and what is deprecated goes when its time has come (docs/versions.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import marginflow as mf
from marginflow.certified import _saved
from marginflow.kkt import _run
from marginflow.runs import FORMAT_VERSION

ROOT = Path(__file__).resolve().parents[2]
WARNING = re.compile(r"deprecated since (\d+)\.(\d+), to be removed in (\d+)\.(\d+): use ")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def deprecations(source: str) -> Iterator[str]:
    """The texts of all warnings of the category DeprecationWarning in a module."""
    for node in ast.walk(ast.parse(source)):
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if isinstance(node, ast.Call) and "DeprecationWarning" in names and node.args:
            texts = [n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)]
            yield "".join(text for text in texts if isinstance(text, str))


def wrong(source: str, version: str) -> list[str]:
    """Deprecations that do not say what they must, leave too soon, or should have gone by ``version``."""
    found = []
    for text in deprecations(source):
        said = WARNING.search(text)
        if said is None:
            found.append(f"says not since when, until when and what instead: {text}")
            continue
        since, gone = (int(said[1]), int(said[2])), (int(said[3]), int(said[4]))
        if gone[0] == since[0] and gone[1] < since[1] + 2:
            found.append(f"leaves before two minor versions: {text}")
        elif numbers(version)[:2] >= gone:
            found.append(f"should have gone: {text}")
    return found


@pytest.mark.parametrize(
    ("text", "version", "fault"),
    [
        ("mf.old: deprecated since 0.3, to be removed in 0.5: use mf.new(…)", "0.4.2", None),
        ("mf.old: deprecated since 0.3, to be removed in 1.0: use mf.new(…)", "0.9.0", None),
        ("mf.old: deprecated since 0.3, to be removed in 0.5: use mf.new(…)", "0.5.0", "gone"),
        ("mf.old: deprecated since 0.3, to be removed in 0.4: use mf.new(…)", "0.3.0", "two minor"),
        ("mf.old is deprecated", "0.3.0", "since when"),
    ],
)
def test_the_check_of_deprecations(text: str, version: str, fault: str | None) -> None:
    source = f"import warnings\nwarnings.warn({text!r}, DeprecationWarning, stacklevel=2)\n"
    found = wrong(source, version)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_what_is_deprecated_says_so_and_goes_in_time() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert wrong(path.read_text(encoding="utf-8"), mf.__version__) == [], path


def test_the_version_is_one_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", mf.__version__)
    assert f"\nversion: {mf.__version__}\n" in read("CITATION.cff")


def test_the_changelog_is_in_order() -> None:
    text = read("CHANGELOG.md")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0].startswith(f"{mf.__version__} – ")
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) – \d{4}-\d\d-\d\d", h) for h in headings]
    done = [numbers(found[1]) for found in released if found]
    assert len(done) == len(headings) - (headings[0] == "Unreleased")
    assert done == sorted(set(done), reverse=True)
    parts = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert parts <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_page_tells_the_formats_and_pythons_of_the_code() -> None:
    page = " ".join(read("docs/versions.md").split())
    assert (FORMAT_VERSION, _run._FORMAT, _saved._FORMAT) == (1, 1, 1)
    assert "carry `format_version`, now 1 each" in page
    pythons = re.findall(r"Python :: (3\.\d+)", read("pyproject.toml"))
    assert f"| Python | {', '.join(pythons)} |" in page
