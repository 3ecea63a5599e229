"""A real browser for tests, and what it had to say about a page.

Debian's chromium, driven by playwright from the package index, which brings its driver and downloads
nothing. A browser that is missing fails the tests that need it: see CONTRIBUTING.md. On a machine that
cannot have one, MARGINFLOW_WITHOUT_BROWSER=1 skips them.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ADVICE = (
    "no chromium found; install it (Debian, Ubuntu: apt-get install chromium), or name one in "
    "MARGINFLOW_CHROMIUM; without one, MARGINFLOW_WITHOUT_BROWSER=1 skips this test"
)


@dataclass
class Opened:
    """A page in the browser, and what the browser had to say."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def chromium() -> str:
    named = os.environ.get("MARGINFLOW_CHROMIUM")
    for name in (named, "chromium", "chromium-browser", "google-chrome-stable", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    if os.environ.get("MARGINFLOW_WITHOUT_BROWSER") == "1":
        pytest.skip(ADVICE)
    pytest.fail(ADVICE)


def listened(browser: Any, width: int, scheme: str = "light") -> Opened:
    """An empty page whose complaints and requests are kept."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    seen = Opened(page)
    page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    return seen


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> Opened:
    """The file ``path`` in the browser."""
    seen = listened(browser, width, scheme)
    seen.page.goto(path.as_uri())
    return seen
