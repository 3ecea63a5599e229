"""Perturbations δ(W) of the training examples, ``‖δ_i‖_p ≤ ε``."""

from marginflow.attacks._base import Attack, Derivative, Perturbation, Query
from marginflow.attacks._build import build, check_budget
from marginflow.attacks._exact import ExactLinear, FiniteSet
from marginflow.attacks._gradient import FGM, FGSM, PGD

__all__ = [
    "FGM",
    "FGSM",
    "PGD",
    "Attack",
    "Derivative",
    "ExactLinear",
    "FiniteSet",
    "Perturbation",
    "Query",
    "build",
    "check_budget",
]
