"""docs/theory.md maps every statement that is judged to its file, and its links lead somewhere."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

import marginflow as mf

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "theory.md"
TEXT = PAGE.read_text(encoding="utf-8")
STATEMENTS = ROOT / "src" / "marginflow" / "theorems"
LINKS = [target for _, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", TEXT)]


def github_slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    kept = "".join(c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LNM")
    return kept.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, and explicit ones."""
    text = page.read_text(encoding="utf-8")
    headings = [h.replace("`", "") for h in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)]
    return {*map(github_slug, headings), *re.findall(r'<a id="([^"]+)">', text)}


def rows() -> dict[str, str]:
    """Statement → target of its link, of the tables of the map."""
    text = TEXT.split("## The map")[1].split("### Hypotheses")[0]
    return dict(re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \|", text, flags=re.MULTILINE))


def test_every_statement_that_is_judged_has_its_row() -> None:
    run = mf.train("mlp:4", "digits:3,8,n=20", attack="fgsm:eps=0.1", epochs=1)
    judged = [verdict.statement for verdict in mf.verify(run)]
    assert sorted(rows()) == sorted(judged)


def test_each_row_names_the_file_that_makes_the_claim() -> None:
    for statement, target in rows().items():
        source = (PAGE.parent / target).read_text(encoding="utf-8")
        name, _, part = statement.partition(" (")
        assert f'"{statement}"' in source or (f'"{name} (' in source and f'"{part[:-1]}"' in source)


def test_every_file_of_a_statement_is_linked() -> None:
    files = {path.name for path in STATEMENTS.glob("*.py") if not path.name.startswith("_")}
    linked = {Path(target).name for target in LINKS if "/theorems/" in target}
    assert files - {"audit.py"} <= linked


@pytest.mark.parametrize("target", sorted(set(LINKS)))
def test_every_link_leads_somewhere(target: str) -> None:
    name, _, anchor = target.partition("#")
    page = (PAGE.parent / name).resolve() if name else PAGE
    assert page.is_file()
    assert not anchor or anchor in anchors(page)
