"""Larger adversarial margins on purpose."""

from marginflow.ascent._adam import Adam
from marginflow.ascent._geometry import Geometry
from marginflow.ascent._steepest import Falls, SteepestFlow, SteepestPath
from marginflow.ascent._steepest_step import get_geometry, steepest_step

__all__ = [
    "Adam",
    "Falls",
    "Geometry",
    "SteepestFlow",
    "SteepestPath",
    "get_geometry",
    "steepest_step",
]
