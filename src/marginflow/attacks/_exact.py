"""Exact inner maxima: deep linear networks, and a finite set of perturbations."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from marginflow.attacks._base import Attack, Query
from marginflow.errors import InputError, ModelError
from marginflow.norms import as_exponent, dual_exponent, dual_vector, flat, per_example_norm

_POINTS = 8


@dataclass(frozen=True, eq=False, init=False)
class ExactLinear(Attack):
    """The worst perturbation of a network that is linear in its input, for any p ∈ [1, ∞].

    One output, with W_Π = W_L ⋯ W_1: Eq. (10) ``δ = −yε W_Π/‖W_Π‖₂`` for p = 2, Eq. (139)
    ``δ = −yε sgn(W_Π)`` for p = ∞, the dual vector of W_Π in general. The margin falls by
    exactly ``ε ‖W_Π‖_q``, 1/p + 1/q = 1. Several outputs: the class j that minimises
    ``f[y] − f[j] − ε ‖w_y − w_j‖_q`` is attacked likewise, which is exact as well.

    Args:
        p: exponent of the norm, in [1, ∞], or ``"l2"``, ``"linf"`` ….
        eps: ε ≥ 0, in the units of x.

    Raises:
        InputError: p < 1, ε negative. On the call, ModelError: a model that is not linear.
    """

    name: ClassVar[str] = "exact-linear"
    exact: ClassVar[bool] = True

    def __init__(self, p: float | str, eps: float) -> None:
        # Pixel bounds would make the maximum another one, so there are none.
        super().__init__(eps, as_exponent(p))

    def _spec_parts(self) -> list[str]:
        return [f"p={self.p!r}"]

    def _perturb(self, query: Query, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        margins = query.margins(query.x.detach())
        weights = _linear_map(query)
        n, y = query.x.shape[0], query.y
        if weights.shape[0] == 1:
            direction = dual_vector(weights, self.p) * y.reshape(
                -1, *(1 for _ in weights.shape[1:])
            )
            dead = (~weights.detach().any()).expand(n)
        else:
            gaps = weights[y].unsqueeze(1) - weights.unsqueeze(0)
            with torch.no_grad():
                cost = per_example_norm(gaps.flatten(0, 1), dual_exponent(self.p))
                cost = cost.reshape(n, len(weights))
                outputs = query.outputs(query.x)
                reach = outputs.gather(1, y.unsqueeze(1)) - outputs - self.eps * cost.to(outputs)
                worst = reach.scatter(1, y.unsqueeze(1), torch.inf).argmin(dim=1)
            chosen = gaps[torch.arange(n, device=y.device), worst]
            direction = dual_vector(chosen, self.p)
            dead = ~flat(chosen.detach()).any(dim=1)
        return -self.eps * direction.to(margins.dtype), dead.clone()


@dataclass(frozen=True, eq=False, init=False)
class FiniteSet(Attack):
    """The worst of finitely many given perturbations, the same set for every example.

    ``δ_i = argmin_{δ ∈ Δ} m(x_i + δ)``. An exact inner maximum, so the theory of Section 3.2
    holds for ReLU networks too, and ``detached`` and ``total`` derivatives agree (Danskin).

    Args:
        deltas: Δ, shape (m, …) with the shape of an example behind m ≥ 1. Include 0 to
            let the clean example compete.
        p: the norm in which the set is measured; ε is the largest norm in it.
        bounds: range of x + δ, or None.

    Raises:
        InputError: an empty set, values that are not finite.
    """

    deltas: Tensor = field(default_factory=lambda: torch.empty(0))

    name: ClassVar[str] = "finite-set"
    exact: ClassVar[bool] = True

    def __init__(
        self,
        deltas: Tensor,
        *,
        p: float | str = "l2",
        bounds: tuple[float, float] | None = None,
    ) -> None:
        deltas = torch.as_tensor(deltas).detach()
        if deltas.ndim < 2 or deltas.shape[0] == 0 or not deltas.is_floating_point():
            raise InputError(
                "FiniteSet: expected perturbations of shape (m, …), m ≥ 1, of floating numbers, "
                f"got {deltas.dtype} of shape {tuple(deltas.shape)}"
            )
        if not bool(torch.isfinite(deltas).all()):
            raise InputError("FiniteSet: expected finite perturbations, got NaN or infinity")
        exponent = as_exponent(p)
        super().__init__(float(per_example_norm(deltas, exponent).max()), exponent, bounds)
        object.__setattr__(self, "deltas", deltas)

    @property
    def piecewise_constant(self) -> bool:
        """Another element of the set is worst only after a jump."""
        return True

    @property
    def spec(self) -> str:
        """A description with a hash of the set, which itself does not fit in a string."""
        content = self.deltas.double().cpu().contiguous().numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        return f"finite-set({len(self.deltas)} perturbations, eps={self.eps!r}, sha256={digest})"

    def with_eps(self, eps: float) -> Self:
        """Refused: ε is the longest of the set.

        Args:
            eps: any number.
            eps: the set's own ε, in the units of x.

        Raises:
            InputError: another ε.
        """
        if eps != self.eps:
            raise InputError(
                f"FiniteSet: expected its own eps={self.eps:g}, got {eps:g}; make another set"
            )
        return self

    def _perturb(self, query: Query, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x = query.x
        if self.deltas.shape[1:] != x.shape[1:]:
            raise InputError(
                f"FiniteSet: expected perturbations of the examples' shape {tuple(x.shape[1:])}, "
                f"got {tuple(self.deltas.shape[1:])}"
            )
        best: Tensor | None = None
        lowest: Tensor | None = None
        with torch.no_grad():
            for candidate in self.deltas.to(x):
                delta = self._admit(x, candidate.expand_as(x))
                margins = query.margins(x + delta)
                if best is None or lowest is None:
                    best, lowest = delta.clone(), margins
                    continue
                worse = margins < lowest
                best[worse] = delta[worse]
                lowest = torch.minimum(lowest, margins)
        if best is None:
            raise InputError("FiniteSet: expected at least one perturbation")
        return best, torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)


def _linear_map(query: Query) -> Tensor:
    """W_Π as (C, …) with the shape of an example, after checking that the model is linear."""
    x = query.x
    # A point that is not in the data: at the data themselves a ReLU network agrees with its gradient.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((1, *x.shape[1:]), generator=generator, dtype=torch.float64).to(x)
    probe.requires_grad_()
    outputs = query.outputs(probe).reshape(-1)
    if not outputs.requires_grad:
        raise ModelError(
            "the model's outputs do not depend on its inputs; there is nothing to attack"
        )
    rows = [
        torch.autograd.grad(
            output, probe, create_graph=query.total, retain_graph=True, materialize_grads=True
        )[0]
        for output in outputs
    ]
    weights = torch.cat(rows)
    with torch.no_grad():
        # And its mirror image: a few data, or one image of zeros, prove nothing.
        points = torch.cat([x, -probe])
        expected = flat(points) @ flat(weights).T
        found = query.outputs(points).reshape(expected.shape)
        tolerance = 1e-9 if x.dtype == torch.float64 else 1e-4
        size = per_example_norm(points, 2).max() * per_example_norm(weights, 2).max()
        # Weights that are not finite prove nothing either way; whoever follows them says so.
        far = bool((found - expected).abs().max() > tolerance * size)
    if far and not _same_slopes(query, weights, points[-_POINTS:]):
        raise ModelError(
            "ExactLinear applies to networks that are linear in their input only; this one is not. "
            "Use FGM, FGSM, PGD or FiniteSet"
        )
    return weights


def _same_slopes(query: Query, weights: Tensor, points: Tensor) -> bool:
    """Whether f(0) = 0 and ∇_x f is ``weights`` at single points, to the bit.

    So it is for linear layers whose product all but cancels (of contradictory examples, say): f is then
    known to a rounding of ``Π‖W_k‖`` only, which may be more than ``‖W_Π‖``.
    """
    with torch.no_grad():
        if bool(query.outputs(torch.zeros_like(points[:1])).any()):
            return False
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((_POINTS, *points.shape[1:]), generator=generator, dtype=torch.float64)
    for point in torch.cat([points, noise.to(points)]):
        z = point.detach().unsqueeze(0).requires_grad_()
        for output, row in zip(query.outputs(z).reshape(-1), weights.detach(), strict=True):
            (slope,) = torch.autograd.grad(output, z, retain_graph=True, materialize_grads=True)
            if not torch.equal(slope[0], row):
                return False
    return True
