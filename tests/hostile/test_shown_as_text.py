"""Whatever a file says is shown as text: on a page it is no markup, on a terminal no control sequence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_mutations import CONTROLS, MARKUP
from hostile_pages import NAME, kinds, marked_run, marked_sweep, parts
from hostile_runs import check, quiet

import marginflow as mf
from marginflow._reading import printable
from marginflow.report import write_report, write_sweep
from marginflow.sweeps import load_sweep

Copy = Callable[..., Path]


def harmless(page: str, plain: str) -> str:
    """Assert that a page has the elements and attributes of ``plain`` and no others; its text."""
    assert kinds(page) <= kinds(plain) | {("ul", ""), ("ul", "class"), ("li", ""), ("small", "")}
    elements, text = parts(page)
    for tag, attributes in elements:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/png;base64,"))
            if name in ("style", "id", "class", "fill", "stroke", "d", "transform"):
                assert "pwned" not in (value or "")
    assert "<script" not in page
    policy = [a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a]
    assert len(policy) == 1
    assert str(policy[0]).startswith(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
    )
    return text


def test_the_page_of_a_run(valid: Path, tmp_path: Path) -> None:
    run = marked_run(valid / "train", tmp_path / NAME, MARKUP)
    plain = write_report([mf.load_run(valid / "train")], tmp_path / "plain.html").read_text()
    page = write_report([mf.load_run(run)], tmp_path / "page.html", title=MARKUP).read_text()
    text = harmless(page, plain)
    assert text.count(MARKUP) > 40, "it is shown, as text"
    assert NAME in text
    assert "is left out" not in text, "certificate and bounds were read"
    for section in ("How far from a KKT point?", "Certified ≤ true ≤ attacked", "Hypotheses"):
        assert section in text


def test_the_page_of_several_runs_and_that_of_a_sweep(valid: Path, tmp_path: Path) -> None:
    one = marked_run(valid / "train", tmp_path / NAME, MARKUP)
    two = marked_run(valid / "train", tmp_path / "b" / NAME, MARKUP)
    runs = [mf.load_run(folder) for folder in (one, two)]
    plain = write_report([mf.load_run(valid / "train")] * 2, tmp_path / "plain.html").read_text()
    harmless(write_report(runs, tmp_path / "page.html").read_text(), plain)
    sweep = marked_sweep(valid / "sweep", tmp_path / "sweep", MARKUP)
    plain = write_sweep(load_sweep(valid / "sweep"), tmp_path / "plain.html").read_text()
    text = harmless(write_sweep(load_sweep(sweep), tmp_path / "page.html").read_text(), plain)
    assert text.count(MARKUP) > 5


@pytest.mark.parametrize(
    "marker", [CONTROLS, "[red]x[/red][link=file:///]y[/link][/]", "$\\frac{1}{"]
)
def test_the_terminal(valid: Path, tmp_path: Path, marker: str) -> None:
    """Nothing steers it, and markup of the library that prints tables is no markup here."""
    run = marked_run(valid / "train", tmp_path / f"a{marker.replace('/', '')}", marker)
    other = marked_run(valid / "train", tmp_path / "b", marker)
    said = ""
    for words in (
        ("compare", run, other),
        ("export", run, "--csv", "-"),
        ("report", run, "--out", tmp_path / "page.html"),
        ("measure", run),
        ("certify", run),
        ("verify", other),
        ("train", "--resume", "--quiet", "--out", other),
    ):
        ended = quiet(*words)
        check(ended)
        said += ended.out + ended.err
    assert printable(marker)[:4] in said
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said)
    if marker == CONTROLS:
        assert "�]0;pwned" in said
    else:
        assert marker[:4] in said, "nothing was taken for markup"


def test_verify_prints_what_looks_like_markup(copied: Copy) -> None:
    run = copied("run")
    content = json.loads((run / "run.json").read_text())
    for layer in content["layers"]:
        layer["name"] = "[red]layer[/red]"
    (run / "run.json").write_text(json.dumps(content | {"notes": ["[/]"], "lr": "[bold]0.1"}))
    ended = quiet("verify", run)
    check(ended)
    assert ended.code in (0, 1), ended.err
    assert "[bold]0.1" in ended.out


def test_a_folder_whose_name_is_no_text(copied: Copy, tmp_path: Path) -> None:
    """Names of files are bytes; what is no UTF-8 in them is shown as �."""
    run = copied("run").rename(tmp_path / "a\udcff\x1b[31mb")
    for words in (("compare", run, run), ("export", run, "--csv", "-"), ("measure", run)):
        ended = quiet(*words)
        check(ended)
        assert ended.code == 0, ended.err
        ended.out.encode()


def test_text_is_left_as_it_is() -> None:
    for text in ("γ̂_m ≤ 1/ε\n\tℓ∞-PGD", "ünïcödé 漢字 \U0001f600", "a\u00a0b", "−∞"):
        assert printable(text) == text
