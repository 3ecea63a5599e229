"""The panels of gradient flows against ln t: what grows, what stays, and the ratios that theory predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from marginflow.experiments import Curve, Panel
from marginflow.report._clock import Clock, is_flow, log_time_of
from marginflow.report._panels import (
    MOST_BANDS,
    Captioned,
    Value,
    close_to_zero,
    curve_of,
    entry_of,
    pairs,
    panel_of,
    value_of,
)
from marginflow.report._statement import measured_words, unperturbed
from marginflow.report._tables import RATIOS_SINCE, margin_over_log_time, order_of, own_loss
from marginflow.report._text import margin_exponent, margin_unit, number, run_names
from marginflow.runs import QUANTILES, Run

_LOW, _HIGH = QUANTILES.index(0.05), QUANTILES.index(0.95)
_MARGIN = "normalized_margin"
_LATE = 3.0  # ln t from which on ln ln t is drawn as a prediction


def flow_margins(clock: Clock, runs: Sequence[Run]) -> list[Captioned]:
    """γ̂_m with its band, and ℓ/ρ, which approaches it from below; the curves near zero once more."""
    exponent = margin_exponent([number(run.final, _MARGIN) for run in runs])
    factor = 10.0**-exponent
    few = len(runs) <= MOST_BANDS
    key = f"{_MARGIN}_quantiles"
    band = (entry_of(key, _LOW, factor), entry_of(key, _HIGH, factor)) if few else None
    solid: list[Curve | None] = []
    curves: list[Curve | None] = []
    for k, (margin, smoothed) in enumerate(pairs(runs, "γ̂_m", "ℓ/ρ")):
        solid.append(curve_of(clock, runs[k], margin, value_of(_MARGIN, factor), k, band=band))
        curves.append(solid[-1])
        if few:
            value = _positive("smoothed_margin", factor)
            curves.append(curve_of(clock, runs[k], smoothed, value, k, dashed=True))
    clean = all(map(unperturbed, runs))
    perturbations = {measured_words(run) for run in runs}
    under = f" under {perturbations.pop()}" if len(perturbations) == 1 and not clean else ""
    caption = f"Solid: the smallest margin of the {'unperturbed ' * clean}training examples{under}"
    caption += ", divided by ρ."
    if few:
        caption += (
            " Band: from the 5% to the 95% quantile of the examples. Dashed, where it is positive: "
            "the smoothed margin ℓ/ρ, ℓ = −ln Σ exp(−m_i), never above γ̂_m and closer and closer to it."
        )
    caption += " Where γ̂_m is above zero, every example is classified correctly."
    if any(map(is_flow, runs)) and clock.logarithmic:
        caption += " The start, t = 0, has no ln t and is not drawn."
    if exponent:
        caption += f" Unit: 10{margin_unit(exponent).strip(' ()').removeprefix('×10')}."
    ylabel = f"γ̂_m{margin_unit(exponent)}"
    parts = [Captioned(panel_of(clock, "Normalised margin γ̂_m", ylabel, curves), caption)]
    if close := close_to_zero([curve for curve in solid if curve is not None]):
        text = "The late parts of the curves that end near zero, at a larger scale; linear axes."
        parts.append(Captioned(Panel("γ̂_m near zero", clock.label, ylabel, close), text))
    return parts


def flow_accuracy(clock: Clock, run: Run) -> Captioned:
    """Adversarial and clean accuracy of one flow, in one panel."""
    curves = []
    kinds = [("unperturbed", "clean_accuracy")]
    if not unperturbed(run):
        kinds.insert(0, ("perturbed", "adversarial_accuracy"))
    for k, (kind, key) in enumerate(kinds):
        for prefix, split in (("", "train"), ("test_", "test")):
            value = value_of(prefix + key, 100.0)
            curves.append(
                curve_of(clock, run, f"{kind}, {split}", value, k, dashed=split == "test")
            )
    caption = "Share of examples, in percent, that are classified correctly."
    if any(curve is not None and curve.dashed for curve in curves):
        caption += " Solid: training examples; dashed: test examples."
    return Captioned(panel_of(clock, "Accuracy", "correct (%)", curves), caption)


def ratios(clock: Clock, runs: Sequence[Run]) -> Captioned:
    """``ρ γ̂_m / ln t``, which tends to 1; for one run ``ln(1/L) / ln t`` too."""
    curves = [
        curve_of(clock, run, name, margin_over_log_time, k, since=RATIOS_SINCE)
        for k, (name, run) in enumerate(zip(run_names(runs), runs, strict=True))
        if own_loss(run)
    ]
    caption = "The smallest margin m = ρ γ̂_m divided by ln t, from ln t = 1 on."
    title, ylabel = "Margin against ln t", "ρ γ̂_m / ln t"
    if len(runs) == 1:
        title, ylabel = "Margin and loss against ln t", "ratio to ln t"
        curves = [
            curve_of(clock, runs[0], "ρ γ̂_m / ln t", margin_over_log_time, 0, since=RATIOS_SINCE),
            curve_of(clock, runs[0], "ln(1/L) / ln t", _loss_over_log_time, 1, since=RATIOS_SINCE),
        ]
        caption = "The smallest margin m = ρ γ̂_m and ln(1/L), divided by ln t, from ln t = 1 on."
    caption += (
        " Once the data are separated both grow like ln t: the ratios tend to 1 (Theorem 3, sharpened), "
        "slowly, with a distance of order ln ln t / ln t."
    )
    if not all(map(own_loss, runs)):
        caption += " Runs measured under another perturbation than their own are left out."
    if xs := [x for curve in curves if curve is not None for x in curve.x]:
        ends = [min(xs), max(xs)]
        curves.append(Curve("limit", ends, [1.0, 1.0], dashed=True, measured=False))
    return Captioned(panel_of(clock, title, ylabel, curves, late=True), caption)


def log_loss_times_t(clock: Clock, runs: Sequence[Run]) -> Captioned:
    """``ln(tL)``, which falls like ``−(2 − 2/K) ln ln t``; the prediction beside a single flow."""
    names = run_names(runs) if len(runs) > 1 else ["measured"]
    curves = [
        curve_of(clock, run, name, _log_tl_of(run), k)
        for k, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    caption = (
        "t L, the time multiplied by the loss, as a logarithm. Theory: it falls like ln t to the power "
        "−(2 − 2/K) once the data are separated, K the order of the network."
    )
    order = order_of(runs[0])
    predicted = _predicted(curves[0], order) if len(runs) == 1 and _separated(runs[0]) else None
    if predicted is not None:
        curves.append(predicted)
        caption += f" Dashed: that slope (K = {order:g}), drawn through the last measurement."
    return Captioned(panel_of(clock, "Loss times t", "ln(tL)", curves), caption)


def opposition(clock: Clock, runs: Sequence[Run]) -> Captioned:
    """``1 + cos(W, ∇L)`` of the flows, on a logarithmic axis."""
    flows = [(k, run) for k, run in enumerate(runs) if is_flow(run)]
    names = run_names(runs) if len(runs) > 1 else [""]
    curves = [curve_of(clock, run, names[k], _positive("one_plus_cosine"), k) for k, run in flows]
    kinds = {str(run.config.get("derivative") or "recorded") for _, run in flows}
    gradient = f"the {kinds.pop()} gradient ∇L" if len(kinds) == 1 else "the gradient ∇L"
    caption = (
        f"cos is the cosine of the angle between the weights W and {gradient}. It tends to −1 where the "
        "weights end up growing along their own direction, which is then that of a KKT point of "
        "the largest margin (Lemma 12, Theorem 5). Logarithmic axis."
    )
    if len(flows) < len(runs):
        caption += " Training runs do not record it."
    panel = panel_of(clock, "Angle of W and ∇L", "1 + cos(W, ∇L)", curves, "log")
    return Captioned(panel, caption)


def _positive(key: str, factor: float = 1.0) -> Value:
    """The number at ``key`` times ``factor``, where it is positive."""

    def value(record: Mapping[str, Any]) -> float | None:
        found = number(record, key)
        return None if found is None or found <= 0 else found * factor

    return value


def _separated(run: Run) -> bool:
    margin = number(run.final, _MARGIN)
    return margin is not None and margin > 0


def _loss_over_log_time(record: Mapping[str, Any]) -> float | None:
    log_loss, log_time = number(record, "log_loss"), log_time_of(record)
    return None if log_loss is None or not log_time else -log_loss / log_time


def _log_tl_of(run: Run) -> Value:
    """ln(tL), as a flow records it and as it follows from ln t and the loss a training minimises."""

    def value(record: Mapping[str, Any]) -> float | None:
        recorded = number(record, "log_tl")
        if recorded is not None:
            return recorded
        log_time = log_time_of(record)
        log_loss = number(record, "log_loss") if own_loss(run) else log_epoch_loss(record)
        return None if log_time is None or log_loss is None else log_time + log_loss

    return value


def log_epoch_loss(record: Mapping[str, Any]) -> float | None:
    """The logarithm of the mean loss of an epoch's steps."""
    loss = number(record, "epoch_loss")
    return math.log(loss) if loss is not None and loss > 0 else None


def _predicted(measured: Curve | None, order: float | None) -> Curve | None:
    """``−(2 − 2/K) ln ln t`` through the last point, from ln t = 3 on; None if that is not reached."""
    if measured is None or not order:
        return None
    points = [(x, y) for x, y in zip(measured.x, measured.y, strict=True) if y is not None]
    last, end = points[-1]
    xs = [x for x, _ in points if x >= _LATE]
    if len(xs) < 2 or last < _LATE:
        return None
    exponent = 2 - 2 / order
    ys = [end - exponent * (math.log(x) - math.log(last)) for x in xs]
    return Curve("predicted slope", xs, ys, dashed=True, measured=False)
