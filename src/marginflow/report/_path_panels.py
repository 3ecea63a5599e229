"""What the kept weights of runs show along their paths: alignment, distance to a KKT point."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from marginflow.alignment import Alignment, measure_alignment
from marginflow.attacks import build as build_attack
from marginflow.datasets import Dataset, load
from marginflow.errors import MarginflowError, ModelError
from marginflow.experiments import Curve
from marginflow.kkt import Certificate, kkt_certificate
from marginflow.models import linear_layers, load_weights
from marginflow.models._build import rebuild
from marginflow.models._weights import check_weights
from marginflow.report._clock import Clock
from marginflow.report._panels import Captioned, panel_of
from marginflow.report._text import number, run_names
from marginflow.runs import Run

_ROUNDING = 1e-30  # of a gap, the square of a ratio in float64
_POINTS = 12
_WORK = 2e6  # examples × weights at one point: with it a page still takes seconds


def alignment(clock: Clock, runs: Sequence[Run]) -> Captioned:
    """How far the layers of deep linear networks are from rank one and from each other (Theorem 2).

    One run: ``1 − (‖W_k‖₂/‖W_k‖_F)²`` and ``1 − ⟨u_k, v_{k+1}⟩²``, layer by layer. Several: the one
    scalar for it all, ``1 − ‖W_Π‖₂/Π ‖W_k‖_F``. Curves of runs whose weights were kept.
    """
    curves: list[Curve | None] = []
    if len(runs) > 1:
        for k, (name, run) in enumerate(zip(run_names(runs), runs, strict=True)):
            gaps = {step: found.product_gap for step, found in _alignments(run).items()}
            curves.append(_curve(clock, run, name, gaps, k, least=_ROUNDING))
        return Captioned(
            panel_of(clock, "Alignment of the layers", "1 − ‖W_Π‖₂ / Π ‖W_k‖_F", curves, "log"),
            "0 exactly if every layer has rank one and neighbouring layers are aligned, as Theorem 2 "
            "predicts of deep linear networks. Runs that kept the weights of such a network. "
            "Logarithmic axis.",
        )
    found = _alignments(runs[0])
    depth = len(next(iter(found.values())).spectral) if found else 0
    for k in range(depth):
        gaps = {step: float(a.rank_one_gaps[k]) for step, a in found.items()}
        curves.append(_curve(clock, runs[0], f"rank of W_{k + 1}", gaps, k, least=_ROUNDING))
    for k in range(depth - 1):
        gaps = {step: float(a.neighbour_gaps[k]) for step, a in found.items()}
        label = f"W_{k + 1} and W_{k + 2}"
        curves.append(_curve(clock, runs[0], label, gaps, k, least=_ROUNDING, dashed=True))
    return Captioned(
        panel_of(clock, "Alignment of the layers", "distance from alignment", curves, "log"),
        "Solid: 1 − (‖W_k‖₂/‖W_k‖_F)², 0 for a layer of rank one. Dashed: 1 − ⟨u_k, v_{k+1}⟩², 0 where the "
        "leading singular vectors of neighbouring layers agree. Theorem 2: both tend to 0. Values "
        "below 10⁻³⁰ are rounding and not drawn. Logarithmic axis.",
    )


def residuals(clock: Clock, runs: Sequence[Run]) -> Captioned:
    """The relative distance of the kept weights to a KKT point: best and the paper's multipliers."""
    curves: list[Curve | None] = []
    alone = len(runs) == 1
    for k, (name, run) in enumerate(zip(run_names(runs), runs, strict=True)):
        found = _certificates(run)
        best = {step: c.residuals.best for step, c in found.items()}
        label = "best multipliers" if alone else name
        curves.append(_curve(clock, run, label, best, k))
        if alone and run.config.get("loss") in ("exponential", "logistic"):
            paper = {step: c.residuals.paper for step, c in found.items()}
            curves.append(_curve(clock, run, "the paper’s multipliers", paper, k, dashed=True))
    caption = (
        "‖W − Σ λ_i ∂m_i‖ / ‖W‖ at kept weights with positive margins: the relative distance to a KKT "
        "point of the largest margin, 0 at one (Theorem 5). Solid: the best multipliers λ ≥ 0."
    )
    if any(curve is not None and curve.dashed for curve in curves):
        caption += " Dashed: the paper’s, from the slopes of the loss; never below."
    panel = panel_of(clock, "Distance to a KKT point", "relative residual", curves, "log")
    return Captioned(panel, f"{caption} Logarithmic axis.")


def _curve(
    clock: Clock,
    run: Run,
    label: str,
    values: Mapping[int, float],
    color: int,
    *,
    least: float = 0.0,
    dashed: bool = False,
) -> Curve | None:
    """The curve through ``values``, by step, that exceed ``least``; None if there is none."""
    points = [
        (x, values[record["step"]])
        for record in run.metrics
        if (x := clock.at(record)) is not None and values.get(record["step"], 0.0) > least
    ]
    if not points:
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return Curve(label, xs, ys, color=color, dashed=dashed)


def _alignments(run: Run) -> dict[int, Alignment]:
    """By step, where the weights of a deep linear network were kept and no layer is 0."""
    try:
        kept = run.trajectory()
        if not kept:
            return {}
        model = rebuild(run.config["model"], kept[max(kept)])
        linear_layers(model)  # refuses other networks
    except (MarginflowError, KeyError, TypeError):
        return {}
    names = [name for name, _ in model.named_parameters()]
    found = {}
    for step, weights in kept.items():
        with contextlib.suppress(ModelError):
            check_weights(model, weights)
            found[step] = measure_alignment(tuple(weights[name].double() for name in names))
    return found


def _certificates(run: Run) -> dict[int, Certificate]:
    """By step, at twelve kept points at most; none where the run is large or its data are not at hand."""
    try:
        kept = run.trajectory()
        if not kept:
            return {}
        model = rebuild(run.config["model"], kept[max(kept)]).double()
        attack = build_attack(run.config["attack"])
        data = _data_of(run, sum(p.numel() for p in model.parameters()))
    except (MarginflowError, KeyError, TypeError):
        return {}
    if data is None:
        return {}
    loss = "logistic" if run.config.get("loss") == "logistic" else "exponential"
    margins = {record.get("step"): number(record, "normalized_margin") for record in run.metrics}
    steps = [step for step in kept if (margins.get(step) or 0.0) > 0]
    found = {}
    for step in _spread(steps):
        load_weights(model, kept[step])
        with contextlib.suppress(
            MarginflowError
        ):  # margins not positive under the run's own attack
            found[step] = kkt_certificate(model, data.x, data.y, attack, loss=loss)
    return found


def _spread(steps: Sequence[int]) -> list[int]:
    """Twelve of them at most, the first and the last among them."""
    last = len(steps) - 1
    count = min(len(steps), _POINTS)
    return [steps[round(k * last / max(1, count - 1))] for k in range(count)]


def _data_of(run: Run, weights: int) -> Dataset | None:
    """The run's data, if they can be loaded by name and are not too many for ``weights``."""
    if (number(run.config, "examples") or 0.0) * weights > _WORK:
        return None
    data = load(str(run.config.get("data")))
    return data if data.fingerprint() == run.config.get("data_sha256") else None
