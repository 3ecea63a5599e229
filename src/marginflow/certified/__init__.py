"""Lower bounds of adversarial margins: what no perturbation of the ball can do."""

from marginflow.certified._certify import certified_margins, check_attack
from marginflow.certified._library import INSTALL
from marginflow.certified._result import METHODS, CertifiedMargins, Method
from marginflow.certified._saved import fingerprint, read_bounds, save_bounds

__all__ = [
    "INSTALL",
    "METHODS",
    "CertifiedMargins",
    "Method",
    "certified_margins",
    "check_attack",
    "fingerprint",
    "read_bounds",
    "save_bounds",
]
