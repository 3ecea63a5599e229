"""The measurements in anybody's training loop."""

from marginflow.monitor._monitor import Monitor
from marginflow.monitor._record import QUANTILES
from marginflow.monitor._strong import overfitting_of

__all__ = ["QUANTILES", "Monitor", "overfitting_of"]
