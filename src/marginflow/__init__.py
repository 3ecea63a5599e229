"""Adversarial training of homogeneous networks, and where it is going.

import marginflow as mf

data = mf.load("digits:3,8")
model = mf.models.mlp(64, 128, 32, 1)
attack = mf.attacks.FGSM(eps=0.1)
run = mf.train(model, data, attack=attack, lr=0.1, epochs=100)
margins = mf.adversarial_margins(model, data.x, data.y, attack)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from marginflow._version import __version__ as __version__

if TYPE_CHECKING:
    from marginflow import (
        ascent,
        attacks,
        certified,
        datasets,
        distributed,
        errors,
        losses,
        models,
        references,
    )
    from marginflow.alignment import Alignment, measure_alignment
    from marginflow.certified import CertifiedMargins, certified_margins
    from marginflow.datasets import Dataset, load
    from marginflow.homogeneity import Homogeneity, Layer, measure_homogeneity, normalized_network
    from marginflow.kkt import Certificate, NearestKKTPoint, kkt_certificate, nearest_kkt_point
    from marginflow.margins import Margins, adversarial_margins
    from marginflow.monitor import Monitor
    from marginflow.overfitting import Overfitting, detect_overfitting
    from marginflow.runs import Run, load_run
    from marginflow.sweeps import Sweep, sweep
    from marginflow.theorems import Audit, Verdict, audit, verify
    from marginflow.workflow import (
        Flow,
        Rerun,
        gradient_flow,
        maximize,
        rerun,
        train,
        train_seeds,
    )

# Loaded on first use: `import marginflow` and `marginflow --help` do not wait for torch.
_HOME = {
    "Alignment": "alignment",
    "Audit": "theorems",
    "Certificate": "kkt",
    "CertifiedMargins": "certified",
    "Dataset": "datasets",
    "Flow": "workflow",
    "Homogeneity": "homogeneity",
    "Layer": "homogeneity",
    "Margins": "margins",
    "Monitor": "monitor",
    "NearestKKTPoint": "kkt",
    "Overfitting": "overfitting",
    "Rerun": "workflow",
    "Run": "runs",
    "Sweep": "sweeps",
    "Verdict": "theorems",
    "adversarial_margins": "margins",
    "audit": "theorems",
    "certified_margins": "certified",
    "detect_overfitting": "overfitting",
    "gradient_flow": "workflow",
    "kkt_certificate": "kkt",
    "load": "datasets",
    "load_run": "runs",
    "measure_alignment": "alignment",
    "maximize": "workflow",
    "measure_homogeneity": "homogeneity",
    "nearest_kkt_point": "kkt",
    "normalized_network": "homogeneity",
    "rerun": "workflow",
    "sweep": "sweeps",
    "train": "workflow",
    "train_seeds": "workflow",
    "verify": "theorems",
}
_MODULES = (
    "ascent",
    "attacks",
    "certified",
    "datasets",
    "distributed",
    "errors",
    "losses",
    "models",
    "references",
)

__all__ = [
    "Alignment",
    "Audit",
    "Certificate",
    "CertifiedMargins",
    "Dataset",
    "Flow",
    "Homogeneity",
    "Layer",
    "Margins",
    "Monitor",
    "NearestKKTPoint",
    "Overfitting",
    "Rerun",
    "Run",
    "Sweep",
    "Verdict",
    "adversarial_margins",
    "ascent",
    "attacks",
    "audit",
    "certified",
    "certified_margins",
    "datasets",
    "detect_overfitting",
    "distributed",
    "errors",
    "gradient_flow",
    "kkt_certificate",
    "load",
    "load_run",
    "losses",
    "maximize",
    "measure_alignment",
    "measure_homogeneity",
    "models",
    "nearest_kkt_point",
    "normalized_network",
    "references",
    "rerun",
    "sweep",
    "train",
    "train_seeds",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"marginflow.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"marginflow.{name}")
    raise AttributeError(f"module 'marginflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
