"""One run, or several beside each other, as a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginflow.experiments import Curve, FigureData, Panel, Scale
from marginflow.monitor import QUANTILES
from marginflow.report._statement import (
    caveats,
    default_title,
    is_standard,
    measured_words,
    setting,
    statement,
    unperturbed,
)
from marginflow.report._text import (
    check_runs,
    epoch_of,
    format_margin,
    margin_exponent,
    margin_unit,
    number,
    run_names,
)
from marginflow.runs import Run

_LOW, _HIGH = QUANTILES.index(0.05), QUANTILES.index(0.95)
_MOST_BANDS = 3  # more of them would only cover each other

Value = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True)
class Captioned:
    """A panel, and what is said under it."""

    panel: Panel
    caption: str


def comparison(runs: Sequence[Run], title: str | None = None) -> FigureData:
    """The figure of one run, or of several beside each other, from what was measured.

    Panels: γ̂_m (the smallest normalised margin; band: 5 % to 95 % of the examples) against the
    epoch, adversarial and clean accuracy (train solid, test dashed), the layer norms ρ_k of one
    run or the norm products ρ of several, and the loss as ln L. Numbers that are missing or not
    finite are gaps; a panel without any number is left out.

    Args:
        runs: measured runs, in the order of their colours.
        title: the figure's title; by default the names of the runs.

    Raises:
        InputError: no runs.
        RunError: a run without measurements.
    """
    parts = captioned_panels(runs)
    return FigureData(
        name="comparison" if len(runs) > 1 else "run",
        title=default_title(runs) if title is None else title,
        statement=statement(runs),
        panels=tuple(part.panel for part in parts),
        notes=(
            *(f"{part.panel.title}: {part.caption}" for part in parts),
            f"{setting(runs)}.",
            *caveats(runs),
        ),
    )


def captioned_panels(runs: Sequence[Run]) -> list[Captioned]:
    """The panels of :func:`comparison`, each with its caption.

    Raises:
        InputError: no runs.
        RunError: a run without measurements.
    """
    check_runs(runs)
    parts = [_margins(runs), *_accuracies(runs), _norms(runs), _losses(runs)]
    return [part for part in parts if part.panel.curves]


def _panel(
    runs: Sequence[Run],
    title: str,
    ylabel: str,
    curves: Sequence[Curve | None],
    yscale: Scale = "linear",
) -> Panel:
    epochs = all(number(record, "epoch") is not None for run in runs for record in run.metrics)
    last = max((x for run in runs for x in _xs(run)), default=0.0)
    return Panel(
        title=title,
        xlabel="epoch" if epochs else "step",
        ylabel=ylabel,
        curves=tuple(curve for curve in curves if curve is not None),
        # Margins grow like ln t: late epochs are many and alike. Below 20 there is no crowd yet.
        xscale="symlog" if last > 20 else "linear",
        yscale=yscale,
    )


def _xs(run: Run) -> list[float]:
    return [x for record in run.metrics if (x := epoch_of(record)) is not None]


def _curve(run: Run, label: str, value: Value, color: int, **style: Any) -> Curve | None:
    """The curve of ``value`` over the run's measurements; None if there is no number at all."""
    records = [record for record in run.metrics if epoch_of(record) is not None]
    y = [value(record) for record in records]
    if all(v is None for v in y):
        return None
    band = {side: [of(record) for record in records] for side, of in style.items() if callable(of)}
    rest = {name: option for name, option in style.items() if not callable(option)}
    return Curve(label, _xs(run), y, color=color, **band, **rest)


def _of(key: str, factor: float = 1.0) -> Value:
    def value(record: Mapping[str, Any]) -> float | None:
        found = number(record, key)
        return None if found is None else found * factor

    return value


def _entry(key: str, k: int, factor: float = 1.0) -> Value:
    def value(record: Mapping[str, Any]) -> float | None:
        entries = record.get(key)
        if not isinstance(entries, list) or len(entries) <= k:
            return None
        found = number({key: entries[k]}, key)
        return None if found is None else found * factor

    return value


def _margins(runs: Sequence[Run]) -> Captioned:
    names = run_names(runs)
    exponent = margin_exponent([number(run.final, "normalized_margin") for run in runs])
    factor = 10.0**-exponent
    bands = len(runs) <= _MOST_BANDS
    key = "normalized_margin_quantiles"
    style: dict[str, Any] = (
        {"low": _entry(key, _LOW, factor), "high": _entry(key, _HIGH, factor)} if bands else {}
    )
    curves = [
        _curve(run, name, _of("normalized_margin", factor), color=k, **style)
        for k, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    kind = "adversarial margin" if not all(map(unperturbed, runs)) else "margin"
    perturbations = {measured_words(run) for run in runs}
    under = f" under {perturbations.pop()}" if len(perturbations) == 1 else ""
    caption = f"Line: the smallest of the training examples{under}."
    if bands:
        caption += " Band: from the 5% to the 95% quantile of the examples."
    caption += " Above zero, every example is classified correctly."
    yscale: Scale = "symlog" if _spread(curves) else "linear"
    if yscale == "symlog":
        caption += " The vertical axis is linear around zero and logarithmic beyond."
    panel = _panel(runs, f"Normalised {kind} γ̂_m", f"γ̂_m{margin_unit(exponent)}", curves, yscale)
    return Captioned(panel, caption)


def _spread(curves: Sequence[Curve | None]) -> bool:
    """Whether the final margins would be one flat line at zero on a linear axis."""
    finals = [[v for v in c.y if v is not None][-1] for c in curves if c is not None]
    sizes = [abs(v) for c in curves if c is not None for v in c.y if v is not None]
    return bool(sizes) and max(sizes) > 20 * min(abs(v) for v in finals)


def _accuracies(runs: Sequence[Run]) -> list[Captioned]:
    perturbed = not all(map(unperturbed, runs))
    parts = []
    if perturbed:
        parts.append(
            _accuracy(
                runs,
                "Adversarial accuracy",
                "adversarial_accuracy",
                "Share of examples that are classified correctly when perturbed.",
            )
        )
    parts.append(
        _accuracy(
            runs,
            "Clean accuracy",
            "clean_accuracy",
            "Share of unperturbed examples that are classified correctly.",
        )
    )
    return parts


def _accuracy(runs: Sequence[Run], title: str, key: str, caption: str) -> Captioned:
    names = [f"{name}, " for name in run_names(runs)] if len(runs) > 1 else [""]
    curves = []
    tested = False
    for k, (name, run) in enumerate(zip(names, runs, strict=True)):
        test = _curve(run, f"{name}test", _of(f"test_{key}", 100.0), color=k, dashed=True)
        tested = tested or test is not None
        curves += [_curve(run, f"{name}train", _of(key, 100.0), color=k), test]
    if tested:
        caption += " Solid: training examples; dashed: test examples."
    return Captioned(_panel(runs, title, "correct (%)", curves), caption)


def _norms(runs: Sequence[Run]) -> Captioned:
    if len(runs) > 1:
        curves = [
            _curve(run, name, _of("norm_product"), color=k)
            for k, (name, run) in enumerate(zip(run_names(runs), runs, strict=True))
        ]
        return Captioned(
            _panel(runs, "Norm product ρ", "ρ", curves, "log"),
            "ρ = Π ρ_k^{c_k}, by which margins are normalised; logarithmic axis.",
        )
    run = runs[0]
    layers = [
        _curve(run, name, _entry("layer_norms", k), color=k)
        for k, name in enumerate(layer_names(run))
    ]
    return Captioned(
        _panel(runs, "Layer norms ρ_k", "ρ_k", layers), "ρ_k: Frobenius norm of layer k."
    )


def layer_names(run: Run) -> list[str]:
    """The names of the layers in the order of ``layer_norms``; numbers where none are recorded."""
    table = run.config.get("layers")
    norms = run.final.get("layer_norms")
    known = [
        str(layer.get("name")) if isinstance(layer, Mapping) else "?"
        for layer in (table if isinstance(table, list) else [])
    ]
    count = len(norms) if isinstance(norms, list) else 0
    return [known[k] if k < len(known) else f"layer {k + 1}" for k in range(count)]


def _losses(runs: Sequence[Run]) -> Captioned:
    names = run_names(runs)
    curves = []
    several = len(runs) > 1
    for k, (name, run) in enumerate(zip(names, runs, strict=True)):
        label = name if several else "on the measured examples"
        curves.append(_curve(run, label, _of("log_loss"), color=k))
    caption = "ln L at the measured weights"
    caption += "." if all(map(unperturbed, runs)) else ", on perturbed training examples."
    return Captioned(_panel(runs, "Loss", "ln L", curves), caption)
