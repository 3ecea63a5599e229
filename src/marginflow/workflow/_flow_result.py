"""A gradient flow that was followed, as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from marginflow.runs import Metrics, Run

Reason = Literal["log_time", "log_norm", "loss_below", "not separated", "work"]


@dataclass(frozen=True, eq=False)
class Flow:
    """A gradient flow that was followed, and why it ended.

    Attributes:
        run: the recorded trajectory: configuration, measurements, kept weights.
        model: the network at the end.
        log_time: ln t at the end.
        log_norm: ln ‖W‖ at the end.
        log_loss: ln L at the end.
        reason: the goal that was reached (``log_time``, ``log_norm``, ``loss_below``), or
            ``not separated``, or ``work`` (too many evaluations).
        advice: what to do if no goal was reached; empty otherwise.
        notes: which integrator ran from when on, and why.
        separated: whether L fell below ℓ(0)/n.
        sliding: whether the flow ran along a surface on which its field jumps.
        tolerance: the integrator's relative tolerance per step. The end point moves by less than
            1000 × tolerance (relative, of W/‖W‖ and of ln t) when it is halved, on smooth fields.
        steps: accepted steps.
        rejected: steps taken again, by explicit steps.
        evaluations: of the field.
        jacobians: of its Jacobian.
        factorizations: of linear systems with it, a real and a complex one for each new step size
            or Jacobian.
        falls: on how many of ``separated_steps`` ℓ/ρ fell (by more than 1e-12).
        separated_steps: accepted steps since separation.
    """

    run: Run
    model: nn.Module
    log_time: float
    log_norm: float
    log_loss: float
    reason: Reason
    advice: str
    notes: tuple[str, ...]
    separated: bool
    sliding: bool
    tolerance: float
    steps: int
    rejected: int
    evaluations: int
    jacobians: int
    factorizations: int
    falls: int
    separated_steps: int

    @property
    def reached(self) -> bool:
        """Whether the flow reached one of its goals."""
        return self.reason not in ("not separated", "work")

    @property
    def metrics(self) -> Metrics:
        """The measurements along the flow, oldest first."""
        return self.run.metrics

    @property
    def final(self) -> dict[str, Any]:
        """The last measurement."""
        return self.run.final

    def __str__(self) -> str:
        end = f"ended: {self.reason}" if not self.reached else f"reached its {self.reason}"
        lines = [
            f"gradient flow to ln t = {self.log_time:.6g} ({end})",
            f"ln L = {self.log_loss:.6g}, ‖W‖ = {math.exp(self.log_norm):.4g}, "
            f"γ̂_m = {self.final['normalized_margin']:.6g}",
            f"{self.steps} steps, {self.evaluations} evaluations, {self.jacobians} Jacobians",
            *self.notes,
        ]
        return "\n".join([*lines, self.advice] if self.advice else lines)
