"""Figures 6 and 7: norms of deep linear networks grow, and their layers tend to rank one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from marginflow.alignment import Alignment, matrices_along, measure_alignment
from marginflow.experiments._figure import Curve, FigureData, Panel
from marginflow.runs import Run, load_run
from marginflow.workflow import train

DEPTHS = (2, 3, 4)
_DATA = "separable:n=40,d=10,margin=0.3,seed=1"
_ATTACK = "exact-linear:p=2,eps=0.1"
_WIDTH = 10
_EPOCHS = 3000


def deep_linear_runs(
    out: str | os.PathLike[str], *, seed: int = 0, epochs: int = _EPOCHS, progress: bool = False
) -> tuple[Run, ...]:
    """Train deep linear networks of L = 2, 3, 4 layers as in Appendix C.3.

    Full-batch gradient descent at the constant rate 0.1 on linearly separable data with the logistic
    loss and the exact ℓ2 perturbation, in float64. A finished run in ``out`` is read, not
    trained again, so that both figures come from the same networks.

    Raises:
        MarginflowError: whatever :func:`marginflow.train` raises.
    """
    runs = []
    for depth in DEPTHS:
        folder = Path(out) / f"deep-linear-{depth}"
        model = f"deep-linear:{','.join([str(_WIDTH)] * (depth - 1))}"
        resume = (folder / "run.json").exists()
        train(
            model,
            _DATA,
            attack=_ATTACK,
            loss="logistic",
            lr=0.1,
            epochs=epochs,
            seed=seed,
            dtype="float64",
            out=folder,
            resume=resume,
            progress=progress,
        )
        runs.append(load_run(folder))
    return tuple(runs)


def fig6(runs: Sequence[Run]) -> FigureData:
    """``‖W_k‖_F`` of every layer against the step, one panel for each depth (Figure 6)."""
    panels, sentences, growing = [], [], True
    for run in runs:
        steps, points = _path(run)
        values = torch.stack([p.frobenius for p in points])
        growing &= grows(values)
        panels.append(_panel(steps, values, len(points[0].frobenius), "‖W_k‖_F"))
        sentences.append(_growth(values))
    return FigureData(
        "fig6",
        "Figure 6: Frobenius norms of the layers of deep linear networks",
        f"The norms of {'all' if growing else 'not all'} layers keep growing: "
        + "; ".join(sentences)
        + ".",
        panels,
        _notes(runs),
    )


def fig7(runs: Sequence[Run]) -> FigureData:
    """``‖W_k‖₂/‖W_k‖_F`` of every layer, which tends to 1 (Figure 7)."""
    panels, sentences, growing = [], [], True
    for run in runs:
        steps, points = _path(run)
        values = torch.stack([p.ratios for p in points])
        growing &= grows(values)
        panels.append(_panel(steps, values, len(points[0].ratios), "‖W_k‖₂ / ‖W_k‖_F"))
        hidden = values[:, :-1]
        sentences.append(
            f"L = {len(points[0].ratios)}: least ratio {float(hidden[0].min()):.3f} → "
            f"{float(hidden[-1].min()):.3f}"
        )
    return FigureData(
        "fig7",
        "Figure 7: the layers of deep linear networks tend to rank one",
        f"The ratios of {'all' if growing else 'not all'} layers rise towards 1: "
        + "; ".join(sentences)
        + ".",
        panels,
        _notes(runs),
    )


def grows(values: torch.Tensor) -> bool:
    """Whether every layer rises on the last third of the points, never falling by more than rounding.

    The claim that the paper makes of both figures. ``values`` is (points, layers).
    """
    tail = values[len(values) * 2 // 3 :]
    return bool((tail.diff(dim=0) >= -1e-12).all()) and bool((tail[-1] >= tail[0]).all())


def _path(run: Run) -> tuple[list[float], list[Alignment]]:
    points = matrices_along(run)
    return [float(step) for step in points], [measure_alignment(w) for w in points.values()]


def _panel(steps: Sequence[float], values: torch.Tensor, depth: int, label: str) -> Panel:
    curves = [
        Curve(f"k = {k + 1}", steps, values[:, k].tolist(), color=k) for k in range(values.shape[1])
    ]
    return Panel(f"L = {depth}", "step", label, curves, xscale="symlog")


def _growth(values: torch.Tensor) -> str:
    first, last = values[0], values[-1]
    return (
        f"L = {len(first)}: from {float(first.min()):.2f} … {float(first.max()):.2f} to "
        f"{float(last.min()):.2f} … {float(last.max()):.2f}"
    )


def _notes(runs: Sequence[Run]) -> tuple[str, ...]:
    c = runs[0].config
    return (
        f"{c['data']}, n = {c['examples']}; {c['attack']}; {c['loss']} loss; full-batch gradient "
        f"descent, η = {c['lr']:g}, {c['epochs']} steps; float64; seed {c['seed']}.",
    )
