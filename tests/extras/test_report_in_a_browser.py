"""The report as a reader has it: in a real browser, on a phone and on a desk, light, dark, on paper.

The screenshots and the printed page are kept in ``.artefacts/report/``, or in
``$MARGINFLOW_ARTEFACTS/report/``, to be looked at.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from real_browser import opened

import marginflow as mf
from marginflow.cli import main
from marginflow.report import write_report

pytestmark = pytest.mark.extras

ROOT = Path(__file__).parents[2]
WIDTHS = {"phone": 360, "desk": 1280}
KEPT = Path(os.environ.get("MARGINFLOW_ARTEFACTS") or ROOT / ".artefacts") / "report"

# What a reader could not read: text whose contrast with the paper behind it is below 4.5 (WCAG AA).
FAINT = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const paper = element => {
    for (; element; element = element.parentElement) {
      const color = rgb(getComputedStyle(element).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !element.getClientRects().length || element.closest("svg")) continue;
    const [low, high] = [luminance(rgb(getComputedStyle(element).color)), luminance(paper(element))]
      .sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) found.push(`${text.slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  return found;
}"""

# Text that is cut: wider than its box, without the reader being able to scroll there.
# On a phone the titles of columns of sentences are there for screen readers only.
CUT = """() => {
  const hidden = e => (e.closest("thead")?.getBoundingClientRect().width ?? 9) <= 1;
  return [...document.querySelectorAll("h1, h2, h3, p, li, th, td, figcaption, dt, dd, pre")]
  .filter(e => e.getClientRects().length && !hidden(e) && e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).overflowX === "visible")
  .map(e => e.textContent.trim().slice(0, 60));
}"""

# Each drawing's curves: strokes in a curve's colour that are longer than a legend's or a tick's.
CURVES = """() => [...document.querySelectorAll("figure svg")].map(svg => {
  const long = [...svg.querySelectorAll("path")].filter(path => {
    const stroke = path.style.stroke || path.getAttribute("stroke") || "";
    return stroke.includes("--fig-curve") && path.getTotalLength() > 30;
  });
  const {width, height} = svg.getBoundingClientRect();
  return {curves: long.length, width, height, label: svg.getAttribute("aria-label") || "",
          colors: new Set(long.map(path => getComputedStyle(path).stroke)).size};
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pair of training runs on images with certificates and bounds, a deep linear run with its verdicts."""
    root = tmp_path_factory.mktemp("runs")
    for name, attack in (("fgsm", "fgsm:eps=0.1"), ("standard", "none")):
        mf.train(
            "mlp:32",
            "digits:3,8",
            attack=attack,
            measure_with="fgsm:eps=0.1",
            batch_size=32,
            epochs=40,
            out=root / name,
        )
        assert main(["certify", str(root / name), "--fitted-only"]) == 0
        bounded = ["measure", str(root / name), "--certified", "auto"]
        assert main([*bounded, "--attack", "fgsm:eps=0.02", "--attack", "fgsm:eps=0.1"]) == 0
    mf.train(
        "deep-linear:5,4",
        "separable:n=20,d=6,margin=0.3",
        attack="exact-linear:p=2,eps=0.1",
        lr="loss-based:a=0.1",
        epochs=300,
        dtype="float64",
        out=root / "linear",
    )
    assert main(["verify", str(root / "linear")]) == 0
    pair = [mf.load_run(root / name) for name in ("fgsm", "standard")]
    return {
        "pair": write_report(pair, root / "pair.html"),
        "linear": write_report([mf.load_run(root / "linear")], root / "linear.html"),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["pair", "linear"])
def test_the_page_in_a_browser(
    browser: Any, pages: dict[str, Path], name: str, width: str, scheme: str
) -> None:
    seen = opened(browser, pages[name], WIDTHS[width], scheme)
    page = seen.page
    KEPT.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=KEPT / f"{name}-{width}-{scheme}.png", full_page=True)
    try:
        assert seen.complaints == []
        assert seen.requests == [pages[name].as_uri()]
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
        assert page.evaluate(CUT) == []
        assert page.evaluate(FAINT) == []

        drawings = page.evaluate(CURVES)
        assert len(drawings) == page.locator("figure").count() >= 5
        for drawing in drawings:
            assert drawing["curves"] >= 1, drawing
            assert drawing["colors"] >= 1
            assert drawing["width"] >= 280
            assert drawing["height"] >= 150
            assert any(character.isdigit() for character in drawing["label"])
        if name == "pair":
            assert all(drawing["colors"] == 2 for drawing in drawings)
            assert page.locator("img").count() >= 4  # of the support, as given and perturbed
        assert page.evaluate("[...document.images].every(i => i.alt && i.naturalWidth > 0)")

        tables = page.locator("table")
        assert tables.count() >= 5
        for k in range(tables.count()):
            assert tables.nth(k).locator("tbody tr").count() >= 1
        assert "γ̂m\u00a0=\u00a0" in page.locator(".answer").inner_text()
        if name == "linear":
            assert page.locator(".verdict.holds").count() >= 5
            assert page.locator(".verdict.fails").count() == 0
    finally:
        page.close()


def test_dark_is_dark_and_light_is_light(browser: Any, pages: dict[str, Path]) -> None:
    sums = {}
    for scheme in ("light", "dark"):
        page = opened(browser, pages["pair"], 360, scheme).page
        for place in ("body", "figure"):
            color = page.evaluate(
                f"getComputedStyle(document.querySelector('{place}')).backgroundColor"
            )
            sums[scheme, place] = sum(int(part) for part in color[4:-1].split(","))
        page.close()
    assert min(sums["light", place] for place in ("body", "figure")) > 700
    assert max(sums["dark", place] for place in ("body", "figure")) < 120


def test_on_paper(browser: Any, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["linear"], 1280, "dark").page
    KEPT.mkdir(parents=True, exist_ok=True)
    printed = page.pdf(path=KEPT / "linear.pdf", format="A4", prefer_css_page_size=True)
    assert printed.startswith(b"%PDF")
    assert 3 <= printed.count(b"/Type /Page\n") <= 12
    page.emulate_media(media="print", color_scheme="dark")
    # Black on white, whatever the screen; nothing wider than A4 less its margins, 182 mm.
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(FAINT) == []
    page.set_viewport_size({"width": 688, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    assert page.evaluate(CUT) == []
    page.close()
