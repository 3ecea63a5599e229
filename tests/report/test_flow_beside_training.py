"""Reports of gradient flows beside training runs and beside each other, and of odd sets of runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from flow_runs import AGAINST, changed, column, panels

from marginflow.errors import InputError, RunError
from marginflow.report import (
    comparison,
    comparison_table,
    statement,
    write_report,
)
from marginflow.report._statement import caveats, question
from marginflow.report._tables import course_tables
from marginflow.runs import Run

Make = Callable[..., Run]


def test_a_training_run_beside_a_flow(flow: Run, descent: Run) -> None:
    found = panels(flow, descent)
    assert list(found) == [
        "Normalised margin γ̂_m",
        "Adversarial accuracy",
        "Clean accuracy",
        "Norm product ρ",
        "Margin against ln t",
        "Loss times t",
        "Angle of W and ∇L",
        "Alignment of the layers",
        "Distance to a KKT point",
    ]
    assert {panel.xlabel for panel in found.values()} == {"ln t"}
    margin = found["Normalised margin γ̂_m"]
    assert [curve.label for curve in margin.curves] == [
        "flow, γ̂_m",
        "flow, ℓ/ρ",
        "descent, γ̂_m",  # its ℓ/ρ is negative still
    ]
    training = margin.curves[2]
    # t = Σ η at the constant rate 0.1 of full-batch steps.
    steps = column(descent, "step")
    assert list(training.x) == pytest.approx([math.log(0.1 * step) for step in steps], abs=1e-9)
    assert list(training.y) == column(descent, "normalized_margin")
    # Near the flow, as gradient descent of small steps from the same weights has to be: at t = 1.
    there, here = (
        next(y for x, y in zip(curve.x, curve.y, strict=True) if abs(x) < 1e-6)
        for curve in (margin.curves[0], training)
    )
    assert here == pytest.approx(there, rel=0.05)
    loss = {curve.label: curve for curve in found["Loss times t"].curves}
    assert list(loss["descent"].y) == pytest.approx(
        [r["log_time"] + r["log_loss"] for r in descent.metrics[1:]]
    )
    assert [c.label for c in found["Angle of W and ∇L"].curves] == ["flow"]
    assert [c.label for c in found["Margin against ln t"].curves] == ["flow", "descent", "limit"]


def test_what_is_said_of_a_mixed_set(flow: Run, descent: Run) -> None:
    text = statement([flow, descent])
    assert "float64), flow ends with the largest normalised margin of 2 runs, γ̂_m = 0.24" in text
    assert "at ln t = 30 with" in text
    assert "after 40 epochs (ln t = 1.386) with" in text
    assert (
        question([flow, descent]) == "Which of these runs ends with the largest normalised margin?"
    )
    notes = caveats([flow, descent])
    assert notes[0].startswith("descent is a training run, drawn at t = Σ η")
    assert "(flow: ln t = 30; descent: ln t = 1.386)" in notes[1]
    assert "(flow: total; descent: detached)" in notes[2]
    assert "Momentum β" in caveats([flow, changed(descent, momentum=0.9)])[0]
    header, rows = comparison_table([flow, descent])
    table = {title: [row[k] for row in rows] for k, title in enumerate(header)}
    assert table["epochs"] == ["–", "40"]
    assert table["ln t"] == ["30", "1.386"]
    assert table["trained against"] == table["measured with"] == [AGAINST, AGAINST]
    assert table["end"] == ["goal reached", "–"]
    _, course = course_tables([flow, descent])
    assert course.header[:2] == ["epoch", "ln t"]
    assert course.rows[0][:2] == ["0", "−∞"]
    assert course.rows[-1][:2] == ["40", "1.386"]


def test_flows_that_agree_to_all_digits_are_called_the_same(flow: Run) -> None:
    close = changed(flow, "close")
    close.final["normalized_margin"] *= 1 + 1e-9
    assert "end with the same normalised margin to 6 digits, γ̂_m = 0.24" in statement([flow, close])
    assert "the same normalised margin, γ̂_m" in statement([flow, changed(flow, "same")])


def test_standard_training_beside_an_adversarial_flow(flow: Run, descent: Run) -> None:
    standard = changed(descent, "standard", attack="none")
    found = panels(flow, standard)
    assert [c.label for c in found["Margin against ln t"].curves] == ["flow", "limit"]
    # The loss it minimises is the mean over its epochs, not the one measured.
    curve = found["Loss times t"].curves[1]
    expected = [r["log_time"] + math.log(r["epoch_loss"]) for r in standard.metrics[1:]]
    assert list(curve.y) == pytest.approx(expected)
    header, rows = comparison_table([flow, standard])
    assert rows[1][header.index("ρ γ̂_m / ln t")] == "–"
    assert "adversarial training" not in statement([flow, standard])
    apart = statement([flow, changed(descent, measure_with="none", attack="none")])
    assert "under different perturbations, so their margins do not compare: flow ends" in apart
    assert "at ln t = 30, with" in apart
    assert "after 40 epochs (ln t = 1.386), with" in apart


def test_a_run_without_a_time_is_named_and_not_drawn(
    flow: Run, make_run: Make, tmp_path: Path
) -> None:
    old = make_run("old", attack=flow.config["attack"], data_sha256=flow.config["data_sha256"])
    found = panels(flow, old)
    assert all("old" not in c.label for panel in found.values() for c in panel.curves)
    said = "old does not record its time t: it is not drawn against ln t; its numbers are in the"
    assert any(note.startswith(said) for note in caveats([flow, old]))
    assert "of 2 runs" in statement([flow, old])
    page = write_report([flow, old], tmp_path / "page.html").read_text()
    assert "1,013" in page


def test_many_flows_have_no_bands_and_one_curve_each(flow: Run) -> None:
    found = panels(*(changed(flow, f"flow {k}") for k in range(4)))
    margins = found["Normalised margin γ̂_m"].curves
    assert [curve.label for curve in margins] == [f"flow {k}" for k in range(4)]
    assert not any(curve.low for curve in margins)
    assert len(found["Angle of W and ∇L"].curves) == 4


def test_a_margin_near_zero_is_shown_larger(flow: Run) -> None:
    near, far = changed(flow, "near"), changed(flow, "far")
    for record in near.metrics:
        record["normalized_margin"] *= 0.004
        record["normalized_margin_quantiles"] = [
            0.004 * v for v in record["normalized_margin_quantiles"]
        ]
    zoom = panels(near, far)["γ̂_m near zero"]
    assert zoom.xlabel == "ln t"
    assert [curve.label for curve in zoom.curves] == ["near, γ̂_m"]
    for record in near.metrics[2:]:  # a flow that ended before t = 1
        record["log_time"] = -2 - 1 / record["step"]
    assert panels(near, far)["γ̂_m near zero"].curves


def odd_flows(flow: Run, make_run: Make) -> dict[str, list[Run]]:
    """Sets of runs that are not as they should be."""
    start = changed(flow, "start", last=1, ended=None)
    early = changed(flow, "early", last=3, ended=None)
    holes = changed(flow, "holes")
    for k, record in enumerate(holes.metrics):
        for key in list(record):
            if key not in ("step", "log_time"):
                record[key] = (None, math.nan, math.inf, "broken", [])[k % 5]
    timeless = changed(flow, "timeless")
    for record in timeless.metrics:
        record["log_time"] = math.nan
    bare = Run({"kind": "flow"}, [{}])
    return {
        "start": [start],
        "early": [early],
        "holes": [holes],
        "timeless": [timeless],
        "bare": [bare],
        "start beside training": [start, make_run("old")],
        "start beside flow": [start, flow],
        "holes beside all": [flow, holes, make_run("old"), early, bare],
        "training beside start": [make_run("old"), start, bare],
    }


@pytest.mark.parametrize(
    "name",
    [
        "start",
        "early",
        "holes",
        "timeless",
        "bare",
        "start beside training",
        "start beside flow",
        "holes beside all",
        "training beside start",
    ],
)
def test_odd_sets_are_shown(flow: Run, make_run: Make, tmp_path: Path, name: str) -> None:
    runs = odd_flows(flow, make_run)[name]
    figure = comparison(runs)
    text = write_report(runs, tmp_path / "page.html").read_text()
    header, rows = comparison_table(runs)
    words = [statement(runs), *figure.notes, *header, *itertools.chain(*rows)]
    assert not [w for w in words if "None" in w or "nan" in w.split()]
    assert "None" not in text
    assert ">nan<" not in text
    assert (len(figure.panels) == 0) == (name in ("bare", "holes"))


def test_a_flow_at_its_start(flow: Run) -> None:
    start = changed(flow, "start", last=1, ended=None)
    assert ", at its start, t = 0, on " in statement([start])
    assert "it stands at t = 0 on its way to ln t = 30" in caveats([start])[0]
    assert {panel.xlabel for panel in comparison([start]).panels} == {"step"}
    assert comparison_table([start])[1][0][2] == "−∞"
    assert "start has no measurement after t = 0: it is not drawn" in " ".join(
        caveats([start, flow])
    )
    with pytest.raises(RunError, match="wait for its start to be measured"):
        comparison([changed(flow, last=0)])
    with pytest.raises(InputError, match=r"give a flow's \.run"):
        comparison([object()])  # type: ignore[list-item]
