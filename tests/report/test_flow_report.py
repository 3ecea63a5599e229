"""Reports of gradient flows, against ln t."""

from __future__ import annotations

import itertools
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from flow_runs import AGAINST, ATTACK, DATA, changed, column, panels
from rich.cells import cell_len

import marginflow as mf
from marginflow.cli import main
from marginflow.monitor import QUANTILES
from marginflow.report import (
    comparison,
    comparison_table,
    draw,
    statement,
    write_report,
)
from marginflow.report._clock import format_log_time
from marginflow.report._command import reproduction
from marginflow.report._flow_words import followed, integrators
from marginflow.report._settings import settings_table
from marginflow.report._statement import caveats, default_title, question, setting
from marginflow.report._svg import describe, symbols
from marginflow.report._tables import course_tables
from marginflow.report._text import format_short, format_ticks
from marginflow.runs import Run

EVIL = "<script>alert(1)</script>"


def test_the_panels_of_a_flow(flow: Run) -> None:
    found = panels(flow)
    assert list(found) == [
        "Normalised margin γ̂_m",
        "Accuracy",
        "Layer norms ρ_k",
        "Margin and loss against ln t",
        "Loss times t",
        "Angle of W and ∇L",
        "Alignment of the layers",
        "Distance to a KKT point",
    ]
    times = column(flow, "log_time")
    assert times == pytest.approx(
        [-3, -2, -1, 0, 1, *(10 ** (k / 10) for k in range(1, 15)), 30], abs=1e-7
    )
    for panel in found.values():
        assert panel.xlabel == "ln t"
        assert panel.xscale == "log" if "against ln t" in panel.title else "symlog"
        assert panel.xthreshold == (None if panel.xscale == "log" else 1.0)
        for curve in panel.curves:
            if "KKT" in panel.title:
                assert set(curve.x) < set(times)
            elif panel.xscale == "symlog" and curve.measured:
                assert list(curve.x) == times
    assert flow.metrics[0]["log_time"] is None
    assert "The start, t = 0, has no ln t and is not drawn." in comparison([flow]).notes[0]


def test_margins_and_norms_are_those_recorded(flow: Run) -> None:
    found = panels(flow)
    margin, smoothed = found["Normalised margin γ̂_m"].curves
    assert (margin.label, margin.dashed, smoothed.label, smoothed.dashed) == (
        "γ̂_m",
        False,
        "ℓ/ρ",
        True,
    )
    assert list(margin.y) == column(flow, "normalized_margin")
    for band, level in ((margin.low, 0.05), (margin.high, 0.95)):
        place = QUANTILES.index(level)
        assert list(band) == [v[place] for v in column(flow, "normalized_margin_quantiles")]
    recorded = column(flow, "smoothed_margin")
    assert list(smoothed.y) == [value if value > 0 else None for value in recorded]
    assert recorded[0] < 0 < recorded[-1]
    norms = found["Layer norms ρ_k"]
    assert norms.yscale == "log"
    assert [curve.label for curve in norms.curves] == ["linear1.weight", "linear2.weight"]
    for k, curve in enumerate(norms.curves):
        assert list(curve.y) == [values[k] for values in column(flow, "layer_norms")]
    accuracy = found["Accuracy"]
    assert [curve.label for curve in accuracy.curves] == ["perturbed, train", "unperturbed, train"]
    shares = [100 * share for share in column(flow, "adversarial_accuracy")]
    assert list(accuracy.curves[0].y) == pytest.approx(shares)


def test_what_theory_predicts_is_drawn_beside_what_was_measured(flow: Run) -> None:
    found = panels(flow)
    late = [record for record in flow.metrics[1:] if record["log_time"] > 0.5]
    margin, loss, limit = found["Margin and loss against ln t"].curves
    assert list(margin.x) == list(loss.x) == [record["log_time"] for record in late]
    # The smallest margin itself is recorded too: an independent way to ρ γ̂_m.
    assert list(margin.y) == pytest.approx([r["margin"] / r["log_time"] for r in late], rel=1e-12)
    assert list(loss.y) == pytest.approx([-r["log_loss"] / r["log_time"] for r in late], rel=1e-12)
    assert (limit.label, list(limit.y), limit.measured) == ("limit", [1.0, 1.0], False)
    assert list(limit.x) == [margin.x[0], margin.x[-1]]

    measured, predicted = found["Loss times t"].curves
    assert list(measured.y) == column(flow, "log_tl")
    assert not predicted.measured
    # K = 2: L = Θ(1/(t ln t)), through the last measurement.
    (x0, x1), (y0, y1) = ((c[0], c[-1]) for c in (predicted.x, predicted.y))
    assert 3 <= x0 < 3.5
    assert (x1, y1) == (measured.x[-1], measured.y[-1])
    assert y1 - y0 == pytest.approx(-math.log(x1 / x0))  # type: ignore[operator]
    # From ln t = 20 to 30 the flow itself falls like that; what is left is of order ln ln t / ln t.
    fall = measured.y[-1] - measured.y[-3]  # type: ignore[operator]
    assert fall == pytest.approx(-math.log(30 / 10**1.3), rel=0.05)

    angle = found["Angle of W and ∇L"]
    assert angle.yscale == "log"
    assert [list(curve.y) for curve in angle.curves] == [column(flow, "one_plus_cosine")]
    notes = " ".join(comparison([flow]).notes)
    assert "the total gradient ∇L" in notes
    assert "that slope (K = 2)" in notes


def test_one_layer_has_another_slope_and_an_unknown_order_none(flow: Run) -> None:
    layer = {"name": "w", "degree": 1}
    for degrees, exponent in (([layer], 0.0), ([layer] * 3, 4 / 3)):
        predicted = panels(changed(flow, layers=degrees))["Loss times t"].curves[1]
        (a, b), (c, d) = predicted.x[:2], predicted.y[:2]
        assert d - c == pytest.approx(-exponent * math.log(b / a))  # type: ignore[operator]
    for layers in (None, [], [layer, {"name": "v"}], "broken"):
        assert len(panels(changed(flow, layers=layers))["Loss times t"].curves) == 1
    behind = changed(flow)
    behind.final["normalized_margin"] = -0.1  # not separated: the prediction is not for it
    assert len(panels(behind)["Loss times t"].curves) == 1


def test_a_flow_without_perturbation(flow: Run) -> None:
    plain = changed(flow, attack="none", measure_with="none")
    found = panels(plain)
    assert [c.label for c in found["Accuracy"].curves] == ["unperturbed, train"]
    assert "of the unperturbed training examples" in comparison([plain]).notes[0]
    assert default_title([plain]) == "flow: gradient flow without perturbation"
    assert statement([plain]).startswith("The gradient flow without perturbation, followed to")


def test_test_examples_are_dashed(flow: Run) -> None:
    tested = changed(flow)
    for record in tested.metrics:
        record["test_adversarial_accuracy"], record["test_clean_accuracy"] = 0.5, 0.75
    curves = {curve.label: curve for curve in panels(tested)["Accuracy"].curves}
    assert [label for label, curve in curves.items() if curve.dashed] == [
        "perturbed, test",
        "unperturbed, test",
    ]
    assert set(curves["unperturbed, test"].y) == {75.0}


@pytest.mark.parametrize("last", [30.0, 1e4, 1e6])
@pytest.mark.parametrize("width", [4.5, 9.0])
def test_ticks_of_ln_t_can_be_read(flow: Run, last: float, width: float) -> None:
    scale = last / 30
    far = changed(flow)
    for record in far.metrics[1:]:
        if record["log_time"] > 1:
            record["log_time"] = record["log_time"] ** (math.log(last) / math.log(30))
    assert far.final["log_time"] == pytest.approx(30 * scale)
    figure = draw(comparison([far]), width_inches=width)
    figure.draw_without_rendering()
    for axes in (axes for axes in figure.axes if axes.axison):
        ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks()]
        words = [tick.get_text() for tick in ticks]
        if axes.get_xscale() == "symlog":
            assert words[words.index("0") :][:3] == ["0", "1", "10"]
            assert words[0] == "−3" or "residual" in axes.get_ylabel()
        assert "×" not in axes.get_xlabel()
        boxes = [tick.get_window_extent() for tick in ticks]
        for left, right in itertools.pairwise(boxes):
            assert left.x1 + 2 < right.x0, words
    if last == 1e6:
        assert words[-1] == "10⁶"


def test_predictions_are_thin_grey_and_unmarked(flow: Run) -> None:
    figure = draw(comparison([flow]))
    axes = next(a for a in figure.axes if "ln(tL)" in a.get_ylabel())
    measured, predicted = axes.get_legend_handles_labels()[0] or axes.lines[:2]
    assert measured.get_marker() == "o"
    assert predicted.get_marker() in ("None", None)
    assert predicted.get_linewidth() < measured.get_linewidth()
    assert predicted.get_color() not in (measured.get_color(), "#7a7a7a")


def test_the_panels_in_words(flow: Run) -> None:
    text = describe(panels(flow)["Angle of W and ∇L"])
    assert text.startswith("Angle of W and ∇L. Line chart of 1 + cos(W, ∇L) against ln t.")
    assert "at ln t −3 to" in text
    assert text.endswith("at ln t 30.")


def test_the_statement_of_a_flow(flow: Run) -> None:
    margin, smoothed = flow.final["normalized_margin"], flow.final["smoothed_margin"]
    assert statement([flow]) == (
        f"The gradient flow against the {AGAINST}, followed to ln t = 30 on {DATA} (n = 8, seed 0, "
        f"float64), ends with γ̂_m = {margin:.6f} (the smallest normalised margin under that attack; "
        f"ℓ/ρ = {smoothed:.6f}) and 100% of the perturbed training examples classified correctly."
    )
    assert question([flow]).startswith(f"How large is the normalised margin under the {AGAINST}")
    assert default_title([flow]) == f"flow: gradient flow against the {AGAINST}"
    assert setting([flow]) == "n = 8, seed 0, float64"
    assert caveats([flow]) == ()


@pytest.mark.parametrize(
    ("ended", "verb", "caveat"),
    [
        (
            None,
            "is not finished; so far it has",
            "flow is not finished: it stands at ln t = 30 on its way to ln t = 30; continue it with",
        ),
        (
            "not separated",
            "ended without separating the data, with",
            "given up at ln t = 30, before ln t = 30, since it did not separate the data (87.5% of "
            "the perturbed training examples have a positive margin)",
        ),
        (
            "work",
            "stopped before its goal, with",
            "its 2,000,000 evaluations of the field were used up; continue it with resume",
        ),
        ("power cut", "stopped before its goal, with", "before ln t = 30: power cut."),
    ],
)
def test_a_flow_that_reached_no_goal(flow: Run, ended: Any, verb: str, caveat: str) -> None:
    run = changed(flow, ended=ended)
    run.final["adversarial_accuracy"] = 0.875
    assert f"float64), {verb} γ̂_m = " in statement([run])
    assert caveat in " ".join(caveats([run]))
    assert caveat in " ".join(comparison([run]).notes)
    header, [row] = comparison_table([run])
    assert row[header.index("end")] == {None: "not finished", "work": "out of evaluations"}.get(
        ended, ended
    )


def test_how_it_was_followed_and_over_which_jumps(flow: Run) -> None:
    final = flow.final
    text = followed(flow)
    assert text == (
        f"integrator stiff (Radau, exact Jacobian); {final['step']} steps, "
        f"{final['evaluations']:,} evaluations of the field, {final['jacobians']} Jacobians. "
        "No discontinuity of the field was found. Since the data are separated, ℓ/ρ fell on none of "
        f"{final['separated_steps']} steps."
    )
    assert comparison([flow]).notes[-1] == f"flow: {text}"
    rough = changed(flow)
    for record in rough.metrics:
        if (record["log_time"] or 0) < 1.1:
            record["method"] = "steps"
    rough.final.update(jumps=2, combined=1500, falls=3, largest_fall=2.5e-7)
    assert (
        integrators(rough) == "explicit steps, from ln t = 1.259 on stiff (Radau, exact Jacobian)"
    )
    assert "found 2 times; 1,500 steps combine the velocities on both sides" in followed(rough)
    assert f"fell on 3 of {final['separated_steps']} steps, by 2.5e-07" not in followed(rough)
    assert "by 2.5 × 10⁻⁷ of itself at most." in followed(rough)
    assert "has discontinuities of its field near its path" in caveats([rough])[0]
    rough.metrics[7]["sliding"] = True
    (caveat,) = caveats([rough])
    where = format_log_time(rough.metrics[7]["log_time"])
    assert caveat.startswith(f"flow slides: by ln t = {where} it runs along a surface on which")
    assert "(Assumption 2), so ℓ/ρ may fall here" in caveat


def test_final_numbers_and_course(flow: Run) -> None:
    final = flow.final
    header, [row] = comparison_table([flow])
    table = dict(zip(header, row, strict=True))
    assert list(table) == [
        "run",
        "perturbation",
        "ln t",
        "γ̂_m",
        "ℓ/ρ",
        "adversarial accuracy, train",
        "adversarial accuracy, test",
        "clean accuracy, train",
        "clean accuracy, test",
        "ρ",
        "ρ γ̂_m / ln t",
        "1 + cos(W, ∇L)",
        "end",
    ]
    assert table["perturbation"] == AGAINST
    assert table["ln t"] == "30"
    assert table["γ̂_m"] == f"{final['normalized_margin']:.6f}"
    assert table["ρ γ̂_m / ln t"] == f"{final['margin'] / 30:.3f}"
    assert table["1 + cos(W, ∇L)"] == f"{final['one_plus_cosine']:.6f}"
    assert table["end"] == "goal reached"
    [course] = course_tables([flow])
    assert [line[0] for line in course.rows] == ["−∞", "0", "1", "10", "30"]
    assert course.header[:3] == ["ln t", "γ̂_m", "ℓ/ρ"]
    assert course.header[-1] == "integrator"
    assert {line[-1] for line in course.rows} == {"stiff"}
    ratio = course.header.index("ρ γ̂_m / ln t")
    assert [line[ratio] == "–" for line in course.rows] == [True, True, False, False, False]


def test_settings_of_flows_know_no_epochs(flow: Run, descent: Run) -> None:
    rows = {row[0]: row[1] for row in settings_table([flow]).rows}
    assert list(rows)[6:] == [
        "perturbation",
        "loss",
        "derivative",
        "goal",
        "integrator",
        "tolerance of a step",
        "patience",
        "evaluations at most",
        "seed",
        "precision",
        "device",
    ]
    assert rows["perturbation"] == AGAINST
    assert rows["goal"] == "ln t = 30"
    assert rows["integrator"] == "chosen by the field: stiff (Radau, exact Jacobian)"
    assert rows["tolerance of a step"] == "10⁻⁶"
    assert rows["patience"] == "until ln t = 30, if the data are not separated"
    assert rows["evaluations at most"] == "2,000,000"
    asked = changed(
        flow, method="runge-kutta", rtol=None, log_time=None, log_norm=5.0, loss_below=1e-10
    )
    both = {row[0]: row[1:] for row in settings_table([asked, descent]).rows}
    assert both["goal"] == ["ln ‖W‖ = 5 or L < 10⁻¹⁰", "–"]
    assert both["integrator"] == ["Runge–Kutta (RK45)", "–"]
    assert both["tolerance of a step"] == ["the integrator’s default", "–"]
    assert both["epochs"] == ["–", "40"]
    assert both["learning rate"] == ["–", "0.1"]
    assert both["measured with"] == [AGAINST, AGAINST]
    assert settings_table([Run({"kind": "flow"}, [{"step": 0}])]).rows


def options_of(parts: list[str]) -> dict[str, str]:
    words = shlex.split(" ".join(parts))
    assert words[:2] == ["marginflow", "flow"]
    names, values = words[2::2], words[3::2]
    assert all(name.startswith("--") for name in names)
    return {name[2:].replace("-", "_"): v for name, v in zip(names, values, strict=True)}


def test_the_command_line_names_what_is_not_the_default(flow: Run) -> None:
    plain = {"data": DATA, "model": "deep-linear:4", "attack": "exact-linear:p=2.0,eps=0.05"}
    parts, remark = reproduction(flow)
    assert remark == ""
    assert options_of(parts) == plain | {
        "log_time": "30.0",
        "rtol": "1e-06",
        "out": "runs/flow",
    }
    other = changed(
        flow,
        "my flow; rm -rf $HOME",
        loss="logistic",
        derivative="detached",
        log_time=None,
        log_norm=5.0,
        loss_below=1e-10,
        method="steps",
        rtol=1e-4,
        patience=20.0,
        max_evaluations=500,
        seed=3,
        schedule=[1.0, 5.0],
    )
    parts, remark = reproduction(other)
    assert "Measured at chosen values of ln t" in remark
    assert options_of(parts) == plain | {
        "loss": "logistic",
        "derivative": "detached",
        "log_norm": "5.0",
        "loss_below": "1e-10",
        "method": "steps",
        "rtol": "0.0001",
        "patience": "20.0",
        "max_evaluations": "500",
        "seed": "3",
        "out": "runs/my flow; rm -rf $HOME",
    }
    for name, value in (("data", "custom"), ("model", None)):
        parts, remark = reproduction(changed(flow, **{name: value}))
        assert parts == []
        assert remark.endswith("built in Python: follow it again with mf.gradient_flow.") or (
            remark == "The data were given in Python: follow it again with mf.gradient_flow."
        )
    finite = changed(flow, attack="finite-set(5 perturbations, eps=0.1)")
    assert reproduction(finite)[1].endswith("given in Python: use mf.gradient_flow.")


def test_the_command_line_gives_the_same_flow_again() -> None:
    asked: dict[str, Any] = {"loss": "logistic", "rtol": 1e-5, "method": "stiff", "seed": 2}
    run = mf.gradient_flow("deep-linear:2", DATA, attack=ATTACK, log_time=0.5, **asked).run
    options: dict[str, Any] = options_of(reproduction(run)[0])
    for name, kind in (("seed", int), ("rtol", float), ("log_time", float)):
        options[name] = kind(options[name])
    again = mf.gradient_flow(options.pop("model"), options.pop("data"), **options)
    assert again.metrics == run.metrics


def test_strings_from_files_are_text(flow: Run, tmp_path: Path) -> None:
    hostile = changed(
        flow,
        "<img src=x>",
        attack=EVIL,
        measure_with=EVIL,
        data=EVIL,
        model_spec=EVIL,
        derivative=EVIL,
        method=EVIL,
        ended=EVIL,
        loss=EVIL,
        dtype=EVIL,
        seed=EVIL,
        layers=[{"name": EVIL, "degree": 1}] * 2,
    )
    for record in hostile.metrics:
        record["method"] = EVIL
    page = write_report([hostile], tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 15


def test_the_page(flow: Run, descent: Run, tmp_path: Path) -> None:
    page = write_report([flow], tmp_path / "page.html").read_text()
    assert page.count("<svg") == 8
    assert "Course of the flow</h2>" in page
    assert "<dt>1 + cos(W, ∇L)</dt>" in page
    assert page.count("n\u00a0=\u00a08, seed 0, float64") >= 7
    assert str(symbols(f"flow: {followed(flow)}")) in page
    assert "epoch" not in page.split('<h2 id="reproduce">')[0].split("</style>")[1]
    assert "marginflow flow" in page
    mixed = write_report([flow, descent], tmp_path / "mixed.html").read_text()
    assert "Course of the runs</h2>" in mixed
    assert "marginflow train" in mixed


def test_the_commands_that_read_runs(
    flow_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    flow, descent = str(flow_folder / "flow"), str(flow_folder / "descent")
    assert main(["compare", flow, descent, "--out", str(tmp_path / "both.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines[1:-1])) <= 80  # a combining hat takes no place
    assert any(line.split() == ["ln", "t", "30", "1.386"] for line in lines)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", flow, "--out", str(tmp_path / "flow.html")]) == 0
    assert "The gradient flow against" in capsys.readouterr().out
    assert main(["measure", flow]) == 0
    final = mf.load_run(flow).final
    assert f"{final['normalized_margin']:.6g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-2.9999999988, "−3"),
        (4.8e-10, "0"),
        (12.589254, "12.59"),
        (100.00000005, "100"),
        (1000.0, "1,000"),
        (10_000.4, "10,000"),
        (1e6, "10⁶"),
        (1.7e6, "1.7 × 10⁶"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_ln_t_in_words(value: float | None, text: str) -> None:
    assert format_log_time(value) == text


def test_short_numbers_and_crowded_ticks() -> None:
    assert [format_short(v) for v in (0.0, 0.05, 1e-10, 2.5e-7, 50.0)] == [
        "0",
        "0.05",
        "10⁻¹⁰",
        "2.5 × 10⁻⁷",
        "50",
    ]
    ticks = [-3.0, 0.0, 1.0, 10.0, 100.0, 1000.0]
    assert format_ticks(ticks, together=False)[-1] == "1,000"
    crowded = format_ticks(ticks, together=False, crowded=True)
    assert crowded == ["−3", "0", "1", "10", "100", "10³"]
    assert str(symbols("ln t of m_i, but not of sam_i or file_m_ix")) == (
        "ln\u00a0t of <i>m</i><sub>i</sub>, but not of sam_i or file_m_ix"
    )
