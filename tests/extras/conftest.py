"""A real browser, for a module of tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from real_browser import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        pytest.fail(f"playwright: {error}; install it with pip install 'marginflow[browser]'")
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
