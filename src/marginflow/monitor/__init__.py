"""The measurements in anybody's training loop."""

from marginflow.monitor._monitor import Monitor
from marginflow.monitor._strong import overfitting_of
from marginflow.runs import QUANTILES

__all__ = ["QUANTILES", "Monitor", "overfitting_of"]
