"""The panels of a sweep: margins, accuracies and residuals against each swept option."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginflow._specs import number as parsed_number
from marginflow.errors import SpecificationError
from marginflow.experiments import Curve, Panel, Scale
from marginflow.report._panels import Captioned
from marginflow.report._text import number
from marginflow.sweeps import Outcome, Sweep

MOST_CURVES = 7
"""Curves of a panel; where there would be more, one curve shows the mean over them, with a band."""

_WIDE = 20.0  # largest over smallest, from which on an axis is logarithmic
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?(?:/\d+)?", re.IGNORECASE)

Quantity = Callable[[Outcome], float | None]


@dataclass(frozen=True)
class Axis:
    """A swept option as the x-axis.

    Attributes:
        name: of the option.
        label: of the axis.
        places: where each of its values stands.
        key: what stands where, for values that are no numbers; or empty.
    """

    name: str
    label: str
    places: Mapping[Any, float]
    key: str = ""


def sweep_panels(sweep: Sweep) -> list[Captioned]:
    """γ̂_m, adversarial accuracy and r against every swept option but the seed.

    One curve for each choice of the other options, the mean over seeds with a band from least to
    largest; or one curve for all of them where they are more than :data:`MOST_CURVES`.
    """
    trials = sweep.finished
    panels = []
    for axis in axes_of(sweep):
        others = [name for name in sweep.swept if name not in (axis.name, "seed")]
        groups = _groups(trials, others)
        merged = len(groups) > MOST_CURVES
        if merged:
            groups = {"": list(trials)}
        caption = _caption(axis, sweep, merged, others)
        for title, ylabel, quantities in _QUANTITIES:
            curves = [
                curve
                for color, (label, members) in enumerate(groups.items())
                for place, (words, quantity) in enumerate(quantities)
                if (curve := _curve(label, words, members, axis, quantity, color, place > 0))
            ]
            if not curves:
                continue
            values = [y for curve in curves for y in curve.y if y is not None]
            yscale: Scale = "log" if title.startswith("Residual") and _wide(values) else "linear"
            xscale: Scale = "log" if not axis.key and _wide(axis.places.values()) else "linear"
            name = f"{title} against {axis.name}"
            panels.append(
                Captioned(Panel(name, axis.label, ylabel, curves, xscale, yscale), caption)
            )
    return panels


def axes_of(sweep: Sweep) -> list[Axis]:
    """The swept options that take more than one value, but for the seed, in their order."""
    found = []
    for name in sweep.swept:
        values = list(dict.fromkeys(t.swept[name] for t in sweep.trials if name in t.swept))
        if name == "seed" or len(values) < 2:
            continue
        found.append(_axis(name, values))
    return found


def _axis(name: str, values: Sequence[Any]) -> Axis:
    """Numbers at their places, as are texts that differ in one number only; others side by side."""
    texts = [str(value) for value in values]
    if not any(isinstance(value, bool) for value in values):
        try:
            places = [parsed_number(text, name) for text in texts]
            return Axis(name, name, dict(zip(values, places, strict=True)))
        except SpecificationError:
            pass
        if len({_NUMBER.sub("#", text) for text in texts}) == 1:
            parts = list(zip(*(_NUMBER.findall(text) for text in texts), strict=True))
            differing = [k for k, part in enumerate(parts) if len(set(part)) > 1]
            if len(differing) == 1:
                (k,) = differing
                places = [parsed_number(part, name) for part in parts[k]]
                start, end = list(_NUMBER.finditer(texts[0]))[k].span()
                label = f"{name}: {texts[0][:start]}…{texts[0][end:]}"
                return Axis(name, label, dict(zip(values, places, strict=True)))
    key = ", ".join(f"{k} = {text}" for k, text in enumerate(texts, start=1))
    return Axis(name, f"{name} (see below)", {v: float(k + 1) for k, v in enumerate(values)}, key)


def _groups(trials: Sequence[Outcome], names: Sequence[str]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for trial in trials:
        label = ", ".join(f"{n} = {trial.swept[n]}" for n in names if n in trial.swept)
        found.setdefault(label, []).append(trial)
    return found


def _curve(
    label: str,
    words: str,
    trials: Sequence[Outcome],
    axis: Axis,
    quantity: Quantity,
    color: int,
    dashed: bool,
) -> Curve | None:
    """The quantity by the option's places: means, with the least and the largest as a band."""
    found: dict[float, list[float]] = {}
    for trial in trials:
        place, value = axis.places.get(trial.swept.get(axis.name)), quantity(trial)
        if place is not None and value is not None:
            found.setdefault(place, []).append(value)
    if not found:
        return None
    x = sorted(found)
    several = any(len(values) > 1 for values in found.values())
    return Curve(
        ", ".join(part for part in (label, words) if part),
        x,
        [math.fsum(found[place]) / len(found[place]) for place in x],
        [min(found[place]) for place in x] if several else (),
        [max(found[place]) for place in x] if several else (),
        color=color,
        dashed=dashed,
    )


def _caption(axis: Axis, sweep: Sweep, merged: bool, others: Sequence[str]) -> str:
    parts = [f"Positions: {axis.key}."] if axis.key else []
    if merged:
        parts.append(f"Mean over all choices of {', '.join(others)}; band: least to largest.")
    seeds = len({trial.swept["seed"] for trial in sweep.trials if "seed" in trial.swept})
    if seeds > 1 and not merged:
        parts.append("Mean over the seeds; band: least to largest.")
    count = len(sweep.finished)
    parts.append(f"Final measurements of {count} trial{'s' * (count != 1)}.")
    return " ".join(parts)


def _wide(values: Any) -> bool:
    numbers = list(values)
    return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= _WIDE


def _final(key: str, factor: float = 1.0) -> Quantity:
    def read(trial: Outcome) -> float | None:
        value = number(trial.final, key)
        return None if value is None else factor * value

    return read


_QUANTITIES: tuple[tuple[str, str, tuple[tuple[str, Quantity], ...]], ...] = (
    ("Normalised adversarial margin", "γ̂_m", (("", _final("normalized_margin")),)),
    (
        "Adversarial accuracy",
        "adversarial accuracy (%)",
        (
            ("test", _final("test_adversarial_accuracy", 100)),
            ("train", _final("adversarial_accuracy", 100)),
        ),
    ),
    ("Residual of the KKT certificate", "residual r", (("", lambda trial: trial.residual),)),
)
