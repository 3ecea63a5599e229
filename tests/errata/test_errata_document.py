"""docs/errata.md and the tests beside this file name each other, one to one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "errata.md").read_text(encoding="utf-8")
FIELDS = ("Printed", "Right", "Why", "Changes", "Test")


def entries() -> dict[str, str]:
    """Heading → body, of every ``### `` section."""
    parts = re.split(r"^### (.+)$", TEXT, flags=re.MULTILINE)
    found = dict(
        zip(parts[1::2], (re.split(r"^## ", b, flags=re.M)[0] for b in parts[2::2]), strict=True)
    )
    assert len(found) == len(parts) // 2, "two headings are the same"
    return found


def names(text: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", text)


def functions() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(Path(__file__).parent.glob("test_errata_*.py")):
        if path == Path(__file__):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert node.name not in found
                found[node.name] = path
    return found


ENTRIES, FUNCTIONS = entries(), functions()


def test_there_is_something_to_check() -> None:
    assert len(ENTRIES) >= 35
    assert len(FUNCTIONS) >= len(ENTRIES) - 2


@pytest.mark.parametrize("heading", ENTRIES)
def test_every_correction_has_its_fields_and_its_test(heading: str) -> None:
    body = ENTRIES[heading]
    assert re.findall(r"^- \*\*(\w+)\.\*\* \S", body, flags=re.MULTILINE) == list(FIELDS)
    named = names(body.split("- **Test.**")[1])
    assert named
    assert set(named) <= set(FUNCTIONS)
    assert re.search(r"Eq|Assumption|Lemma|Theorem|Section|Figure", heading), "name the place"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_test_belongs_to_one_correction(name: str) -> None:
    assert [h for h, body in ENTRIES.items() if name in names(body)] != []


def test_the_number_in_the_introduction() -> None:
    assert f"{len(ENTRIES)} corrections" in TEXT


def test_the_readme_leads_here() -> None:
    assert "(docs/errata.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
