"""The tables of runs, as text: what came out, on the way, layer by layer, and with which settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginflow.monitor import QUANTILES
from marginflow.report._statement import training_words, unperturbed
from marginflow.report._text import (
    MISSING,
    attack_words,
    check_runs,
    epoch_of,
    format_count,
    format_margin,
    format_number,
    format_percent,
    margin_exponent,
    margin_unit,
    number,
    run_names,
)
from marginflow.runs import Run

_MEDIAN = QUANTILES.index(0.5)


@dataclass(frozen=True)
class Table:
    """A table before it is set.

    Attributes:
        caption: what it shows.
        header: one title a column; the first column holds the titles of the rows.
        rows: text, in the columns' order.
        numbers: whether the columns after the first hold numbers, to be aligned right.
        colors: the palette's index of each column that stands for a run, by its place.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    colors: Mapping[int, int] | None = None


def comparison_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The final measurement of each run as text: a header, and one row a run.

    Columns: run, trained against, measured with, epochs, γ̂_m, adversarial accuracy (train,
    test), clean accuracy (train, test), ρ. What a run does not have is shown as –; so is the
    adversarial accuracy of a run that was measured without a perturbation.

    Raises:
        InputError: no runs.
        RunError: a run without measurements.
    """
    check_runs(runs)
    exponent = margin_exponent([number(run.final, "normalized_margin") for run in runs])
    header = ["run", "trained against", "measured with", "epochs", f"γ̂_m{margin_unit(exponent)}"]
    header += ["adversarial accuracy, train", "adversarial accuracy, test"]
    header += ["clean accuracy, train", "clean accuracy, test", "ρ"]
    rows = [
        [
            name,
            attack_words(run.config.get("attack")),
            attack_words(run.config.get("measure_with")),
            format_count(epoch_of(run.final)),
            format_margin(number(run.final, "normalized_margin"), exponent),
            *(
                MISSING if unperturbed(run) else format_percent(number(run.final, key))
                for key in ("adversarial_accuracy", "test_adversarial_accuracy")
            ),
            format_percent(number(run.final, "clean_accuracy")),
            format_percent(number(run.final, "test_clean_accuracy")),
            format_number(number(run.final, "norm_product")),
        ]
        for name, run in zip(run_names(runs), runs, strict=True)
    ]
    return header, rows


def final_table(runs: Sequence[Run]) -> Table:
    """:func:`comparison_table` for a page: few runs stand side by side, many below each other."""
    header, rows = comparison_table(runs)
    caption = "The last measurement of each run" if len(runs) > 1 else "The last measurement"
    if len(runs) > 3:
        return Table(caption, header, rows)
    turned = [list(column) for column in zip(header, *rows, strict=True)]
    return Table(caption, turned[0], turned[1:], colors=run_columns(runs))


def course_tables(runs: Sequence[Run]) -> list[Table]:
    """For each run the measurements nearest to epochs 0, 1, 10, 100 …, and the last."""
    exponent = margin_exponent([number(run.final, "normalized_margin") for run in runs])
    return [
        _course(run, f"{name}: {training_words(run)}", exponent)
        for run, name in zip(runs, run_names(runs), strict=True)
    ]


def _course(run: Run, caption: str, exponent: int) -> Table:
    records = [run.metrics[k] for k in _milestones(run)]
    tested = any(number(record, "test_clean_accuracy") is not None for record in records)
    shares = [("clean accuracy", "clean_accuracy")]
    if not unperturbed(run):
        shares.insert(0, ("adversarial accuracy", "adversarial_accuracy"))
    splits = [("train", ""), ("test", "test_")] if tested else [("train", "")]
    header = [
        "step" if number(run.final, "epoch") is None else "epoch",
        f"γ̂_m{margin_unit(exponent)}",
        f"median margin{margin_unit(exponent)}",
        *(f"{title}, {split}" for title, _ in shares for split, _ in splits),
        "ρ",
        "ln L",
    ]
    rows = [
        [
            format_count(epoch_of(record)),
            format_margin(number(record, "normalized_margin"), exponent),
            format_margin(_median(record), exponent),
            *(
                format_percent(number(record, prefix + key))
                for _, key in shares
                for _, prefix in splits
            ),
            format_number(number(record, "norm_product")),
            format_number(number(record, "log_loss")),
        ]
        for record in records
    ]
    return Table(caption, header, rows)


def _milestones(run: Run) -> list[int]:
    """Indices of the measurements that are nearest, as ratios, to 0, 1, 10, 100 …, and the last."""
    epochs = [epoch_of(record) for record in run.metrics]
    known = [(k, epoch) for k, epoch in enumerate(epochs) if epoch is not None]
    if not known:
        return sorted({0, len(epochs) - 1})
    last = known[-1][1]
    targets = [0.0] + [10.0**j for j in range(20) if 10.0**j < last]
    chosen = {
        min(known, key=lambda pair: abs(math.log1p(pair[1]) - math.log1p(target)))[0]
        for target in targets
    }
    return sorted(chosen | {len(epochs) - 1})


def _median(record: Mapping[str, Any]) -> float | None:
    levels = record.get("normalized_margin_quantiles")
    if not isinstance(levels, list) or len(levels) != len(QUANTILES):
        return None
    return number({"median": levels[_MEDIAN]}, "median")


def layer_names(run: Run) -> list[str]:
    """The names of the layers in the order of ``layer_norms``; numbers where none are recorded."""
    layers = _layers(run)
    norms = run.final.get("layer_norms")
    count = len(norms) if isinstance(norms, list) else 0
    return [
        str(layers[k].get("name")) if k < len(layers) else f"layer {k + 1}" for k in range(count)
    ]


def _layers(run: Run) -> list[Mapping[str, Any]]:
    table = run.config.get("layers")
    return [e if isinstance(e, Mapping) else {} for e in table] if isinstance(table, list) else []


def layer_tables(runs: Sequence[Run]) -> list[Table]:
    """Name, degree c_k and final norm ρ_k of each layer; one table for runs of the same layers."""
    kinds: dict[str, list[int]] = {}
    for k, run in enumerate(runs):
        kinds.setdefault(repr([layer_names(run), _degrees(run)]), []).append(k)
    names = run_names(runs)
    tables = []
    for members in kinds.values():
        first = runs[members[0]]
        alone = len(runs) == 1
        header = ["layer", "degree c_k"]
        header += ["final ρ_k"] if alone else [f"final ρ_k, {names[k]}" for k in members]
        rows = [
            [name, degree, *(_norm(runs[k], place) for k in members)]
            for place, (name, degree) in enumerate(
                zip(layer_names(first), _degrees(first), strict=True)
            )
        ]
        if not rows:
            continue
        products = [format_number(number(runs[k].final, "norm_product")) for k in members]
        rows.append(["product ρ", _order(_degrees(first)), *products])
        caption = "Degree and final norm of each layer"
        if len(kinds) > 1:
            caption += f": {', '.join(names[k] for k in members)}"
        colors = None if alone else {2 + place: k for place, k in enumerate(members)}
        tables.append(Table(caption, header, rows, colors=colors))
    return tables


def _degrees(run: Run) -> list[str]:
    layers = _layers(run)
    degrees = [number(layer, "degree") for layer in layers[: len(layer_names(run))]]
    degrees += [None] * (len(layer_names(run)) - len(degrees))
    return [MISSING if degree is None else f"{degree:g}" for degree in degrees]


def _order(degrees: Sequence[str]) -> str:
    """``K = 3``, the sum of the degrees."""
    return MISSING if MISSING in degrees else f"K = {sum(map(float, degrees)):g}"


def _norm(run: Run, place: int) -> str:
    return format_number(number({"norm": run.final["layer_norms"][place]}, "norm"))


def run_columns(runs: Sequence[Run]) -> dict[int, int] | None:
    """The colours of tables with one column a run; a single run needs none."""
    return {k + 1: k for k in range(len(runs))} if len(runs) > 1 else None
