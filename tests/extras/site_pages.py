"""The built site (`make docs`), read without a browser: its pages, their links, their anchors."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "site"
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "audio": "src"}


@dataclass
class Page(HTMLParser):
    """What a page defines, links to, and loads."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link":
            self.loads.append(given["href"])
        elif tag in LOADED and LOADED[tag] in given:
            self.loads.append(given[LOADED[tag]])


def pages() -> dict[str, Page]:
    """Every page of the site, by its path. A site that is not there fails."""
    if not (SITE / "index.html").is_file():
        pytest.fail(f"no {SITE}/index.html; build the site first: make docs")
    found = {}
    for path in sorted(SITE.rglob("*.html")):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        found[path.relative_to(SITE).as_posix()] = page
    return found


def dead(site: dict[str, Page], name: str, link: str) -> str | None:
    """What is wrong with a link on the page ``name``, or None. Links to the world are not followed."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    file = (SITE / name).parent / unquote(parts.path) if parts.path else SITE / name
    if not file.is_file():
        return "no such file"
    there = site.get(file.resolve().relative_to(SITE.resolve()).as_posix())
    if parts.fragment and there is not None and unquote(parts.fragment) not in there.anchors:
        return "no such anchor"
    return None
