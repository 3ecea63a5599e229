"""Perturbations δ(W) of the training examples, ``‖δ_i‖_p ≤ ε``."""

from marginflow.attacks._art import from_art, to_art, to_art_attack
from marginflow.attacks._autoattack import AutoAttack
from marginflow.attacks._base import Attack, Derivative, Perturbation, Query
from marginflow.attacks._build import build, check_budget
from marginflow.attacks._exact import ExactLinear, FiniteSet
from marginflow.attacks._foolbox import from_foolbox, to_foolbox, to_foolbox_model
from marginflow.attacks._gradient import FGM, FGSM, PGD
from marginflow.attacks._logits import TwoLogits
from marginflow.attacks._torchattacks import from_torchattacks, to_torchattacks

__all__ = [
    "FGM",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Derivative",
    "ExactLinear",
    "FiniteSet",
    "Perturbation",
    "Query",
    "TwoLogits",
    "build",
    "check_budget",
    "from_art",
    "from_foolbox",
    "from_torchattacks",
    "to_art",
    "to_art_attack",
    "to_foolbox",
    "to_foolbox_model",
    "to_torchattacks",
]
