"""The report's section about certified bounds, on runs that have them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import marginflow as mf
from marginflow.certified import read_bounds
from marginflow.cli import main
from marginflow.report import write_report
from marginflow.report._bounds import bounds_section
from marginflow.report._text import format_percent

DATA = "digits:3,8,n=60"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with bounds at two ε and at one."""
    root = tmp_path_factory.mktemp("runs")
    for name, attacks in (("a", ("fgsm:eps=0.0001", "fgsm:eps=16/255")), ("b", ("fgm:eps=0.05",))):
        mf.train("mlp:6", DATA, attack=attacks[0], lr=0.1, epochs=4, out=root / name)
        options = [word for attack in attacks for word in ("--attack", attack)]
        assert main(["measure", str(root / name), "--certified", "norms", *options]) == 0
    return root


def test_the_sentence_the_table_and_the_curves(folder: Path) -> None:
    made, _ = bounds_section([mf.load_run(folder / "a")])
    kept = read_bounds(folder / "a")
    assert made is not None
    assert kept is not None
    small, large = kept["sandwiches"]
    (sentence,) = made.sentences
    assert sentence.startswith("Of the 60 training examples, so many stay rightly classified")
    assert small["certified_accuracy"] == small["adversarial_accuracy"]
    assert large["certified_accuracy"] < large["adversarial_accuracy"]
    low, high = (
        format_percent(large[key]) for key in ("certified_accuracy", "adversarial_accuracy")
    )
    assert (
        f"ε = 16/255 between {low} (certified by the layers’ norms) and {high} (left by FGSM)."
    ) in sentence
    same = format_percent(small["certified_accuracy"])
    assert f"ε = 0.0001 exactly {same} (certified by the layers’ norms, left by FGSM);" in sentence
    assert sentence.endswith(
        f"Without a perturbation it is {format_percent(kept['clean_accuracy'])}."
    )
    assert list(made.table.header) == ["", "ℓ∞, ε = 0.0001", "ℓ∞, ε = 16/255"]
    rows = {row[0]: row[1:] for row in made.table.rows}
    assert rows["certified accuracy"] == [
        format_percent(s["certified_accuracy"]) for s in (small, large)
    ]
    assert rows["seed"] == ["0", "0"]
    assert made.curves is not None
    attacked, certified = made.curves.panel.curves
    assert list(certified.x) == [0.0001, 16 / 255]
    assert list(certified.y) == [s["certified_accuracy"] for s in (small, large)]
    assert list(attacked.y) == [s["adversarial_accuracy"] for s in (small, large)]
    assert certified.dashed
    assert not attacked.dashed


def test_two_runs_of_two_norms(folder: Path) -> None:
    made, _ = bounds_section([mf.load_run(folder / name) for name in ("a", "b")])
    assert made is not None
    assert made.curves is None  # one axis cannot hold ε of two norms
    assert [sentence[:3] for sentence in made.sentences] == ["a: ", "b: "]
    assert made.table.header[-1] == "b, ℓ2, ε = 0.05"
    assert made.table.colors == {1: 0, 2: 0, 3: 1}


def test_on_the_page(folder: Path, tmp_path: Path) -> None:
    run = mf.load_run(folder / "a")
    source = write_report([run], tmp_path / "a.html").read_text(encoding="utf-8")
    assert '<h2 id="bounds">How robust, for certain?</h2>' in source
    assert "certified, attacked, width" in source
    assert len(re.findall(r"Accuracy against ε", source)) >= 1
    bare = tmp_path / "bare"
    shutil.copytree(folder / "a", bare, ignore=shutil.ignore_patterns("bounds.json"))
    assert bounds_section([mf.load_run(bare)]) == (None, [])
    source = write_report([mf.load_run(bare)], tmp_path / "b.html").read_text(encoding="utf-8")
    assert "bounds" not in source.lower().replace("bounds 0..1", "")


def test_what_has_to_be_said_beside_them(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    content = json.loads((run / "bounds.json").read_text())
    content["step"] = 1
    content["sandwiches"][1]["certified_accuracy"] = 0.0
    content["sandwiches"][0]["certified_reason"] = "auto-LiRPA is not installed"
    (run / "bounds.json").write_text(json.dumps(content))
    made, _ = bounds_section([mf.load_run(run)])
    assert made is not None
    reason, wide, stale = made.notes
    assert reason == "run: Auto-LiRPA is not installed."
    assert "too wide to say anything" in wide
    assert "bounded at step 1; the run has gone on" in stale


def test_a_page_says_that_bounds_are_damaged_and_goes_without(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run)
    content = json.loads((run / "bounds.json").read_text())
    del content["sandwiches"][0]["width_quantiles"]
    (run / "bounds.json").write_text(json.dumps(content))
    page = write_report([mf.load_run(run)], tmp_path / "a.html").read_text()
    assert "run: its certified bounds are left out: bounds.json is damaged" in page
    assert "make it again with marginflow measure --certified" in page
    assert "Certified ≤ true ≤ attacked" not in page
