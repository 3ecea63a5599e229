"""Small runs to judge, and what judging them needs. Nothing here calls marginflow.theorems."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import marginflow as mf
from marginflow.runs import Run

Array = NDArray[np.float64]

SECTION_3_1 = [
    "Lemma 1", "Lemma 2", "Lemma 5", "Lemma 6", "Eq. 36", "Lemma 7", "Lemma 8", "Eq. 68",
    "Theorem 2 (direction)", "Theorem 2 (rank one)", "Theorem 2 (alignment)", "Appendix B.5",
]  # fmt: skip
DATA = "separable:n=20,d=6,margin=0.3"
GAMMA = 0.3
EPS = 0.1
EXACT = f"exact-linear:p=2,eps={EPS}"


def deep(*hidden: int, features: int = 6, seed: int = 0) -> torch.nn.Module:
    return mf.models.deep_linear(features, *hidden, 1, seed=seed).double()


def trained(*hidden: int, data: Any = DATA, features: int = 6, **options: Any) -> Run:
    return mf.train(
        deep(*hidden, features=features), data, **{"attack": EXACT, "lr": "lemma2", **options}
    )


def product(weights: dict[str, torch.Tensor]) -> Array:
    """W_Π as a vector, by numpy."""
    first, *rest = (w.numpy() for w in weights.values())
    for w in rest:
        first = w @ first
    return np.array(first[0])


def margins(p: Array, x: Array, y: Array, eps: float) -> Array:
    """``y_i⟨p, x_i⟩ − ε‖p‖₂``."""
    return np.array(y * (x @ p) - eps * np.linalg.norm(p))


def arrays(data: mf.Dataset) -> tuple[Array, Array]:
    return data.x.reshape(data.n, -1).double().numpy(), data.y.double().numpy()


def changed(
    run: Run,
    *,
    config: dict[str, Any] | None = None,
    record: Callable[[dict[str, Any]], None] | None = None,
    weights: Callable[[int, dict[str, torch.Tensor]], None] | None = None,
) -> Run:
    """A copy of a run in memory with a forged setting, forged records or forged weights."""
    metrics = copy.deepcopy(run.metrics)
    for entry in metrics:
        if record is not None:
            record(entry)
    kept = {
        step: {name: w.clone() for name, w in entry.items()}
        for step, entry in run.trajectory().items()
    }
    for step, entry in kept.items():
        if weights is not None:
            weights(step, entry)
    return Run({**run.config, **(config or {})}, metrics, None, run.model, kept)
