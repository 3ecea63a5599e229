"""CUDA graphs of whole steps: a small batch's step on a GPU is bound by its launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from marginflow.engine._base import LossGradient

_WARM_UP = 3


class CapturedStep:
    """A step as one CUDA graph, for batches of one size.

    The graph reads its own copies of the batch. Since nothing can be asked in its middle, the weights
    are kept before each step and put back where the loss is not finite.

    Args:
        step: (x, y) ↦ the step's result, with the weights moved; launches only, nothing that waits
            for the device, and all buffers its own.
        weights: what the step moves.
        x: a batch of the size.
        y: its labels.

    Raises:
        RuntimeError: CUDA cannot capture the step.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], LossGradient],
        weights: Sequence[Tensor],
        x: Tensor,
        y: Tensor,
    ) -> None:
        self._weights = tuple(w.detach() for w in weights)
        self._before = tuple(w.clone() for w in self._weights)
        start = tuple(w.clone() for w in self._weights)
        self._x, self._y = x.clone(), y.clone()
        try:
            # Libraries make their workspaces in the first calls, which a capture does not allow.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    step(self._x, self._y)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for kept, weight in zip(self._before, self._weights, strict=True):
                    kept.copy_(weight)
                self._result = step(self._x, self._y)
        finally:
            # The warm-up moved them; what a capture records does not run.
            for weight, first in zip(self._weights, start, strict=True):
                weight.copy_(first)

    def __call__(self, x: Tensor, y: Tensor) -> LossGradient:
        """Take the step on the batch (x, y)."""
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()
        if not math.isfinite(float(self._result.loss)):
            self._undo()
        found = self._result
        return LossGradient(found.loss.clone(), (), found.margins.clone(), found.outputs)

    def _undo(self) -> None:
        for kept, weight in zip(self._before, self._weights, strict=True):
            weight.copy_(kept)
