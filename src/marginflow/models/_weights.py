"""Weights into a network: all of them or none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from marginflow.errors import ModelError


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put ``weights`` into ``model``, all of them or none.

    Raises:
        ModelError: names or shapes that are not the model's.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights:
            side = "the model" if name not in own else "the checkpoint"
            raise ModelError(f"the checkpoint is of another model: {side} has no {name!r}")
        if own[name].shape != weights[name].shape:
            raise ModelError(
                f"the checkpoint is of another model: {name!r} has shape {tuple(weights[name].shape)} "
                f"in it, {tuple(own[name].shape)} in the model"
            )
    model.load_state_dict(weights)
