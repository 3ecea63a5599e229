"""Larger adversarial margins on purpose: methods that seek the margin itself."""

from marginflow.ascent._adam import Adam
from marginflow.ascent._ascent import Ascent
from marginflow.ascent._geometry import Geometry
from marginflow.ascent._linear import exact_budget, maximize_linear
from marginflow.ascent._linear_result import LinearMaximum, LinearPoint
from marginflow.ascent._method import Method
from marginflow.ascent._methods import Polish, Relative, Spheres, Steepest, build_method
from marginflow.ascent._optimizers import RelativeSGD, SphereSGD
from marginflow.ascent._steepest import Falls, SteepestFlow, SteepestPath
from marginflow.ascent._steepest_step import get_geometry, steepest_step
from marginflow.ascent._steps import RunningSize, relative_step, sphere_step
from marginflow.ascent._tempered import Tempered

__all__ = [
    "Adam",
    "Ascent",
    "Falls",
    "Geometry",
    "LinearMaximum",
    "LinearPoint",
    "Method",
    "Polish",
    "Relative",
    "RelativeSGD",
    "RunningSize",
    "SphereSGD",
    "Spheres",
    "Steepest",
    "SteepestFlow",
    "SteepestPath",
    "Tempered",
    "build_method",
    "exact_budget",
    "get_geometry",
    "maximize_linear",
    "relative_step",
    "sphere_step",
    "steepest_step",
]
