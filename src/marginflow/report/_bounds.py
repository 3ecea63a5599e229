"""How robust the networks of runs are for certain: what their ``bounds.json`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginflow.certified import read_bounds
from marginflow.experiments import Curve, Panel
from marginflow.report._panels import Captioned
from marginflow.report._tables import Table
from marginflow.report._text import (
    MISSING,
    attack_words,
    format_count,
    format_margin,
    format_number,
    format_percent,
    fraction,
    margin_exponent,
    margin_unit,
    number,
    run_names,
    sentence_of,
)
from marginflow.runs import Run

_METHODS = {"crown": "CROWN", "interval": "intervals", "norms": "the layers’ norms"}
_SPREAD = (0.05, 0.95)


@dataclass(frozen=True)
class BoundsSection:
    """The part of the page about certified bounds.

    Attributes:
        sentences: one for each run that has them.
        notes: what has to be said beside them; often nothing.
        curves: accuracies against ε, where there are several ε; else None.
        table: the numbers, one column a sandwich.
    """

    sentences: Sequence[str]
    notes: Sequence[str]
    curves: Captioned | None
    table: Table


@dataclass(frozen=True)
class _Bounded:
    """A run with its bounds: the name it goes by, and the place that decides its colour."""

    run: Run
    name: str
    color: int
    content: Mapping[str, Any]

    @property
    def sandwiches(self) -> Sequence[Mapping[str, Any]]:
        """By norm, and by ε in it."""
        found = self.content["sandwiches"]
        return sorted(found, key=lambda s: (str(s["p"]), float(s["eps"])))


def bounds_section(runs: Sequence[Run]) -> tuple[BoundsSection | None, list[str]]:
    """What the bounds in the run directories say, and what has to be said of damaged ones.

    Returns:
        None where there are none, and a sentence for each that cannot be shown: the page goes without.
    """
    found, damaged = [], []
    alone = len(runs) == 1
    for k, (run, name) in enumerate(zip(runs, run_names(runs), strict=True)):
        try:
            content = None if run.path is None else read_bounds(run.path)
            if content is not None:
                one = _Bounded(run, name, k, content)
                _section([one], alone)
                found.append(one)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            damaged.append(
                f"{name}: its certified bounds are left out: "
                + sentence_of(
                    error, "bounds.json", "make it again with marginflow measure --certified"
                )
            )
    return _section(found, alone) if found else None, damaged


def _section(found: Sequence[_Bounded], alone: bool) -> BoundsSection:
    return BoundsSection(
        [_sentence(one, alone) for one in found],
        [note for one in found for note in _notes(one)],
        _curves(found, alone),
        _table(found, alone),
    )


def _sentence(one: _Bounded, alone: bool) -> str:
    c = one.content
    parts = [_share(s) for s in one.sandwiches]
    return (
        f"{'' if alone else f'{one.name}: '}Of the {format_count(number(c, 'examples'))} {_split(c)} "
        f"examples, so many stay rightly classified under every perturbation: {'; '.join(parts)}. "
        f"Without a perturbation it is {format_percent(number(c, 'clean_accuracy'))}."
    )


def _share(s: Mapping[str, Any]) -> str:
    low, high = (number(s, key) for key in ("certified_accuracy", "adversarial_accuracy"))
    by, left = f"certified by {_METHODS[s['certified_by']]}", f"left by {_attack(s)}"
    # What is certified is among what the attack leaves: as many are the same ones.
    if low == high:
        return f"at {_ball(s)} exactly {format_percent(low)} ({by}, {left})"
    return f"at {_ball(s)} between {format_percent(low)} ({by}) and {format_percent(high)} ({left})"


def _notes(one: _Bounded) -> list[str]:
    c, name = one.content, one.name
    notes = [
        f"{name}: {reason[0].upper()}{reason[1:]}."
        for reason in dict.fromkeys(str(s["certified_reason"]) for s in c["sandwiches"])
        if reason and "takes this model" not in reason
    ]
    if any(number(s, "certified_accuracy") == 0 for s in c["sandwiches"]):
        notes.append(
            f"{name}: a certified accuracy of 0% is no sign of a weak network; the bounds are "
            "then too wide to say anything."
        )
    step, last = number(c, "step"), number(one.run.final, "step")
    if step is not None and last is not None and last > step:
        notes.append(
            f"{name}: bounded at step {format_count(step)}; the run has gone on to step "
            f"{format_count(last)} since. Run marginflow measure --certified again."
        )
    return notes


def _curves(found: Sequence[_Bounded], alone: bool) -> Captioned | None:
    curves = []
    norms = {str(s["p"]) for one in found for s in one.sandwiches}
    for one in found:
        for label, key in (
            ("attacked", "adversarial_accuracy"),
            ("certified", "certified_accuracy"),
        ):
            x = [float(s["eps"]) for s in one.sandwiches]
            y = [number(s, key) for s in one.sandwiches]
            name = label if alone else f"{one.name}, {label}"
            curves.append(Curve(name, x, y, color=one.color, dashed=label == "certified"))
    # One axis is one norm, and one point is no curve.
    if len(norms) > 1 or all(len(set(curve.x)) < 2 for curve in curves):
        return None
    panel = Panel("Accuracy against ε", f"ε ({_norm(norms.pop())})", "accuracy", tuple(curves))
    return Captioned(
        panel,
        "The accuracy under the worst perturbation of size ε lies between the two lines: the "
        "attack may have missed the worst, the bounds may be too careful.",
    )


def _table(found: Sequence[_Bounded], alone: bool) -> Table:
    pairs = [(one, s) for one in found for s in one.sandwiches]
    exponent = margin_exponent([number(s, "normalized_margin") for _, s in pairs])
    raw = any(number(s, "normalized_margin") is None for _, s in pairs)
    lines = [_line(one.content, s, exponent) | (_raw(s) if raw else {}) for one, s in pairs]
    rows = [[title, *(line[title] for line in lines)] for title in lines[0]]
    header = ["", *((_ball(s) if alone else f"{one.name}, {_ball(s)}") for one, s in pairs)]
    colors = {k: one.color for k, (one, _) in enumerate(pairs, start=1)} if not alone else None
    return Table("Certified ≤ true ≤ attacked", header, rows, colors=colors)


def _line(c: Mapping[str, Any], s: Mapping[str, Any], exponent: int) -> dict[str, str]:
    unit = margin_unit(exponent)
    levels = [float(level) for level in c["quantile_levels"]]
    widths, margins = None, None
    if s["normalized_margin"] is not None:
        widths, margins = s["width_quantiles"], s["margin_quantiles"]
    low, middle, high = (
        format_margin(None if widths is None else widths[levels.index(level)], exponent)
        for level in (_SPREAD[0], 0.5, _SPREAD[1])
    )
    median = None if margins is None else margins[levels.index(0.5)]
    return {
        "attack": _attack(s),
        "bounds by": str(s["certified_by"]),
        "examples": f"{_split(c)}, n = {format_count(number(c, 'examples'))}",
        "clean accuracy": format_percent(number(c, "clean_accuracy")),
        "attacked accuracy": format_percent(number(s, "adversarial_accuracy")),
        "certified accuracy": format_percent(number(s, "certified_accuracy")),
        f"γ̂_m, attacked{unit}": format_margin(number(s, "normalized_margin"), exponent),
        f"γ̂_m, certified{unit}": format_margin(number(s, "certified_normalized_margin"), exponent),
        f"γ̂, median, attacked{unit}": format_margin(median, exponent),
        f"width, median{unit}": middle,
        f"width, 5% to 95%{unit}": MISSING if widths is None else f"{low} to {high}",
        "seed": format_count(number(c, "seed")),
    }


def _raw(s: Mapping[str, Any]) -> dict[str, str]:
    """What a network without normalised margins has."""
    return {
        "min m, attacked": format_number(number(s, "margin")),
        "min m, certified": format_number(number(s, "certified_margin")),
        "width of m, median": format_number(number(s, "certified_margin_width")),
    }


def _split(c: Mapping[str, Any]) -> str:
    return {"train": "training"}.get(str(c["split"]), str(c["split"]))


def _attack(s: Mapping[str, Any]) -> str:
    return attack_words(s["attack"]).split(", ε")[0]


def _ball(s: Mapping[str, Any]) -> str:
    return f"{_norm(str(s['p']))}, ε = {fraction(repr(float(s['eps'])))}"


def _norm(p: str) -> str:
    return f"ℓ{'∞' if p == 'inf' else f'{float(p):g}'}"
