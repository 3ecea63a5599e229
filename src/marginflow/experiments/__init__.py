"""The figures, as data: one figure, one file. Drawing is the report's job."""

from marginflow.experiments._fig1 import adversarial_and_standard
from marginflow.experiments._fig6_fig7 import deep_linear_runs, fig6, fig7
from marginflow.experiments._figure import Curve, FigureData, Panel, Scale

__all__ = [
    "Curve",
    "FigureData",
    "Panel",
    "Scale",
    "adversarial_and_standard",
    "deep_linear_runs",
    "fig6",
    "fig7",
]
