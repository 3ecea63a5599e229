"""One set of weights as a record of Python numbers, ready for JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.homogeneity import Homogeneity
from marginflow.losses import Loss
from marginflow.margins import Margins, clean_and_adversarial
from marginflow.runs import QUANTILES

NORMALIZED = (
    "normalized_margin",
    "normalized_margin_quantiles",
    "normalized_margin_by_total",
    "smoothed_margin",
    "clean_normalized_margin",
    "norm_product",
)
"""What only a multi-homogeneous network has; None in the records of any other."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured, and how.

    Attributes:
        model: the network.
        data: the examples; their test split is measured too.
        attack: the perturbation, or None.
        loss: whose logarithm is recorded, or None.
        batch_size: examples per pass.
        homogeneity: the layers, or None for a network that is not multi-homogeneous.
    """

    model: nn.Module
    data: Dataset
    attack: Attack | None
    loss: str | Loss | None
    batch_size: int
    homogeneity: Homogeneity | None

    def margins(self, data: Dataset, attack: Attack | None) -> tuple[Margins, Margins]:
        """The margins of ``data`` without and with perturbation."""
        return clean_and_adversarial(
            self.model,
            data.x,
            data.y,
            attack,
            batch_size=self.batch_size,
            loss=self.loss,
            homogeneity=self.homogeneity,
            normalize=self.homogeneity is not None,
        )


def record_of(subject: Subject) -> tuple[dict[str, Any], Margins]:
    """The measurements of ``subject`` by name, and the margins they are of.

    Margins are normalised by ρ unless their name says otherwise. Without layers the keys of
    :data:`NORMALIZED` are None, ``margin_quantiles`` are those of the margins as they are, and
    ``layer_norms`` are the norms of the single trainable parameters.
    """
    clean, hit = subject.margins(subject.data, subject.attack)
    found: dict[str, Any]
    if subject.homogeneity is not None:
        found = {
            "normalized_margin": hit.normalized_min,
            "normalized_margin_quantiles": hit.quantiles(QUANTILES).tolist(),
            "normalized_margin_by_total": float(hit.normalized_by_total.min()),
            "margin": hit.min,
            "smoothed_margin": hit.smoothed_normalized,
        }
    else:
        found = {
            **dict.fromkeys(NORMALIZED[:3]),
            "margin": hit.min,
            "margin_quantiles": quantiles(hit.values).tolist(),
            "smoothed_margin": None,
        }
    found |= {
        "adversarial_accuracy": hit.accuracy,
        "dead_inputs": int(hit.dead_inputs.sum()),
        "log_loss": hit.log_loss,
    }
    if subject.homogeneity is not None:
        found |= {
            "clean_normalized_margin": clean.normalized_min,
            "clean_accuracy": clean.accuracy,
            "layer_norms": subject.homogeneity.norms(subject.model).tolist(),
            "norm_product": hit.rho,
            "total_norm": hit.total_norm,
        }
    else:
        norms = parameter_norms(subject.model)
        found |= {
            "clean_normalized_margin": None,
            "clean_margin": clean.min,
            "clean_accuracy": clean.accuracy,
            "layer_norms": list(norms.values()),
            "norm_product": None,
            "total_norm": math.hypot(*norms.values()),
        }
    if subject.data.test is not None:
        unseen = subject.margins(subject.data.test, subject.attack)
        found["test_clean_accuracy"] = unseen[0].accuracy
        found["test_adversarial_accuracy"] = unseen[1].accuracy
    return found, hit


def parameter_norms(model: nn.Module) -> dict[str, float]:
    """``‖w‖_F`` of every trainable parameter, by name."""
    return {
        name: float(torch.linalg.vector_norm(w.detach(), dtype=torch.float64))
        for name, w in model.named_parameters()
        if w.requires_grad
    }


def quantiles(values: Tensor) -> Tensor:
    """The :data:`QUANTILES` of (n,) numbers, linearly interpolated."""
    return Margins(values, 1.0, None, None, torch.zeros(0, dtype=torch.bool)).quantiles(QUANTILES)


def for_json(value: Any) -> Any:
    """None in place of NaN and infinity, which JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [for_json(entry) for entry in value]
    return value
