"""The tables of runs, as text: what came out, on the way, layer by layer, and with which settings.

Source: marginflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginflow.report._clock import FLOW_DIGITS, is_flow, log_time_cell, log_time_of
from marginflow.report._flow_words import end_words
from marginflow.report._statement import (
    declares_attack,
    not_normalized,
    training_words,
    unperturbed,
)
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
from marginflow.runs import QUANTILES, Run

_MEDIAN = QUANTILES.index(0.5)

RATIOS_SINCE = 1 - 1e-6
"""ln t from which on a ratio to ln t says something: 1, which the integrators hit to 1e-9."""


@dataclass(frozen=True)
class Table:
    """A table before it is set.

    Attributes:
        caption: what it shows.
        header: one title a column; the first column holds the titles of the rows.
        rows: text, in the columns' order.
        numbers: whether the columns after the first hold numbers, to be aligned right.
        colors: the palette's index of each column that stands for a run, by its place.
        prose: whether the cells are sentences; a phone shows them below each other.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    colors: Mapping[int, int] | None = None
    prose: bool = False


def comparison_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The final measurement of each run as text: a header, and one row a run.

    Columns: run, trained against, measured with, epochs, γ̂_m, adversarial accuracy (train,
    test), clean accuracy (train, test), ρ. What a run does not have is shown as –; so is the
    adversarial accuracy of a run that was measured without a perturbation.

    Gradient flows have one perturbation and no epochs, but ln t, ℓ/ρ, ρ γ̂_m / ln t,
    1 + cos(W, ∇L) and an end; with training runs beside them there are the columns of both.

    Args:
        runs: two or more, in the order of the columns.

    Raises:
        InputError: no runs.
        RunError: a run without measurements.
    """
    check_runs(runs)
    exponent = margin_exponent([number(run.final, "normalized_margin") for run in runs])
    entries = [
        {"run": name}
        | _end(
            run,
            exponent,
            flows=any(map(is_flow, runs)),
            raw=any(map(not_normalized, runs)),
        )
        for name, run in zip(run_names(runs), runs, strict=True)
    ]
    header = list(entries[0])
    if all(map(is_flow, runs)):
        header = [title for title in header if title not in ("measured with", "epochs")]
    rows = [[entry[title] for title in header] for entry in entries]
    if all(map(is_flow, runs)):
        header[header.index("trained against")] = "perturbation"
    return header, rows


def _end(run: Run, exponent: int, *, flows: bool, raw: bool) -> dict[str, str]:
    """The final measurement of a run; with what only flows have, and with margins as they are."""
    final, unit = run.final, margin_unit(exponent)
    cells = {
        "trained against": attack_words(run.config.get("attack"))
        if declares_attack(run)
        else "not said",
        "measured with": attack_words(run.config.get("measure_with")),
        "epochs": MISSING if is_flow(run) else format_count(epoch_of(final)),
    }
    if flows:
        cells["ln t"] = log_time_cell(final)
    digits = FLOW_DIGITS if flows else 4
    cells[f"γ̂_m{unit}"] = format_margin(number(final, "normalized_margin"), exponent, digits)
    if raw:
        cells["min m, not normalised"] = format_number(number(final, "margin"))
    if flows:
        cells[f"ℓ/ρ{unit}"] = format_margin(number(final, "smoothed_margin"), exponent, digits)
    for split, prefix in (("train", ""), ("test", "test_")):
        share = MISSING
        if not unperturbed(run):
            share = format_percent(number(final, f"{prefix}adversarial_accuracy"))
        cells[f"adversarial accuracy, {split}"] = share
    for split, prefix in (("train", ""), ("test", "test_")):
        cells[f"clean accuracy, {split}"] = format_percent(number(final, f"{prefix}clean_accuracy"))
    cells["ρ"] = format_number(number(final, "norm_product"))
    if flows:
        ratio = margin_over_log_time(final) if own_loss(run) else None
        cells["ρ γ̂_m / ln t"] = format_number(ratio)
        cells["1 + cos(W, ∇L)"] = format_number(number(final, "one_plus_cosine"))
        cells["end"] = end_words(run) if is_flow(run) else MISSING
    return cells


def own_loss(run: Run) -> bool:
    """Whether the run minimises the loss that is measured, of which alone theory speaks."""
    return run.config.get("attack") == run.config.get("measure_with")


def margin_over_log_time(record: Mapping[str, Any]) -> float | None:
    """``ρ γ̂_m / ln t``, which tends to 1 along the flow; None before ln t = 1."""
    margin, rho = number(record, "normalized_margin"), number(record, "norm_product")
    log_time = log_time_of(record)
    if margin is None or rho is None or log_time is None or log_time < RATIOS_SINCE:
        return None
    return margin * rho / log_time


def final_table(runs: Sequence[Run]) -> Table:
    """:func:`comparison_table` for a page: few runs stand side by side, many below each other."""
    header, rows = comparison_table(runs)
    caption = "The last measurement of each run" if len(runs) > 1 else "The last measurement"
    if len(runs) > 3:
        return Table(caption, header, rows)
    turned = [list(column) for column in zip(header, *rows, strict=True)]
    return Table(caption, turned[0], turned[1:], colors=run_columns(runs))


def course_tables(runs: Sequence[Run]) -> list[Table]:
    """For each run the measurements nearest to epochs 0, 1, 10, 100 …, and the last.

    Of flows those at the start and nearest to ln t = 0, 1, 10, 100 …, and the last.
    """
    exponent = margin_exponent([number(run.final, "normalized_margin") for run in runs])
    flows = any(map(is_flow, runs))
    return [
        _course(run, f"{name}: {training_words(run)}", exponent, timed=flows)
        for run, name in zip(runs, run_names(runs), strict=True)
    ]


def _course(run: Run, caption: str, exponent: int, *, timed: bool) -> Table:
    places = [(log_time_of if is_flow(run) else epoch_of)(record) for record in run.metrics]
    records = [run.metrics[k] for k in _milestones(places)]
    tested = any(number(record, "test_clean_accuracy") is not None for record in records)
    shares = [("clean accuracy", "clean_accuracy")]
    if not unperturbed(run):
        shares.insert(0, ("adversarial accuracy", "adversarial_accuracy"))
    splits = [("train", ""), ("test", "test_")] if tested else [("train", "")]
    unit = margin_unit(exponent)
    counts = "step" if number(run.final, "epoch") is None else "epoch"
    digits = FLOW_DIGITS if timed else 4
    raw = not_normalized(run)
    late = ["ρ γ̂_m / ln t", "1 + cos(W, ∇L)", "integrator"] if is_flow(run) else []
    header = [
        *([] if is_flow(run) else [counts]),
        *(["ln t"] if timed else []),
        "min m" if raw else f"γ̂_m{unit}",
        "median m" if raw else f"ℓ/ρ{unit}" if is_flow(run) else f"median margin{unit}",
        *(f"{title}, {split}" for title, _ in shares for split, _ in splits),
        "ρ",
        "ln L",
        *late,
    ]
    rows = [
        [
            *([] if is_flow(run) else [format_count(epoch_of(record))]),
            *([log_time_cell(record)] if timed else []),
            *(
                map(format_number, (number(record, "margin"), _median(record, "margin")))
                if raw
                else (
                    format_margin(number(record, "normalized_margin"), exponent, digits),
                    format_margin(
                        number(record, "smoothed_margin") if is_flow(run) else _median(record),
                        exponent,
                        digits,
                    ),
                )
            ),
            *(
                format_percent(number(record, prefix + key))
                for _, key in shares
                for _, prefix in splits
            ),
            format_number(number(record, "norm_product")),
            format_number(number(record, "log_loss")),
            *(_late(record) if is_flow(run) else []),
        ]
        for record in records
    ]
    return Table(caption, header, rows)


def _late(record: Mapping[str, Any]) -> list[str]:
    """What tends to a limit late in a flow, and the integrator at work."""
    return [
        format_number(margin_over_log_time(record)),
        format_number(number(record, "one_plus_cosine")),
        str(record.get("method") or MISSING),
    ]


def _milestones(places: Sequence[float | None]) -> list[int]:
    """Indices of what is nearest, as ratios, to 0, 1, 10, 100 …, of the last, and of a start without place.

    Places below zero, ln t before t = 1, count as they are: −1 is as far from 0 as e − 1 is.
    """
    known = [(k, place) for k, place in enumerate(places) if place is not None]
    ends = {len(places) - 1} | ({0} if places[0] is None else set())
    if not known:
        return sorted(ends | {0})
    last = known[-1][1]
    targets = [0.0] + [10.0**j for j in range(20) if 10.0**j < last]
    chosen = {
        min(known, key=lambda pair: abs(_ratio(pair[1]) - _ratio(target)))[0] for target in targets
    }
    return sorted(chosen | ends)


def _ratio(place: float) -> float:
    return math.log1p(place) if place > 0 else place


def _median(record: Mapping[str, Any], key: str = "normalized_margin") -> float | None:
    levels = record.get(f"{key}_quantiles")
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


def order_of(run: Run) -> float | None:
    """K, the sum of the degrees of the layers; None where they are not recorded."""
    degrees = [number(layer, "degree") for layer in _layers(run)]
    known = [degree for degree in degrees if degree is not None]
    return sum(known) if known and len(known) == len(degrees) else None


def _order(degrees: Sequence[str]) -> str:
    """``K = 3``, the sum of the degrees."""
    return MISSING if MISSING in degrees else f"K = {sum(map(float, degrees)):g}"


def _norm(run: Run, place: int) -> str:
    return format_number(number({"norm": run.final["layer_norms"][place]}, "norm"))


def run_columns(runs: Sequence[Run]) -> dict[int, int] | None:
    """The colours of tables with one column a run; a single run needs none."""
    return {k + 1: k for k in range(len(runs))} if len(runs) > 1 else None
