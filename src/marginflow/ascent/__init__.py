"""Larger adversarial margins on purpose: updates that seek the direction, not the size, of the weights."""

from marginflow.ascent._steps import relative_step, sphere_step

__all__ = ["relative_step", "sphere_step"]
