"""The documentation site on disk: no dead link, nothing fetched from elsewhere, every name findable."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from site_pages import ROOT, SITE, Page, dead, pages

import marginflow as mf

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def site() -> dict[str, Page]:
    return pages()


def test_every_page_of_docs_is_there(site: dict[str, Page]) -> None:
    wanted = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
    }
    assert sorted(wanted - set(site)) == []
    examples = {f"repository/examples/{path.name}.html" for path in ROOT.glob("examples/*.py")}
    assert sorted(examples - set(site)) == []


def test_no_link_is_dead(site: dict[str, Page]) -> None:
    # The page of missing pages speaks of the server's root, wherever that will be.
    links = [(n, link) for n, page in site.items() if n != "404.html" for link in page.links]
    assert len(links) > 1000
    assert [(*pair, why) for pair in links if (why := dead(site, *pair)) is not None] == []


def test_dead_links_would_be_seen(site: dict[str, Page]) -> None:
    assert dead(site, "api/runs.html", "../flow.html#the-work") is None
    assert dead(site, "api/runs.html", "flow.html#marginflow.gradient_flow") is None
    assert dead(site, "api/runs.html", "../flow.html#nowhere") == "no such anchor"
    assert dead(site, "api/runs.html", "nothing.html") == "no such file"


def test_nothing_is_loaded_from_elsewhere(site: dict[str, Page]) -> None:
    loads = [(n, file) for n, page in site.items() if n != "404.html" for file in page.loads]
    assert len(loads) > 200
    assert [pair for pair in loads if pair[1].startswith("//") or dead(site, *pair)] == []
    assert [pair for pair in loads if re.match(r"(?!data:)\w+:", pair[1])] == []
    for style in SITE.rglob("*.css"):
        found = re.findall(
            r"url\(\s*['\"]?(?:https?:)?//[^)]*\)", style.read_text(encoding="utf-8")
        )
        assert found == [], style


def test_every_public_name_can_be_searched_for() -> None:
    index = json.loads((SITE / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[2] for entry in index["docs"]}
    names = {f"marginflow.{n}" for n in mf.__all__ if not inspect.ismodule(getattr(mf, n))}
    assert len(names) > 25
    assert sorted(names - found) == []


def test_docstrings_have_lost_the_marks_of_sphinx() -> None:
    for path in (SITE / "api").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r":(?:func|class|meth|attr|data|mod|exc):", text) == [], path
        assert "<autoref" not in text, path
