"""The documentation site as a reader has it: opened from disk in a real browser, on a phone and on a desk.

Screenshots are kept in ``.artefacts/site/``, or in ``$MARGINFLOW_ARTEFACTS/site/``, to be looked at.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from real_browser import listened, opened
from site_pages import ROOT, SITE, pages

pytestmark = pytest.mark.extras

WIDTHS = {"phone": 390, "desk": 1280}
KEPT = Path(os.environ.get("MARGINFLOW_ARTEFACTS") or ROOT / ".artefacts") / "site"
LOOKED_AT = ("index.html", "results.html", "api/attacks.html", "in-your-project.html")

# What stands out of the page without a way to scroll there: wider than the window, with nothing
# around it that scrolls.
CUT = """() => {
  const scrolls = e => { for (; e; e = e.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const wide = document.documentElement.clientWidth + 1;
  return [...document.querySelectorAll(".md-content *")]
    .filter(e => e.getClientRects().length && e.getBoundingClientRect().right > wide && !scrolls(e))
    .map(e => e.tagName + " " + e.textContent.trim().slice(0, 60));
}"""


@pytest.fixture(scope="module")
def names() -> list[str]:
    return sorted(name for name in pages() if name != "404.html")


@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_opens_from_disk(browser: Any, names: list[str], width: str) -> None:
    """Without a word on the console, without the network, and no wider than the window."""
    seen = opened(browser, SITE / "index.html", WIDTHS[width])
    for name in names:
        seen.page.goto((SITE / name).as_uri())
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width], name
        assert seen.page.evaluate(CUT) == [], name
        # Those below the fold, too, and at the size of the picture.
        broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert seen.page.evaluate(broken) == [], name
        assert seen.complaints == [], name
    assert len(seen.requests) > 100
    assert [url for url in seen.requests if not url.startswith(("file://", "data:"))] == []
    seen.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_to_be_looked_at(browser: Any, width: str, scheme: str) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    papers = set()
    for name in LOOKED_AT:
        page = opened(browser, SITE / name, WIDTHS[width], scheme).page
        kept = KEPT / f"{name.replace('/', '-').removesuffix('.html')}-{width}-{scheme}.png"
        page.screenshot(path=kept, full_page=name == "index.html")
        assert kept.stat().st_size > 10_000
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        papers.add(sum(int(part) for part in color[4:-1].split(",")[:3]) > 380)
        page.close()
    assert papers == {scheme == "light"}


def search(page: Any, width: str, words: str) -> list[str]:
    """Type into the search; where the results lead."""
    if width == "phone":
        page.locator("label[for=__search].md-header__button").click()
    box = page.locator("input.md-search__input")
    box.click()
    box.press_sequentially(words)
    results = page.locator(".md-search-result__item a.md-search-result__link")
    results.first.wait_for(timeout=20_000)
    # In one go: results are still being added and exchanged while they are read.
    return results.evaluate_all("links => links.map(link => link.getAttribute('href'))")


@pytest.mark.parametrize("width", WIDTHS)
def test_search_from_disk(browser: Any, width: str) -> None:
    seen = opened(browser, SITE / "index.html", WIDTHS[width])
    found = search(seen.page, width, "certificate")
    assert any("certificates.html" in link for link in found), found
    seen.page.locator(".md-search-result__item a.md-search-result__link").first.click()
    seen.page.wait_for_url(lambda url: "index.html" not in url)
    assert seen.page.url.startswith("file://")
    assert "certificate" in seen.page.locator("article").inner_text().lower()
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file://", "data:"))] == []
    seen.page.close()


def test_search_finds_a_name_and_nothing_where_there_is_nothing(browser: Any) -> None:
    page = opened(browser, SITE / "api" / "runs.html", 1280).page
    assert any(
        "#marginflow.detect_overfitting" in s for s in search(page, "desk", "detect_overfitting")
    )
    page.locator("input.md-search__input").fill("")
    page.locator("input.md-search__input").press_sequentially("xylophone")
    page.locator(".md-search-result__meta", has_text="No matching documents").wait_for()
    assert page.locator(".md-search-result__item").count() == 0
    page.close()


@pytest.fixture
def served() -> Iterator[str]:
    """The site on a server of this machine, below a folder as on many hosts."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_request(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/{SITE.name}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_search_when_served(browser: Any, served: str) -> None:
    seen = listened(browser, 1280)
    seen.page.goto(f"{served}index.html")
    assert any("certificates.html" in link for link in search(seen.page, "desk", "certificate"))
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith((served, "data:", "blob:"))] == []
    seen.page.close()
