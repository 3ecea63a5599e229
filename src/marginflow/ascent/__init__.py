"""Larger adversarial margins on purpose."""

from marginflow.ascent._geometry import Adam, Geometry, get_geometry, steepest_step
from marginflow.ascent._steepest import Falls, SteepestFlow, SteepestPath

__all__ = [
    "Adam",
    "Falls",
    "Geometry",
    "SteepestFlow",
    "SteepestPath",
    "get_geometry",
    "steepest_step",
]
