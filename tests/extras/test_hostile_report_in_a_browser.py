"""A run from a stranger in a real browser: its texts are shown, and nothing of them runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from real_browser import listened

import marginflow as mf
from marginflow.report import write_report, write_sweep
from marginflow.sweeps import load_sweep

sys.path.append(str(Path(__file__).parents[1] / "hostile"))

from hostile_mutations import MARKUP
from hostile_pages import NAME, marked_run, marked_sweep
from hostile_runs import make_all

pytestmark = pytest.mark.extras

# Scripts that are in the page, and whatever they would leave behind.
RAN = (
    "[window.pwned ?? null, document.scripts.length, document.querySelectorAll('[onerror]').length]"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stranger")
    make_all(folder)
    run = mf.load_run(marked_run(folder / "train", folder / "a" / NAME, MARKUP))
    sweep = load_sweep(marked_sweep(folder / "sweep", folder / "b", MARKUP))
    armed = folder / "armed.html"
    armed.write_text("<!DOCTYPE html><p>x</p><script>window.pwned=1</script>")
    return {
        "run": write_report([run], folder / "run.html"),
        "runs": write_report([run, run], folder / "runs.html"),
        "sweep": write_sweep(sweep, folder / "sweep.html"),
        "armed": armed,
    }


def ran(browser: Any, path: Path) -> tuple[list[Any], list[str], list[str], str]:
    """What is left of scripts; what the browser complained of; dialogs and requests; the text."""
    seen = listened(browser, 1280)
    events: list[str] = []
    seen.page.on("dialog", lambda dialog: (events.append("dialog"), dialog.dismiss()))
    seen.page.on("popup", lambda _: events.append("popup"))
    seen.page.goto(path.as_uri())
    seen.page.wait_for_timeout(300)
    found = seen.page.evaluate(RAN)
    text = seen.page.locator("body").inner_text()
    requests = [url for url in seen.requests if not url.startswith("data:image/png")]
    assert requests == [path.as_uri()]
    seen.page.close()
    return found, seen.complaints, events, text


@pytest.mark.parametrize("name", ["run", "runs", "sweep"])
def test_markup_is_shown_and_does_nothing(browser: Any, pages: dict[str, Path], name: str) -> None:
    found, complaints, events, text = ran(browser, pages[name])
    assert found == [None, 0, 0]
    assert complaints == []
    assert events == []
    assert text.count("<script>window.pwned=1</script>") > 3
    if name != "sweep":
        assert NAME[:20] in text
    assert os.path.getsize(pages[name]) > 10_000


def test_the_policy_stops_what_would_get_through(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    """Were a script in the page after all, the page's own policy would keep the browser from running it."""
    assert ran(browser, pages["armed"])[0][0] == 1, "scripts run in this browser"
    page = pages["run"].read_text().replace("</main>", "<script>window.pwned=1</script></main>")
    (tmp_path / "a.html").write_text(page)
    found, complaints, _, _ = ran(browser, tmp_path / "a.html")
    assert found[:2] == [None, 1]
    assert any("Content Security Policy" in said for said in complaints)
