"""The page of a sweep: what is drawn against what, and what is said, from made-up outcomes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from marginflow.experiments import Panel
from marginflow.report import sweep_statement, sweep_table, write_sweep
from marginflow.report._sweep_panels import MOST_CURVES, axes_of, sweep_panels
from marginflow.sweeps import Outcome, Sweep


def outcome(
    swept: Mapping[str, Any], margin: float | None = 0.1, *, residual: float | None = 0.5
) -> Outcome:
    """A finished trial; one without a margin has failed."""
    name = "_".join(f"{k}-{v}" for k, v in swept.items())
    final = {
        "epoch": 3,
        "normalized_margin": margin,
        "adversarial_accuracy": 0.75,
        "test_adversarial_accuracy": 0.5,
        "norm_product": 2.0,
    }
    failed = margin is None
    return Outcome(
        name=name,
        swept=swept,
        options={"attack": "fgsm:eps=0.1"},
        state="failed" if failed else "finished",
        attempts=2 if failed else 1,
        seconds=1.5,
        error="DivergedError: <b>it</b> diverged" if failed else None,
        final={} if failed else final,
        residual=None if failed else residual,
        uncertified=None,
        path=Path(name),
    )


def made(trials: Sequence[Outcome], **more: Any) -> Sweep:
    names = tuple(dict.fromkeys(name for t in trials for name in t.swept))
    given: dict[str, Any] = {
        "name": "made up",
        "path": Path("x"),
        "job": "train",
        "options": {"attack": "fgsm:eps=0.1", "data": "digits:3,8"},
        "swept": names,
        "certified": True,
        "trials": tuple(trials),
        "versions": {"torch": "2"},
    }
    return Sweep(**given | more)


def panels(sweep: Sweep) -> dict[str, Panel]:
    found = {}
    for part in sweep_panels(sweep):
        assert isinstance(part.panel, Panel)
        found[part.panel.title] = part.panel
    return found


@pytest.mark.parametrize(
    ("values", "label", "places"),
    [
        ([0.1, 0.2], "o", [0.1, 0.2]),
        ([1, 10], "o", [1, 10]),
        (["8/255", "16/255"], "o", [8 / 255, 16 / 255]),
        (["mlp:64", "mlp:256"], "o: mlp:…", [64, 256]),
        (["fgsm:eps=8/255", "fgsm:eps=16/255"], "o: fgsm:eps=…", [8 / 255, 16 / 255]),
        (["mlp:64,32", "mlp:64,8"], "o: mlp:64,…", [32, 8]),
        (["mlp:64,32", "mlp:32,64"], "o (see below)", [1, 2]),
        (["fgsm:eps=0.1", "fgm:eps=0.1"], "o (see below)", [1, 2]),
        ([True, False], "o (see below)", [1, 2]),
    ],
)
def test_where_values_stand(values: list[Any], label: str, places: list[float]) -> None:
    (axis,) = axes_of(made([outcome({"o": value}) for value in values]))
    assert (axis.label, [axis.places[value] for value in values]) == (label, places)
    assert bool(axis.key) == label.endswith("(see below)")


def test_means_and_bands_over_seeds() -> None:
    margins = {(lr, seed): lr * (1 + seed) for lr in (0.1, 0.2) for seed in (0, 1, 5)}
    sweep = made([outcome({"lr": lr, "seed": seed}, m) for (lr, seed), m in margins.items()])
    panel = panels(sweep)["Normalised adversarial margin against lr"]
    (curve,) = panel.curves
    assert list(curve.x) == [0.1, 0.2]
    for k, lr in enumerate(curve.x):
        values = [margins[lr, seed] for seed in (0, 1, 5)]
        assert curve.y[k] == pytest.approx(sum(values) / 3)
        assert (curve.low[k], curve.high[k]) == (min(values), max(values))
    assert not any("against seed" in title for title in panels(sweep))


def test_one_curve_for_each_choice_of_the_others_until_they_are_too_many() -> None:
    def of(count: int) -> Sweep:
        grid = itertools.product((0.1, 0.2), range(count))
        return made([outcome({"lr": lr, "k": k}, lr + k) for lr, k in grid])

    title = "Normalised adversarial margin against lr"
    few = panels(of(MOST_CURVES))[title]
    assert [curve.label for curve in few.curves] == [f"k = {k}" for k in range(MOST_CURVES)]
    assert [curve.y for curve in few.curves][3] == [0.1 + 3, 0.2 + 3]
    (one,) = panels(of(MOST_CURVES + 1))[title].curves
    assert one.y == pytest.approx([0.1 + 3.5, 0.2 + 3.5])
    assert (list(one.low), list(one.high)) == ([0.1, 0.2], [7.1, 7.2])


def test_scales_gaps_and_accuracies() -> None:
    trials = [outcome({"lr": lr}, lr, residual=r) for lr, r in ((1e-3, 1e-6), (0.1, None), (1, 1))]
    found = panels(made([*trials, outcome({"lr": 50.0}, None)]))
    residual = found["Residual of the KKT certificate against lr"]
    assert (residual.xscale, residual.yscale) == ("log", "log")
    assert (list(residual.curves[0].x), residual.curves[0].y) == ([1e-3, 1], [1e-6, 1])
    accuracy = found["Adversarial accuracy against lr"]
    assert [(c.label, c.dashed, set(c.y)) for c in accuracy.curves] == [
        ("test", False, {50.0}),
        ("train", True, {75.0}),
    ]


def test_what_is_said() -> None:
    sweep = made(
        [outcome({"lr": 0.1}, 0.02), outcome({"lr": 0.2}, 0.05), outcome({"lr": 9.0}, None)]
    )
    assert sweep_statement(sweep) == (
        "2 of 3 trials finished, 1 failed. The largest γ̂_m, 0.05000, has lr = 0.2, with an adversarial "
        "accuracy of 50.0% on test data; its KKT residual is 0.5000."
    )
    header, rows = sweep_table(sweep)
    assert header[0] == "trial"
    assert [row[:3] for row in rows] == [
        ["lr-0.1", "0.02000", "75.0%"],
        ["lr-0.2", "0.05000", "75.0%"],
    ]
    assert (
        sweep_statement(made([outcome({"lr": 1.0}, None)])) == "0 of 1 trials finished, 1 failed."
    )


def test_the_page_stands_alone_and_escapes(tmp_path: Path) -> None:
    sweep = made(
        [
            outcome({"lr": 0.1}),
            outcome({"lr": 0.2}, -1.0, residual=None),
            outcome({"lr": 9.0}, None),
        ],
        name="<script>alert(1)</script>",
    )
    page = write_sweep(sweep, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "DivergedError: &lt;b&gt;it&lt;/b&gt; diverged" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert page.count("<svg") == 3
    assert "1 of 2 trials do not classify every perturbed training example" in page
    assert "1 of 2 trials have no KKT certificate" in page
    assert write_sweep(sweep, tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_page_of_failures_only(tmp_path: Path) -> None:
    page = write_sweep(made([outcome({"lr": 1.0}, None)]), tmp_path / "r.html")
    text = page.read_text(encoding="utf-8")
    assert "0 of 1 trials finished, 1 failed." in text
    assert "<svg" not in text
