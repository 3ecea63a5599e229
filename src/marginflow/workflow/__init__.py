"""Whole jobs: training, measured and recorded."""

from marginflow.workflow._train import train

__all__ = ["train"]
