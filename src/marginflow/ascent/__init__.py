"""Larger adversarial margins on purpose: updates that seek the direction, not the size, of the weights."""

from marginflow.ascent._optimizers import RelativeSGD, SphereSGD
from marginflow.ascent._steps import RunningSize, relative_step, sphere_step

__all__ = ["RelativeSGD", "RunningSize", "SphereSGD", "relative_step", "sphere_step"]
