"""Larger adversarial margins on purpose."""

from marginflow.ascent._linear import exact_budget, maximize_linear
from marginflow.ascent._linear_result import LinearMaximum, LinearPoint

__all__ = [
    "LinearMaximum",
    "LinearPoint",
    "exact_budget",
    "maximize_linear",
]
