"""Whole jobs: training, margin maximisation and the gradient flow, measured and recorded."""

from marginflow.workflow._check import check_job
from marginflow.workflow._flow import gradient_flow
from marginflow.workflow._flow_result import Flow
from marginflow.workflow._maximize import maximize
from marginflow.workflow._rerun import Rerun, rerun
from marginflow.workflow._seeds import train_seeds
from marginflow.workflow._train import train

__all__ = [
    "Flow",
    "Rerun",
    "check_job",
    "gradient_flow",
    "maximize",
    "rerun",
    "train",
    "train_seeds",
]
