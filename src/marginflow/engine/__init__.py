"""The work of one training step: the gradient of the loss at perturbed inputs."""

from marginflow.engine._autograd import AutogradEngine
from marginflow.engine._base import Engine, LossGradient
from marginflow.engine._build import EngineName, auto_engine, build
from marginflow.engine._dense import DenseNetwork
from marginflow.engine._fused import FusedEngine, PerturbationPrecision
from marginflow.engine._outputs import AttackedOutputs
from marginflow.engine._parallel import ParallelEngine, independent
from marginflow.engine._perturber import Perturber
from marginflow.engine._products import Products, choose_products, multiplying, repeating
from marginflow.engine._stacked import (
    StackedEngine,
    StackPlace,
    stacking_gains,
    stacking_refusal,
)

__all__ = [
    "AttackedOutputs",
    "AutogradEngine",
    "DenseNetwork",
    "Engine",
    "EngineName",
    "FusedEngine",
    "LossGradient",
    "ParallelEngine",
    "PerturbationPrecision",
    "Perturber",
    "Products",
    "StackPlace",
    "StackedEngine",
    "auto_engine",
    "build",
    "choose_products",
    "independent",
    "multiplying",
    "repeating",
    "stacking_gains",
    "stacking_refusal",
]
