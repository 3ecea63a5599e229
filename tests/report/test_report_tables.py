from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

import marginflow.report
from marginflow.errors import RunError
from marginflow.report import comparison_table
from marginflow.report._settings import settings_table, versions_table
from marginflow.report._tables import course_tables, final_table, layer_tables
from marginflow.report._text import (
    attack_words,
    format_margin,
    format_number,
    format_percent,
    margin_exponent,
    run_names,
)
from marginflow.runs import Run

Make = Callable[..., Run]


def test_the_public_names() -> None:
    assert marginflow.report.__all__ == [
        "comparison",
        "comparison_table",
        "draw",
        "save_figure",
        "statement",
        "sweep_statement",
        "sweep_table",
        "write_figures",
        "write_panels",
        "write_report",
        "write_sweep",
    ]
    assert all(hasattr(marginflow.report, name) for name in marginflow.report.__all__)


def test_comparison_table(adversarial: Run, standard: Run) -> None:
    header, rows = comparison_table([adversarial, standard])
    assert header == [
        "run",
        "trained against",
        "measured with",
        "epochs",
        "γ̂_m (×10⁻³)",
        "adversarial accuracy, train",
        "adversarial accuracy, test",
        "clean accuracy, train",
        "clean accuracy, test",
        "ρ",
    ]
    start = ["fgsm", "FGSM, ε = 0.15", "FGSM, ε = 0.15", "1,000", "2.100"]
    assert rows[0] == [*start, "100%", "90.0%", "100%", "95.0%", "1,013"]
    assert rows[1][:5] == ["standard", "none", "FGSM, ε = 0.15", "1,000", "−170.0"]


def test_what_a_run_does_not_have(make_run: Make) -> None:
    run = make_run(attack="none", test=False)
    run.final["norm_product"] = run.final["normalized_margin"] = None
    assert comparison_table([run])[1][0][4:] == ["–", "–", "–", "100%", "–", "–"]
    with pytest.raises(RunError):
        comparison_table([make_run(epochs=())])


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "100%"),
        (0.0, "0%"),
        (0.9155, "91.5%"),
        (0.9996, "99.96%"),
        (11999 / 12000, "99.99%"),
        (1 - 1e-9, ">99.9999%"),
        (1e-9, "<0.0001%"),
        (1e-4, "0.01%"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_a_percentage_never_hides_an_error(share: float | None, text: str) -> None:
    assert format_percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (9.99996, "10.00"),
        (-0.1664791, "−0.1665"),
        (0.00012345, "0.0001234"),
        (-2.5e-7, "−2.500 × 10⁻⁷"),
        (1.5e6, "1.500 × 10⁶"),
        (999999.9, "1.000 × 10⁶"),
        (None, "–"),
        (math.inf, "–"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_margins_share_the_unit_of_the_smallest() -> None:
    assert margin_exponent([0.00205, -0.166]) == -3
    assert margin_exponent([0.01, 0.4]) == 0
    assert margin_exponent([0.0, None, math.nan]) == 0
    assert margin_exponent([2e-7]) == -6
    assert format_margin(2e-7, -6) == "0.2000"
    assert format_margin(-0.1664791, -3) == "−166.5"
    assert format_margin(None, -3) == "–"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("none", "none"),
        (None, "none"),
        ("fgsm:eps=0.06274509803921569", "FGSM, ε = 16/255"),
        ("fgm:eps=1.5", "ℓ2-FGM, ε = 1.5"),
        ("fgsm:eps=0.1,bounds=0.0..1.0", "FGSM, ε = 0.1, bounds 0.0..1.0"),
        (
            "pgd-l2:steps=5,step=0.5,random=true,eps=2.0",
            "ℓ2-PGD, ε = 2.0, 5 steps of 0.5, random start",
        ),
        ("exact-linear:p=2.0,eps=0.05", "exact ℓ2 adversary, ε = 0.05"),
        ("exact-linear:p=inf,eps=0.05", "exact ℓ∞ adversary, ε = 0.05"),
        ("finite-set(5 perturbations, eps=0.1)", "finite-set(5 perturbations, eps=0.1)"),
        ("fgsm", "fgsm"),
        ("fgsm:eps=,", "fgsm:eps=,"),
        ("fgsm:eps=abc", "FGSM, ε = abc"),
        (["odd"], "['odd']"),
    ],
)
def test_attacks_in_words(spec: object, words: str) -> None:
    assert attack_words(spec) == words


def test_names_are_distinct(make_run: Make) -> None:
    run = make_run()
    runs = [
        Run(run.config, run.metrics, Path(folder) / "fgsm") for folder in ("a", "b", "b", "c/x")
    ]
    assert run_names(runs) == ["a/fgsm", "b/fgsm (1)", "b/fgsm (2)", "x/fgsm"]
    memory = [make_run(None), make_run(None)]
    assert run_names(memory) == ["mlp:32 fgsm:eps=0.15 (1)", "mlp:32 fgsm:eps=0.15 (2)"]
    assert run_names([make_run("two\nlines  here"), make_run("x")]) == ["two lines here", "x"]


def test_the_course_is_told_at_powers_of_ten(make_run: Make) -> None:
    epochs = (0, 1, 3, 9, 12, 80, 130, 900, 1500)
    [table] = course_tables([make_run(epochs=epochs, margins=lambda epoch: epoch / 1e6 - 0.001)])
    assert [row[0] for row in table.rows] == ["0", "1", "9", "80", "900", "1,500"]
    assert table.header[1:3] == ["γ̂_m (×10⁻³)", "median margin (×10⁻³)"]
    assert table.rows[0][1:3] == ["−1.000", "4.000"]
    assert [row[0] for row in course_tables([make_run(epochs=(7,))])[0].rows] == ["7"]
    # 180 is nearer to 100 than 30 is, as ratios go.
    between = course_tables([make_run(epochs=(0, 1, 10, 30, 180, 1000))])[0]
    assert [row[0] for row in between.rows] == ["0", "1", "10", "180", "1,000"]
    plain = course_tables([make_run(attack="none", test=False)])[0]
    assert [title for title in plain.header if "accuracy" in title] == ["clean accuracy, train"]


def test_few_runs_stand_side_by_side_and_many_below_each_other(make_run: Make) -> None:
    few = final_table([make_run("a"), make_run("b")])
    assert few.header == ["run", "a", "b"]
    assert few.colors == {1: 0, 2: 1}
    many = final_table([make_run(f"r{k}") for k in range(4)])
    assert [row[0] for row in many.rows] == ["r0", "r1", "r2", "r3"]


def test_layers(make_run: Make, adversarial: Run, standard: Run) -> None:
    [table] = layer_tables([adversarial, standard])
    assert table.header == ["layer", "degree c_k", "final ρ_k, fgsm", "final ρ_k, standard"]
    assert table.rows[0] == ["1.weight", "1", "16.50", "16.50"]
    assert table.rows[-1] == ["product ρ", "K = 2", "1,013", "1,013"]
    squared = make_run("squared", layers=[{"name": "1.weight", "degree": 2}, {"name": "w"}])
    first, second = layer_tables([adversarial, squared])
    assert second.caption.endswith(": squared")
    assert [row[1] for row in second.rows] == ["2", "–", "–"]
    assert first.header[-1] == "final ρ_k, fgsm"
    unknown = make_run(layers=None)
    assert [row[0] for row in layer_tables([unknown])[0].rows] == [
        "layer 1",
        "layer 2",
        "product ρ",
    ]
    bare = Run({}, [{"step": 0}])
    assert layer_tables([bare]) == []


def test_settings_and_versions(make_run: Make, adversarial: Run) -> None:
    memory = make_run("memory", versions=None, batch_size=286, derivative="total", threads=None)
    rows = {row[0]: row[1:] for row in settings_table([adversarial, memory]).rows}
    assert rows["architecture"][0] == "mlp; widths 64, 32, 1; activation relu"
    assert rows["batch size"] == ["32", "286 (all)"]
    assert rows["derivative"][1] == "total (through the perturbation)"
    assert rows["range of inputs"][0] == "0 to 1"
    ran = {row[0]: row[1:] for row in versions_table([adversarial, memory]).rows}
    assert ran["torch"] == ["2.13.0+cpu", "–"]
    assert ran["threads"] == ["2", "–"]
    assert ran["SHA-256 of the data"][0] == "e9c267f05310a4b9…"
    assert settings_table([Run({}, [{"step": 0}])]).rows
