"""What every whole job does before its first step: check, and describe for ``run.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.errors import ModelError, RunError
from marginflow.homogeneity import Homogeneity, evaluation_mode
from marginflow.losses import Loss


def check_same(stored: Mapping[str, Any], config: Mapping[str, Any], free: Collection[str]) -> None:
    """Refuse to continue a run under other settings; those in ``free`` may change.

    The layers follow from the model and the weights, which the checkpoint checks.
    """
    differing = [
        key for key, value in config.items() if key not in free and stored.get(key) != value
    ]
    if differing:
        changes = "; ".join(
            f"{k}: {stored.get(k)!r} there, {config[k]!r} now" for k in differing[:4]
        )
        raise RunError(f"cannot resume under other settings ({changes}); use another --out")


def check_fit(
    model: nn.Module,
    data: Dataset,
    loss: Loss,
    attack: Attack | None,
    measured: Attack | None,
) -> None:
    """One evaluation of everything on a few examples, so that nothing fails after step 0."""
    x, y = data.x[:2], data.y[:2]
    with torch.no_grad(), evaluation_mode(model):
        try:
            outputs = model(x)
        except RuntimeError as error:
            raise ModelError(
                f"the model does not take examples of shape {data.shape}: {str(error).splitlines()[0]}"
            ) from error
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"the model: expected a tensor as output, got {type(outputs).__name__}"
            )
        loss.scores(outputs, y)
        # All labels, with outputs of the right shape, and not only those of two examples.
        loss.scores(outputs[:1].expand(data.n, *outputs.shape[1:]), data.y)
    for tried in (attack, measured):
        if tried is not None:
            tried(model, x, y, generator=torch.Generator().manual_seed(0))


def layer_table(homogeneity: Homogeneity | None) -> list[dict[str, Any]] | None:
    if homogeneity is None:
        return None
    return [
        dataclasses.asdict(layer) | {"parameters": list(layer.parameters)}
        for layer in homogeneity.layers
    ]
