"""One run, or several beside each other, as a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginflow.experiments import Curve, FigureData, Panel, Scale
from marginflow.monitor import QUANTILES
from marginflow.report._statement import (
    caveats,
    default_title,
    measured_words,
    setting,
    statement,
    unperturbed,
)
from marginflow.report._tables import layer_names
from marginflow.report._text import (
    check_runs,
    epoch_of,
    margin_exponent,
    margin_unit,
    number,
    run_names,
)
from marginflow.runs import Run

_LOW, _HIGH = QUANTILES.index(0.05), QUANTILES.index(0.95)
_MARGIN = "normalized_margin"
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
    parts = [*_margins(runs), *_accuracies(runs), _norms(runs), _losses(runs)]
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


def _curve(
    run: Run,
    label: str,
    value: Value,
    color: int,
    *,
    band: tuple[Value, Value] | None = None,
    dashed: bool = False,
) -> Curve | None:
    """The curve of ``value`` over the run's measurements; None if there is no number at all."""
    records = [record for record in run.metrics if epoch_of(record) is not None]
    y = [value(record) for record in records]
    if all(v is None for v in y):
        return None
    low, high = ([of(record) for record in records] for of in band) if band else ((), ())
    return Curve(label, _xs(run), y, low, high, color=color, dashed=dashed)


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


def _margins(runs: Sequence[Run]) -> list[Captioned]:
    names = run_names(runs)
    exponent = margin_exponent([number(run.final, _MARGIN) for run in runs])
    factor = 10.0**-exponent
    banded = len(runs) <= _MOST_BANDS
    key = f"{_MARGIN}_quantiles"
    band = (_entry(key, _LOW, factor), _entry(key, _HIGH, factor)) if banded else None
    single = len(runs) == 1 and not unperturbed(runs[0])
    curves = [
        _curve(run, "perturbed" if single else name, _of(_MARGIN, factor), color=k, band=band)
        for k, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    if single:
        value = _of(f"clean_{_MARGIN}", factor)
        curves.append(_curve(runs[0], "unperturbed", value, color=0, dashed=True))
    perturbations = {measured_words(run) for run in runs}
    clean = all(map(unperturbed, runs))
    under = f" under {perturbations.pop()}" if len(perturbations) == 1 and not clean else ""
    caption = f"Line: the smallest margin of the {'unperturbed ' * clean}training examples{under}."
    if banded:
        caption += " Band: from the 5% to the 95% quantile of the examples."
    caption += " Where the line is above zero, every one of them is classified correctly."
    if exponent:
        caption += f" Unit: 10{margin_unit(exponent).strip(' ()').removeprefix('×10')}."
    ylabel = f"γ̂_m{margin_unit(exponent)}"
    parts = [Captioned(_panel(runs, "Normalised margin γ̂_m", ylabel, curves), caption)]
    if close := _close_to_zero([curve for curve in curves if curve is not None]):
        parts.append(
            Captioned(
                Panel("γ̂_m near zero", parts[0].panel.xlabel, ylabel, close),
                "The late epochs of the curves that end near zero, at a larger scale; linear axes.",
            )
        )
    return parts


def _close_to_zero(curves: Sequence[Curve]) -> list[Curve]:
    """The late parts of those curves that end as a flat line at zero on the common axis.

    A late part begins where the curve comes, for good, to within three times the size that it
    has in the last half of its epochs.
    """
    sizes = [abs(v) for c in curves for part in (c.y, c.low, c.high) for v in part if v is not None]
    late = []
    for curve in curves:
        points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
        tail = max(abs(y) for x, y in points if x >= points[-1][0] / 2)
        far = [k for k, (_, y) in enumerate(points) if abs(y) > 3 * tail]
        points = points[far[-1] + 1 if far else 0 :]
        if 0 < tail < max(sizes) / 20 and len(points) >= 3:
            x, y = zip(*points, strict=True)
            late.append(Curve(curve.label, x, y, color=curve.color))
    return late


def _accuracies(runs: Sequence[Run]) -> list[Captioned]:
    perturbed = not all(map(unperturbed, runs))
    parts = []
    if perturbed:
        parts.append(
            _accuracy(
                runs,
                "Adversarial accuracy",
                "adversarial_accuracy",
                "Share of examples, in percent, that are classified correctly when perturbed.",
            )
        )
    parts.append(
        _accuracy(
            runs,
            "Clean accuracy",
            "clean_accuracy",
            "Share of unperturbed examples, in percent, that are classified correctly.",
        )
    )
    return parts


def _accuracy(runs: Sequence[Run], title: str, key: str, caption: str) -> Captioned:
    curves: list[Curve | None] = []
    for k, (train, test) in enumerate(_pairs(runs, "train", "test")):
        curves.append(_curve(runs[k], train, _of(key, 100.0), color=k))
        curves.append(_curve(runs[k], test, _of(f"test_{key}", 100.0), color=k, dashed=True))
    if any(curve is not None and curve.dashed for curve in curves):
        caption += " Solid: training examples; dashed: test examples."
    return Captioned(_panel(runs, title, "correct (%)", curves), caption)


def _pairs(runs: Sequence[Run], solid: str, dashed: str) -> list[tuple[str, str]]:
    """The labels of a solid and a dashed curve of each run."""
    names = run_names(runs)
    if len(runs) == 1:
        return [(solid, dashed)]
    if len(runs) == 2:
        return [(f"{name}, {solid}", f"{name}, {dashed}") for name in names]
    # The legend of many runs names each once; the caption tells solid from dashed.
    return [(name, "") for name in names]


def _norms(runs: Sequence[Run]) -> Captioned:
    if len(runs) > 1:
        curves = [
            _curve(run, name, _of("norm_product"), color=k)
            for k, (name, run) in enumerate(zip(run_names(runs), runs, strict=True))
        ]
        return Captioned(
            _panel(runs, "Norm product ρ", "ρ", curves, "log"),
            "ρ is the product of the layer norms ρ_k, each to the power of its degree c_k; margins are "
            "normalised by it. Logarithmic axis.",
        )
    run = runs[0]
    layers = [
        _curve(run, name, _entry("layer_norms", k), color=k)
        for k, name in enumerate(layer_names(run))
    ]
    return Captioned(
        _panel(runs, "Layer norms ρ_k", "ρ_k", layers),
        "Frobenius norm of the weights of each layer.",
    )


def _losses(runs: Sequence[Run]) -> Captioned:
    perturbed = not all(map(unperturbed, runs))
    curves: list[Curve | None] = []
    for k, (measured, trained) in enumerate(
        _pairs(runs, "perturbed" if perturbed else "measured", "as trained")
    ):
        run = runs[k]
        curves.append(_curve(run, measured, _of("log_loss"), color=k))
        if run.config.get("attack") != run.config.get("measure_with"):
            curves.append(_curve(run, trained, _log_epoch_loss, color=k, dashed=True))
    kinds = {str(run.config.get("loss")) for run in runs}
    loss = f"{kinds.pop()} loss" if len(kinds) == 1 else "loss"
    caption = f"Natural logarithm of L, the mean {loss} of the training examples"
    caption += ", perturbed as in the measured margins." if perturbed else "."
    if any(curve is not None and curve.dashed for curve in curves):
        caption += " Dashed: the loss that training minimised, mean over an epoch."
    return Captioned(_panel(runs, "Loss", "ln L", curves), caption)


def _log_epoch_loss(record: Mapping[str, Any]) -> float | None:
    loss = number(record, "epoch_loss")
    return math.log(loss) if loss is not None and loss > 0 else None
