"""Whole jobs: training and the gradient flow, measured and recorded."""

from marginflow.workflow._flow import Flow, gradient_flow
from marginflow.workflow._train import train

__all__ = ["Flow", "gradient_flow", "train"]
