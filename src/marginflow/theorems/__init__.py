"""The paper's statements, one file each, judged on a run."""

from __future__ import annotations

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._verdict import Hypothesis, Outcome, Verdict
from marginflow.theorems._verify import verify
from marginflow.theorems.audit import Audit, audit
from marginflow.theorems.steepest_descent import verify_steepest

__all__ = [
    "Audit",
    "Evidence",
    "Hypothesis",
    "Outcome",
    "Verdict",
    "audit",
    "verify",
    "verify_steepest",
]
