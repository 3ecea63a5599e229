"""The measurements in anybody's training loop."""

from marginflow.monitor._monitor import Monitor
from marginflow.monitor._record import QUANTILES

__all__ = ["QUANTILES", "Monitor"]
