"""``marginflow reproduce``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from marginflow._checks import choice

_FIGURES = ("fig6", "fig7")


def run_reproduction(figures: Sequence[str], *, out: Path, seed: int, form: str) -> None:
    """Train what the figures need, draw them, print their statements and verdicts."""
    wanted = (
        list(_FIGURES) if "all" in figures else [choice("figure", f, _FIGURES) for f in figures]
    )
    choice("format", form, ("svg", "png", "pdf"))

    import torch

    from marginflow.experiments import deep_linear_runs, fig6, fig7
    from marginflow.report import save_figure
    from marginflow.theorems import verify

    torch.set_num_threads(1)
    runs = deep_linear_runs(out, seed=seed)
    drawn = {"fig6": fig6, "fig7": fig7}
    for name in wanted:
        figure = drawn[name](runs)
        path = out / f"{name}.{form}"
        save_figure(figure, path)
        print(f"{figure.title}\n  {figure.statement}\n  drawn in {path}")
    for run in runs:
        found = [
            f"{v.statement}: {v.outcome}" for v in verify(run) if v.outcome != "does not apply"
        ]
        print(f"{run.name}: " + "; ".join(found))
