"""One run, or several beside each other, as a figure.

Source: marginflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from marginflow.experiments import Curve, FigureData, Panel
from marginflow.report._clock import Clock, clock_of, is_ascent, is_flow
from marginflow.report._flow_panels import (
    flow_accuracy,
    flow_margins,
    log_epoch_loss,
    log_loss_times_t,
    opposition,
    ratios,
)
from marginflow.report._panels import (
    MOST_BANDS,
    Captioned,
    close_to_zero,
    curve_of,
    entry_of,
    pairs,
    panel_of,
    value_of,
)
from marginflow.report._path_panels import alignment, residuals
from marginflow.report._statement import (
    caveats,
    default_title,
    measured_words,
    not_normalized,
    remarks,
    setting,
    statement,
    unperturbed,
)
from marginflow.report._tables import layer_names
from marginflow.report._text import (
    attack_words,
    check_runs,
    margin_exponent,
    margin_unit,
    number,
    run_names,
)
from marginflow.runs import QUANTILES, Metrics, Run

_LOW, _HIGH = QUANTILES.index(0.05), QUANTILES.index(0.95)
_MARGIN = "normalized_margin"
_MOST_LAYERS = 8  # lines that a panel can hold


def comparison(runs: Sequence[Run], title: str | None = None) -> FigureData:
    """The figure of one run, or of several beside each other, from what was measured.

    Panels: γ̂_m (the smallest normalised margin; band: 5 % to 95 % of the examples) against the
    epoch, adversarial and clean accuracy (train solid, test dashed), the layer norms ρ_k of one
    run or the norm products ρ of several, and the loss as ln L. Numbers that are missing or not
    finite are gaps; a panel without any number is left out.

    As soon as one of the runs is a gradient flow, all are drawn against ln t (a training run at
    t = Σ η), with ℓ/ρ beside γ̂_m, logarithmic axes of norms, and in place of the loss what
    theory predicts: ``ρ γ̂_m / ln t → 1``, ``ln(tL)`` and, of flows, ``1 + cos(W, ∇L) → 0``.

    Where the weights along the path were kept: the alignment of the layers of deep linear
    networks, and the relative distance to a KKT point at twelve of the kept points.

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
            *remarks(runs),
        ),
    )


def captioned_panels(runs: Sequence[Run]) -> list[Captioned]:
    """The panels of :func:`comparison`, each with its caption.

    Raises:
        InputError: no runs.
        RunError: a run without measurements.
    """
    check_runs(runs)
    clock = clock_of(runs)
    if any(map(is_flow, runs)):
        alone = len(runs) == 1
        shares = [flow_accuracy(clock, runs[0])] if alone else _accuracies(clock, runs)
        parts = [*flow_margins(clock, runs), *shares, _norms(clock, runs)]
        if clock.logarithmic:
            parts += [ratios(clock, runs), log_loss_times_t(clock, runs)]
        parts.append(opposition(clock, runs))
    else:
        parts = [*_margins(clock, runs), *_accuracies(clock, runs)]
        parts += [_alarm(clock, runs), _norms(clock, runs), _losses(clock, runs)]
    parts += [alignment(clock, runs), residuals(clock, runs)]
    return [part for part in parts if part.panel.curves]


def _margins(clock: Clock, runs: Sequence[Run]) -> list[Captioned]:
    names = run_names(runs)
    exponent = margin_exponent([number(run.final, _MARGIN) for run in runs])
    factor = 10.0**-exponent
    banded = len(runs) <= MOST_BANDS
    key = f"{_MARGIN}_quantiles"
    band = (entry_of(key, _LOW, factor), entry_of(key, _HIGH, factor)) if banded else None
    single = len(runs) == 1 and not unperturbed(runs[0])
    curves = [
        curve_of(
            clock,
            run,
            "perturbed" if single else name,
            value_of(_MARGIN, factor),
            color=k,
            band=band,
        )
        for k, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    if single:
        value = value_of(f"clean_{_MARGIN}", factor)
        curves.append(curve_of(clock, runs[0], "unperturbed", value, color=0, dashed=True))
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
    parts = [Captioned(panel_of(clock, "Normalised margin γ̂_m", ylabel, curves), caption)]
    parts += _raw_margins(clock, runs)
    if close := close_to_zero([curve for curve in curves if curve is not None]):
        parts.append(
            Captioned(
                Panel("γ̂_m near zero", parts[0].panel.xlabel, ylabel, close),
                "The late epochs of the curves that end near zero, at a larger scale; linear axes.",
            )
        )
    return parts


def _raw_margins(clock: Clock, runs: Sequence[Run]) -> list[Captioned]:
    """The margins of networks that have no normalised ones."""
    key = "margin_quantiles"
    curves = [
        curve_of(
            clock,
            run,
            name,
            value_of("margin"),
            color=k,
            band=(entry_of(key, _LOW), entry_of(key, _HIGH)),
        )
        for k, (name, run) in enumerate(zip(run_names(runs), runs, strict=True))
        if not_normalized(run)
    ]
    caption = (
        "Line: the smallest margin of the training examples as the network gives it. Band: from the 5% "
        "to the 95% quantile. These margins grow with the weights; above zero all examples are right."
    )
    return [Captioned(panel_of(clock, "Margins, not normalised", "min m", curves), caption)]


def _alarm(clock: Clock, runs: Sequence[Run]) -> Captioned:
    """The accuracies of the sample under the measured attack and under a stronger one."""
    curves: list[Curve | None] = []
    for k, (weak, strong) in enumerate(pairs(runs, "as measured", "stronger")):
        # Most measurements have neither number: they are no gaps.
        both = Metrics(r for r in runs[k].metrics if "strong_accuracy" in r)
        run = dataclasses.replace(runs[k], metrics=both)
        curves.append(curve_of(clock, run, weak, value_of("sample_accuracy", 100.0), color=k))
        strength = value_of("strong_accuracy", 100.0)
        curves.append(curve_of(clock, run, strong, strength, color=k, dashed=True))
    kinds = {attack_words(run.config.get("strong")) for run in runs if run.config.get("strong")}
    return Captioned(
        panel_of(clock, "A stronger attack beside it", "correct (%)", curves),
        "Share of a sample of the examples that are classified correctly under the measured attack "
        f"(solid) and under {', '.join(sorted(kinds))} (dashed). Catastrophic overfitting is where "
        "the dashed line falls to half of its best while the solid one does not.",
    )


def _accuracies(clock: Clock, runs: Sequence[Run]) -> list[Captioned]:
    perturbed = not all(map(unperturbed, runs))
    parts = []
    if perturbed:
        parts.append(
            _accuracy(
                clock,
                runs,
                "Adversarial accuracy",
                "adversarial_accuracy",
                "Share of examples, in percent, that are classified correctly when perturbed.",
            )
        )
    parts.append(
        _accuracy(
            clock,
            runs,
            "Clean accuracy",
            "clean_accuracy",
            "Share of unperturbed examples, in percent, that are classified correctly.",
        )
    )
    return parts


def _accuracy(clock: Clock, runs: Sequence[Run], title: str, key: str, caption: str) -> Captioned:
    curves: list[Curve | None] = []
    for k, (train, test) in enumerate(pairs(runs, "train", "test")):
        curves.append(curve_of(clock, runs[k], train, value_of(key, 100.0), color=k))
        curves.append(
            curve_of(clock, runs[k], test, value_of(f"test_{key}", 100.0), color=k, dashed=True)
        )
    if any(curve is not None and curve.dashed for curve in curves):
        caption += " Solid: training examples; dashed: test examples."
    return Captioned(panel_of(clock, title, "correct (%)", curves), caption)


def _norms(clock: Clock, runs: Sequence[Run]) -> Captioned:
    if len(runs) > 1:
        curves = [
            curve_of(clock, run, name, value_of("norm_product"), color=k)
            for k, (name, run) in enumerate(zip(run_names(runs), runs, strict=True))
        ]
        return Captioned(
            panel_of(clock, "Norm product ρ", "ρ", curves, "log"),
            "ρ is the product of the layer norms ρ_k, each to the power of its degree c_k; margins are "
            "normalised by it. Logarithmic axis.",
        )
    run = runs[0]
    if len(layer_names(run)) > _MOST_LAYERS:
        whole = curve_of(clock, run, "all layers", value_of("total_norm"), color=0)
        return Captioned(
            panel_of(clock, "Norm ‖W‖", "‖W‖", [whole]),
            "Euclidean norm of all weights; the table of layers has the single ones.",
        )
    # An ascent on spheres keeps the norms: what is left is rounding, and would fill the panel.
    digits = 6 if is_ascent(run) else None
    layers = [
        curve_of(clock, run, name, entry_of("layer_norms", k, digits=digits), color=k)
        for k, name in enumerate(layer_names(run))
    ]
    return Captioned(
        panel_of(clock, "Layer norms ρ_k", "ρ_k", layers, "log" if is_flow(run) else "linear"),
        "Frobenius norm of the weights of each layer." + " Logarithmic axis." * is_flow(run),
    )


def _losses(clock: Clock, runs: Sequence[Run]) -> Captioned:
    perturbed = not all(map(unperturbed, runs))
    curves: list[Curve | None] = []
    for k, (measured, trained) in enumerate(
        pairs(runs, "perturbed" if perturbed else "measured", "as trained")
    ):
        run = runs[k]
        curves.append(curve_of(clock, run, measured, value_of("log_loss"), color=k))
        if run.config.get("attack") != run.config.get("measure_with"):
            curves.append(curve_of(clock, run, trained, log_epoch_loss, color=k, dashed=True))
    kinds = {str(run.config.get("loss")) for run in runs}
    loss = f"{kinds.pop()} loss" if len(kinds) == 1 else "loss"
    caption = f"Natural logarithm of L, the mean {loss} of the training examples"
    caption += ", perturbed as in the measured margins." if perturbed else "."
    if any(curve is not None and curve.dashed for curve in curves):
        caption += " Dashed: the loss that training minimised, mean over an epoch."
    return Captioned(panel_of(clock, "Loss", "ln L", curves), caption)
