"""Whether the field jumps: found by bisection, not by the names of layers and attacks.

Source: Assumption 2 (δ locally Lipschitz), measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from marginflow.flow._field import Field, Vector

_LEVELS = 44  # 2⁻⁴⁴ = 6e-14 of the segment
REACH = 0.2  # length of a segment, of ‖W‖
_ACROSS = 3  # segments across the flow
_FIELD = 1e-6  # relative; a smooth field changes by 1e-11 over so little
_LOSS = 1e-10  # of max(1, |ln L|); a continuous one by 1e-12


@dataclass(frozen=True)
class Jumps:
    """What bisection found near a point.

    Attributes:
        field: the largest relative jump of v that was found, 0 if none.
        loss: the largest jump of ln L, relative to max(1, |ln L|), 0 if none.
    """

    field: float
    loss: float

    @property
    def words(self) -> str:
        """The jumps in words, for people."""
        if self.loss:
            return f"ln L itself jumps (by {self.loss:.1e} at one place)"
        if self.field:
            return f"the gradient jumps (by {self.field:.1e} of it at one place), ln L does not"
        return "no jump was found"


def find_jumps(field: Field, w: Vector, reach: float = REACH, seed: int = 0) -> Jumps:
    """Search segments from ``w`` along the flow and across it for jumps of v and of ln L.

    Each segment is halved 44 times, always keeping the half over which the quantity changes more. A
    jump is kept whole; a continuous change is not. At most 400 evaluations of the field; fewer
    if ln L is found to jump.

    Args:
        field: the field.
        w: where to look.
        reach: length of the segments, in units of ‖W‖. A short one finds small jumps too, which
            over a long one are outweighed by continuous change.
        seed: of the direction across.
    """
    norm = float(np.linalg.norm(w))
    velocity = field(w).velocity
    speed = float(np.linalg.norm(velocity))
    across = np.random.default_rng(seed).standard_normal((_ACROSS, len(w)))
    directions = list(across / np.linalg.norm(across, axis=1, keepdims=True))
    if speed > 0:
        directions.insert(0, velocity / speed)
    largest = {"field": 0.0, "loss": 0.0}
    for direction in directions:
        for of in ("loss", "field"):
            jump_field, jump_loss = _bisect(field, w, w + reach * norm * direction, of)
            largest["field"] = max(largest["field"], jump_field)
            largest["loss"] = max(largest["loss"], jump_loss)
        if largest["loss"] > _LOSS and largest["field"] > _FIELD:
            break
    return _above_rounding(largest["field"], largest["loss"])


def jumps_between(field: Field, a: Vector, b: Vector) -> Jumps:
    """The largest jumps of v and of ln L that halving the segment from ``a`` to ``b`` leaves.

    92 evaluations of the field.

    Args:
        field: the field.
        a: weights, (N,), the start of the segment.
        b: weights, (N,), its end.
    """
    found = [_bisect(field, a, b, of) for of in ("loss", "field")]
    return _above_rounding(max(f for f, _ in found), max(loss for _, loss in found))


def _above_rounding(field: float, loss: float) -> Jumps:
    return Jumps(field if field > _FIELD else 0.0, loss if loss > _LOSS else 0.0)


def _bisect(field: Field, a: Vector, b: Vector, of: str) -> tuple[float, float]:
    """The relative change of v and of ln L over the last piece of the segment."""
    at_a, at_b = field(a), field(b)
    for _ in range(_LEVELS):
        middle = 0.5 * (a + b)
        at = field(middle)
        if of == "field":
            left = float(np.linalg.norm(at.velocity - at_a.velocity))
            right = float(np.linalg.norm(at_b.velocity - at.velocity))
        else:
            left, right = abs(at.log_loss - at_a.log_loss), abs(at_b.log_loss - at.log_loss)
        if left >= right:
            b, at_b = middle, at
        else:
            a, at_a = middle, at
    speed = max(float(np.linalg.norm(at_a.velocity)), float(np.linalg.norm(at_b.velocity)))
    turned = float(np.linalg.norm(at_b.velocity - at_a.velocity))
    loss = abs(at_b.log_loss - at_a.log_loss) / max(1.0, abs(at_a.log_loss))
    return (turned / speed if speed > 0 else 0.0), loss
