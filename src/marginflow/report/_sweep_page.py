"""The page of a sweep: what came out of each trial, against what was swept; who failed, and why.

Source: marginflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import marginflow
from marginflow.report._html import captioned_figure, environment
from marginflow.report._svg import style_variables
from marginflow.report._sweep_panels import sweep_panels
from marginflow.report._tables import Table
from marginflow.report._text import (
    MISSING,
    epoch_of,
    format_count,
    format_margin,
    format_number,
    format_percent,
    margin_exponent,
    margin_unit,
    number,
)
from marginflow.report._theme import theme_named
from marginflow.runs import write_atomically
from marginflow.sweeps import Outcome, Sweep

_KINDS = {
    "train": "trainings",
    "maximize": "maximisations of the margin",
    "flow": "gradient flows",
}


def write_sweep(sweep: Sweep, path: Path) -> Path:
    """Write one self-contained page: figures and a table of all trials, the failures, the settings.

    The same sweep gives the same bytes.

    Args:
        sweep: the sweep.
        path: the HTML file.

    Raises:
        StorageError: the file system refuses; an old page is then untouched.
    """
    figures = [captioned_figure(part, f"s{k}") for k, part in enumerate(sweep_panels(sweep))]
    page = (
        environment()
        .get_template("sweep.html.j2")
        .render(
            title=sweep.name,
            question=_question(sweep),
            answer=sweep_statement(sweep),
            caveats=_caveats(sweep),
            figures=figures,
            results=_results(sweep) if sweep.finished else None,
            failures=_failures(sweep),
            settings=_settings(sweep),
            versions=Table(
                "What it ran on",
                ["part", "version"],
                [[name, version] for name, version in sorted(sweep.versions.items())],
                numbers=False,
            ),
            palette=len(theme_named("light").palette),
            light=style_variables("light"),
            dark=style_variables("dark"),
            marginflow_version=marginflow.__version__,
        )
    )
    write_atomically(path, page)
    return path


def sweep_statement(sweep: Sweep) -> str:
    """How many trials ended well, and which has the largest margin.

    Args:
        sweep: the sweep.
    """
    done, failed, count = len(sweep.finished), len(sweep.failed), len(sweep.trials)
    parts = [f"{done} of {count} trials finished"]
    if failed:
        parts.append(f"{failed} failed")
    if count > done + failed:
        parts.append(f"{count - done - failed} not started")
    text = f"{', '.join(parts)}."
    best = _best(sweep.finished)
    if best is None:
        return text
    margin = number(best.final, "normalized_margin")
    text += f" The largest γ̂_m, {format_number(margin)}, has {_chosen(best.swept)}"
    accuracy = number(best.final, "test_adversarial_accuracy")
    if accuracy is not None:
        text += f", with an adversarial accuracy of {format_percent(accuracy)} on test data"
    if best.residual is not None:
        text += f"; its KKT residual is {format_number(best.residual)}"
    return f"{text}."


def sweep_table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """The finished trials as text: a header, and one row a trial, in the order of the sweep.

    Args:
        sweep: the sweep.
    """
    trials = sweep.finished
    exponent = margin_exponent([number(trial.final, "normalized_margin") for trial in trials])
    header = [
        f"γ̂_m{margin_unit(exponent)}",
        "adversarial accuracy, train",
        "adversarial accuracy, test",
        "clean accuracy, test",
        "KKT residual r",
    ]
    rows = [
        [
            trial.name,
            format_margin(number(trial.final, "normalized_margin"), exponent),
            format_percent(number(trial.final, "adversarial_accuracy")),
            format_percent(number(trial.final, "test_adversarial_accuracy")),
            format_percent(number(trial.final, "test_clean_accuracy")),
            format_number(trial.residual),
        ]
        for trial in trials
    ]
    return ["trial", *header], rows


def _question(sweep: Sweep) -> str:
    words = _KINDS.get(sweep.job, "runs")
    return f"A sweep of {len(sweep.trials)} {words} over {', '.join(sweep.swept)}."


def _best(trials: Sequence[Outcome]) -> Outcome | None:
    rated = [
        (margin, trial)
        for trial in trials
        if (margin := number(trial.final, "normalized_margin")) is not None
    ]
    return max(rated, key=lambda pair: pair[0])[1] if rated else None


def _chosen(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _caveats(sweep: Sweep) -> list[str]:
    done = sweep.finished
    found = []
    perturbations = {
        trial.options.get("measure_with") or trial.options.get("attack") for trial in done
    }
    if len(perturbations) > 1:
        found.append(
            "The trials are measured under different perturbations, each its own: their margins and "
            "accuracies say how hard each was, too. Set measure_with to compare under one."
        )
    apart = [t for t in done if (number(t.final, "normalized_margin") or 0.0) < 0]
    if apart:
        found.append(
            f"{len(apart)} of {len(done)} trials do not classify every perturbed training example "
            "correctly (γ̂_m < 0): a KKT certificate needs positive margins."
        )
    if sweep.certified and (without := [t for t in done if t.residual is None]):
        found.append(f"{len(without)} of {len(done)} trials have no KKT certificate.")
    return found


def _results(sweep: Sweep) -> Table:
    header, rows = sweep_table(sweep)
    trials = sweep.finished
    extra = [
        [
            format_number(number(trial.final, "norm_product")),
            format_count(epoch_of(trial.final)),
            MISSING if trial.seconds is None else format_number(trial.seconds, 3),
        ]
        for trial in trials
    ]
    swept = [[str(trial.swept.get(name, MISSING)) for name in sweep.swept] for trial in trials]
    return Table(
        "The last measurement of every trial that finished",
        ["trial", *sweep.swept, *header[1:], "ρ", "epochs", "seconds"],
        [
            [str(k), *values, *row[1:], *more]
            for k, (values, row, more) in enumerate(zip(swept, rows, extra, strict=True), start=1)
        ],
    )


def _failures(sweep: Sweep) -> Table | None:
    if not sweep.failed:
        return None
    return Table(
        "Trials that failed after all attempts",
        ["trial", "attempts", "error of the last attempt"],
        [[trial.name, str(trial.attempts), str(trial.error)] for trial in sweep.failed],
        numbers=False,
        prose=True,
    )


def _settings(sweep: Sweep) -> Table:
    """What all trials have in common, then what is swept."""
    shared = {name: value for name, value in sweep.options.items() if name not in sweep.swept}
    rows = [["job", sweep.job], *([name, str(value)] for name, value in shared.items())]
    for name in sweep.swept:
        values = dict.fromkeys(str(t.swept[name]) for t in sweep.trials if name in t.swept)
        rows.append([name, ", ".join(values)])
    return Table("What was asked", ["option", "value"], rows, numbers=False, prose=True)
