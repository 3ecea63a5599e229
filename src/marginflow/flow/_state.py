"""Where a flow stands: the weights, the clock and what was met on the way.

Source: marginflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

from marginflow.flow._field import Field, FieldValue, Vector
from marginflow.homogeneity import Homogeneity

Method = Literal["stiff", "runge-kutta", "steps"]
"""The integrators: implicit, explicit of high order, explicit normalised steps."""

_ROUNDING = 1e-12  # a relative fall of ℓ/ρ below it is not one


@dataclass(frozen=True, eq=False)
class State:
    """A point of the trajectory, all that the rest of the flow depends on.

    Attributes:
        w: the weights, (N,).
        log_tl: ``ln(t L)``, −∞ at t = 0. The integrators carry tL, which has no exponentials:
            ``d(tL)/ds = 1 + tL · d(ln L)/ds``.
        log_loss: ln L.
        step_size: the integrator's next step, in its own variable.
        separated: whether ``nL < ℓ(0)`` was reached; ln‖W‖ is the variable from there on.
        method: the integrator at work.
    """

    w: Vector
    log_tl: float
    log_loss: float
    step_size: float
    separated: bool
    method: Method

    @property
    def log_time(self) -> float:
        """``ln t = ln(tL) − ln L``."""
        return self.log_tl - self.log_loss

    @property
    def log_norm(self) -> float:
        """``ln ‖W‖``, W all weights as one vector."""
        return math.log(float(np.linalg.norm(self.w)))


Goal = Callable[[Vector, float, float], float]
"""(w, ln t, ln L) ↦ a number that grows along the flow and is ≥ 0 once the goal is reached."""


OnStep = Callable[[State, FieldValue], None]
"""Told of every accepted step."""


@dataclass
class Tally:
    """What happened on the accepted steps so far.

    Attributes:
        steps: accepted steps.
        rejected: steps taken again, smaller.
        separated_steps: accepted steps since separation.
        falls, largest_fall: of these, on how many ℓ/ρ fell, and the largest relative fall.
        falls_by_total, largest_fall_by_total: the same of ℓ/‖W‖^K.
        margin_falls: on how many γ̂_m fell, which it may.
        combined: steps along a convex combination of velocities.
        jumps: discontinuities of the field that were searched for and found.
        corrections: per layer, what explicit steps added to ``‖W_k‖²`` beyond the flow's own growth.
        sliding: whether the flow runs along a surface of discontinuity.
        last: ln of ℓ/ρ, of ℓ/‖W‖^K and of γ̂_m at the last step since separation; else empty.
    """

    steps: int = 0
    rejected: int = 0
    separated_steps: int = 0
    falls: int = 0
    largest_fall: float = 0.0
    falls_by_total: int = 0
    largest_fall_by_total: float = 0.0
    margin_falls: int = 0
    combined: int = 0
    jumps: int = 0
    sliding: bool = False
    corrections: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)


class Layers:
    """Norms of the layers of a weight vector, by the measured homogeneity."""

    def __init__(self, model: nn.Module, homogeneity: Homogeneity) -> None:
        start = 0
        place: dict[str, slice] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                place[name] = slice(start, start + p.numel())
                start += p.numel()
        self.names = [layer.name for layer in homogeneity.layers]
        self.parts = [[place[name] for name in layer.parameters] for layer in homogeneity.layers]
        self.degrees = np.array(homogeneity.degrees)
        self.order = homogeneity.order

    def inner(self, u: Vector, v: Vector) -> Vector:
        """``⟨U_k, V_k⟩``, (L,)."""
        return np.array([sum(float(u[p] @ v[p]) for p in parts) for parts in self.parts])

    def squares(self, w: Vector) -> Vector:
        """``‖W_k‖²``, (L,)."""
        return self.inner(w, w)

    def log_norms(self, w: Vector) -> Vector:
        """``ln ρ_k``, (L,); −∞ for a layer that is 0."""
        with np.errstate(divide="ignore"):
            norms: Vector = 0.5 * np.log(self.squares(w))
        return norms

    def log_rho(self, w: Vector) -> float:
        """``ln ρ = Σ c_k ln ρ_k``."""
        return float(self.degrees @ self.log_norms(w))

    def log_total(self, w: Vector) -> float:
        """``K ln ‖W‖``."""
        return self.order * math.log(float(np.linalg.norm(w)))


class Watch:
    """Follows every accepted step: counts, and the quantities that Theorem 4 calls monotone."""

    def __init__(self, layers: Layers, tally: Tally) -> None:
        self.layers = layers
        self.tally = tally

    def __call__(self, state: State, value: FieldValue) -> None:
        """Note an accepted step that ended in ``state``."""
        tally, w = self.tally, state.w
        tally.steps += 1
        if not state.separated or value.smoothed <= 0:
            tally.last = []
            return
        tally.separated_steps += 1
        log_rho, log_total = self.layers.log_rho(w), self.layers.log_total(w)
        log_smoothed = math.log(value.smoothed)
        now = [log_smoothed - log_rho, log_smoothed - log_total, math.log(value.margin) - log_rho]
        if tally.last:
            fall, by_total, margin = (old - new for old, new in zip(tally.last, now, strict=True))
            tally.falls += fall > _ROUNDING
            tally.largest_fall = max(tally.largest_fall, fall)
            tally.falls_by_total += by_total > _ROUNDING
            tally.largest_fall_by_total = max(tally.largest_fall_by_total, by_total)
            tally.margin_falls += margin > _ROUNDING
        tally.last = now

    def fell(self, before: tuple[Vector, FieldValue], after: tuple[Vector, FieldValue]) -> float:
        """By how much ln(ℓ/ρ) fell, 0 if by less than rounding or where ℓ ≤ 0."""
        (w, value), (v, other) = before, after
        if value.smoothed <= 0 or other.smoothed <= 0:
            return 0.0
        fall = math.log(value.smoothed) - math.log(other.smoothed)
        fall += self.layers.log_rho(v) - self.layers.log_rho(w)
        return fall if fall > _ROUNDING else 0.0


def is_separated(field: Field, value: FieldValue) -> bool:
    """``nL < ℓ(0)``: no example can have a margin ≤ 0 then (``L < 1/n`` for the exponential loss)."""
    at_zero = float(field.loss.log_values(torch.zeros(1, dtype=torch.float64))[0])
    return value.log_loss + math.log(len(field.y)) < at_zero
