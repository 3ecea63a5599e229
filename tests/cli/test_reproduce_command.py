"""``marginflow reproduce`` at tiny settings: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from marginflow import experiments
from marginflow.cli import main
from marginflow.cli._reproduce import _chosen, verdict_lines
from marginflow.theorems import Verdict


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures 4 and 6 and the matrix, in a second."""
    small = {
        "fig4": {"model": "mlp:8", "epochs": 4},
        "fig6": {"epochs": 50},
        "cross": {"model": "mlp:8", "epochs": 2},
    }
    for name, changes in small.items():
        scales = experiments.EXPERIMENTS[name]
        changed = dataclasses.replace(scales["demo"], **changes)  # type: ignore[arg-type]
        monkeypatch.setitem(scales, "demo", changed)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_tiny")
def test_figures_numbers_and_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures"
    command = ["reproduce", "cross", "fig6", "fig4", "--jobs", "1", "--out", str(out)]
    assert main([*command, "--format", "svg"]) == 0
    streams = capsys.readouterr()
    text = streams.out
    assert max(cell_len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80
    titles = [text.index(t) for t in ("Figure 4:", "Figure 6:", "Trained against one")]
    assert titles == sorted(titles), "in their order, however they were asked for"
    assert "[not reached] Figure 4: every perturbed training example" in text
    assert "advice: train longer" in text
    assert "No classifier withstands" in text
    assert "100 % not reached" in text
    assert "3 figures in" in text
    assert streams.err.count("seed0:") == 2 + 3 + 5, "a line for each training"

    for name in ("fig4", "fig6", "cross"):
        assert (out / f"{name}.svg").read_bytes().startswith(b"<?xml")
        content = json.loads((out / f"{name}.json").read_text())
        assert (content["figure"], content["scale"], content["seeds"]) == (name, "demo", [0])
        assert content["verdicts"]
        assert content["origin"]["versions"]["torch"]
    margins = json.loads((out / "fig4.json").read_text())["courses"][0]["normalized_margin"]
    assert list(margins) == ["4"], "the last epoch, for want of a tenth"
    page = (out / "index.html").read_text()
    for words in ("Figure 4:", "Figure 6:", "No classifier withstands", "not reached", "<svg"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert f"marginflow reproduce cross fig6 fig4 --scale demo --out {out}" in page

    # Again: everything is read, the bytes are the same.
    before = (out / "fig4.svg").read_bytes(), (out / "cross.svg").read_bytes()
    assert main([*command, "--format", "svg", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert ((out / "fig4.svg").read_bytes(), (out / "cross.svg").read_bytes()) == before


@pytest.mark.usefixtures("_tiny")
def test_the_page_keeps_the_figures_of_earlier_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--jobs", "1", "--quiet", "--format", "svg", "--out"]
    assert main(["reproduce", "fig4", "cross", *common, str(tmp_path / "one")]) == 0
    assert "before" not in capsys.readouterr().out
    assert main(["reproduce", "cross", *common, str(tmp_path / "two")]) == 0
    assert main(["reproduce", "fig4", *common, str(tmp_path / "two")]) == 0
    assert "on the page, as they were made before: cross\n" in capsys.readouterr().out
    once, twice = ((tmp_path / name / "index.html").read_text() for name in ("one", "two"))
    shown = [re.sub(r"took \d+ s ", "", p.partition("How to reproduce")[0]) for p in (once, twice)]
    assert shown[0] == shown[1]
    for name in ("fig4", "cross"):
        assert f"marginflow reproduce {name} --scale demo --out {tmp_path / 'two'}" in twice

    # Neither another scale nor a damaged file is shown, and neither is touched.
    stored = tmp_path / "two" / "cross.json"
    whole = stored.read_text()
    panels = json.loads(whole) | {"panels": [{"title": 3}]}
    damaged = ["", "[]", whole[:-20], json.dumps(panels)]
    for content in (whole.replace('"scale": "demo"', '"scale": "mnist"'), *damaged):
        stored.write_text(content)
        assert main(["reproduce", "fig4", *common, str(tmp_path / "two")]) == 0
        assert ("cross is left out of the page" in capsys.readouterr().err) == (content in damaged)
        assert stored.read_text() == content
        page = (tmp_path / "two" / "index.html").read_text()
        assert "Figure 4:" in page
        assert "Trained against one" not in page


def test_groups_of_figures() -> None:
    assert _chosen(["paper"]) == [f"fig{k}" for k in range(1, 8)]
    assert _chosen(["ours"]) == ["tradeoff", "cross", "overfitting", "scale-trap"]
    assert _chosen(["all"]) == list(experiments.EXPERIMENTS)
    assert _chosen(["cross", "fig2", "fig2"]) == ["fig2", "cross"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fig8"], "did you mean 'fig"),
        (["fig4", "--scale", "papre"], "did you mean 'paper'"),
        (["fig4", "--format", "jpg"], "--format"),
        (["fig4", "--seeds", "0"], "--seeds"),
        (["fig4", "--seed", "-1"], "--seed"),
        (["fig4", "--jobs", "-1"], "--jobs"),
        (["fig4", "--threads", "0"], "--threads"),
        (["fig1", "--scale", "mnist", "--data-dir", "/nonexistent"], "data-dir"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "--jobs", "1", *words, "--out", str(tmp_path / "x")]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ")
    assert message in streams.err


def test_a_file_in_the_place_of_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["reproduce", "fig4", "--out", str(tmp_path / "file")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_verdict_in_lines() -> None:
    verdict = Verdict(
        "Figure 9", "claim " * 20, (), "q", "p", "number " * 30, "t", "not reached", "train longer"
    )
    lines = verdict_lines(verdict).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("  [not reached] Figure 9: claim")
    assert lines[-1] == "      advice: train longer"


def test_help_shows_a_whole_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["reproduce", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example: marginflow reproduce fig1 fig2 --scale mnist" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
