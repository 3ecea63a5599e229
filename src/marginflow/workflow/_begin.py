"""Beginning with the weights of an earlier run."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from marginflow._checks import place
from marginflow.models import load_weights
from marginflow.runs import Run, load_run, weights_digest


def begin_with(model: nn.Module, run: Run | str | os.PathLike[str]) -> dict[str, Any]:
    """Put the last weights of ``run`` into ``model``, in their dtype, and say whose they are.

    Args:
        model: a network of the run's architecture; changed.
        run: a run, or its directory.

    Returns:
        for ``run.json``: the run's name, the step, and the SHA-256 of the weights.

    Raises:
        RunError: no run, or none of its checkpoints is whole.
        ModelError: weights of another network.
    """
    if not isinstance(run, Run):
        run = load_run(place("start", run))
    step, weights = last_weights(run)
    floating = [value.dtype for value in weights.values() if value.is_floating_point()]
    if floating:
        model.to(dtype=floating[0])
    load_weights(model, weights)
    return {"run": run.name, "step": step, "weights_sha256": weights_digest(weights)}


def last_weights(run: Run | str | os.PathLike[str]) -> tuple[int | None, dict[str, Tensor]]:
    """The step of a run's last weights, and copies of them, by name.

    Raises:
        RunError: no run, or none of its checkpoints is whole.
    """
    if not isinstance(run, Run):
        run = load_run(place("start", run))
    if run.path is None:
        step = run.metrics[-1].get("step") if run.metrics else None
        weights = run.load_model().state_dict()
    else:
        checkpoint = run.checkpoint()
        step = checkpoint.info.get("step")
        weights = {
            name.removeprefix("model."): value
            for name, value in checkpoint.tensors.items()
            if name.startswith("model.")
        }
    return step, {name: value.detach().cpu().clone() for name, value in weights.items()}
