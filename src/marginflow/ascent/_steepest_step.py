"""One step of steepest descent in a norm, for any training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from marginflow._checks import choice, real
from marginflow.ascent._adam import Adam
from marginflow.ascent._geometry import Entrywise, Geometry, Spectral
from marginflow.errors import InputError

_ENTRYWISE = {"l1": 1.0, "l2": 2.0, "sign": math.inf}


def get_geometry(name: str | Geometry) -> Geometry:
    """The geometry of a name, or the geometry itself; ``adam`` begins with an empty memory.

    ``l2`` (gradient descent), ``sign`` (ℓ∞ over all weights), ``l1`` (coordinate descent),
    ``spectral``, ``adam``.

    Source: the norms of Tsilivis et al. (2025).

    Args:
        name: of the norm, or a geometry.

    Raises:
        SpecificationError: an unknown name; the message gives the nearest one.
    """
    if isinstance(name, Geometry):
        return name
    choice("geometry", name, (*_ENTRYWISE, "spectral", "adam"))
    if name == "spectral":
        return Spectral()
    if name == "adam":
        return Adam()
    return Entrywise(_ENTRYWISE[name], name)


def steepest_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    geometry: str | Geometry,
    step: float,
    *,
    relative: bool = True,
) -> None:
    """One step of steepest descent, in place: ``W ← W − η‖W‖ V``, ``V = argmax_{‖V‖ ≤ 1} ⟨V, G⟩``.

    With ``relative=False``: ``W ← W − η‖G‖_* V``, Euler's step of the steepest flow, for ``l2`` that of
    gradient descent, ``W ← W − ηG``.

    Source: the norms of Tsilivis et al. (2025).

    Args:
        weights: W, one tensor a parameter, of any shape; changed.
        gradients: G, of the same shapes, of the loss or (same direction, and no underflow) of its
            logarithm.
        geometry: the norm, as a name or an object; ``adam`` has to be an object, kept from
            step to step.
        step: η > 0.
        relative: whether the step's length is measured by ‖W‖.

    Raises:
        InputError: no step size, other shapes, an Adam by name, weights or gradients that are not finite.
    """
    real("step", step, above=0.0)
    if geometry == "adam":
        raise InputError("geometry: expected an object for adam, whose steps have a memory: Adam()")
    geometry = get_geometry(geometry)
    if [w.shape for w in weights] != [g.shape for g in gradients]:
        raise InputError(
            "expected one gradient of the same shape for each of the weights, got "
            f"{[tuple(g.shape) for g in gradients]} for {[tuple(w.shape) for w in weights]}"
        )
    size = geometry.norm(weights) if relative else geometry.dual_norm(gradients)
    if not (math.isfinite(size) and all(bool(g.isfinite().all()) for g in gradients)):
        raise InputError("expected finite weights and gradients; lower the step")
    with torch.no_grad():
        for w, v in zip(weights, geometry.direction(gradients), strict=True):
            w.sub_(v.to(w.dtype), alpha=step * size)
