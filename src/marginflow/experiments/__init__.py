"""The figures, as data: one figure, one file. Drawing is the report's job."""

from __future__ import annotations

from collections.abc import Mapping

from marginflow.experiments._cross import CROSS
from marginflow.experiments._experiment import (
    MILESTONES,
    SCALES,
    Experiment,
    Results,
    ScaleName,
    Trained,
    Training,
)
from marginflow.experiments._fig1 import FIG1, adversarial_and_standard
from marginflow.experiments._fig2 import FIG2
from marginflow.experiments._fig3 import FIG3
from marginflow.experiments._fig4 import FIG4
from marginflow.experiments._fig5 import FIG5
from marginflow.experiments._fig6 import FIG6
from marginflow.experiments._fig7 import FIG7
from marginflow.experiments._figure import Curve, FigureData, Matrix, Panel, Scale
from marginflow.experiments._numbers import Stored, course_lines, results_of, stored_figure
from marginflow.experiments._overfitting import OVERFITTING
from marginflow.experiments._reproduce import Reproduction, reproduce
from marginflow.experiments._scale_trap import SCALE_TRAP
from marginflow.experiments._tradeoff import TRADEOFF

PAPER = ("fig1", "fig2", "fig3", "fig4", "fig5", "fig6", "fig7")
"""The figures of the paper."""

OURS = ("tradeoff", "cross", "overfitting", "scale-trap")
"""The figures that the paper does not have."""

EXPERIMENTS: Mapping[str, Mapping[ScaleName, Experiment]] = {
    "fig1": FIG1,
    "fig2": FIG2,
    "fig3": FIG3,
    "fig4": FIG4,
    "fig5": FIG5,
    "fig6": FIG6,
    "fig7": FIG7,
    "tradeoff": TRADEOFF,
    "cross": CROSS,
    "overfitting": OVERFITTING,
    "scale-trap": SCALE_TRAP,
}
"""Every experiment, at every scale."""

__all__ = [
    "EXPERIMENTS",
    "MILESTONES",
    "OURS",
    "PAPER",
    "SCALES",
    "Curve",
    "Experiment",
    "FigureData",
    "Matrix",
    "Panel",
    "Reproduction",
    "Results",
    "Scale",
    "ScaleName",
    "Stored",
    "Trained",
    "Training",
    "adversarial_and_standard",
    "course_lines",
    "reproduce",
    "results_of",
    "stored_figure",
]
