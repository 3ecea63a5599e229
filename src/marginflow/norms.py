"""Per-example p-norms, dual vectors and projections onto the perturbation ball.

An example is one index of the first axis; its norm runs over all other axes.
p is any number in [1, ∞]; q with 1/p + 1/q = 1 is its dual.

Source: dual norms as in Eqs. (10) and (139); the perturbation ball of Section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marginflow._checks import real
from marginflow.errors import InputError, SpecificationError

_NAMES = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


def as_exponent(p: float | str) -> float:
    """The exponent p of a norm given as a number in [1, ∞], ``"l2"``, ``"linf"`` or ``"2"``.

    Args:
        p: the norm.

    Raises:
        InputError: not a norm (p < 1, NaN, another word).
        SpecificationError: a word that names no norm.
    """
    if isinstance(p, str):
        text = p.lower()
        if text in _NAMES:
            return _NAMES[text]
        try:
            p = float(text.removeprefix("l"))
        except ValueError:
            raise SpecificationError(
                f"norm: expected 'l1', 'l2', 'linf' or a number of at least 1, got {text!r}"
            ) from None
    if isinstance(p, int | float) and p == math.inf:
        return math.inf
    return real("norm exponent p", p, least=1.0)


def dual_exponent(p: float) -> float:
    """The exponent q with ``1/p + 1/q = 1``.

    Args:
        p: exponent in [1, ∞].
    """
    if p == 1:
        return math.inf
    return 1.0 if math.isinf(p) else p / (p - 1)


def norm_name(p: float) -> str:
    """The name of a norm: ``linf``, ``l2``, ``l1.5`` …

    Args:
        p: exponent in [1, ∞].
    """
    return "linf" if math.isinf(p) else f"l{p:.17g}"


def flat(v: Tensor) -> Tensor:
    """``v`` of shape (n, …) as (n, d); an example of shape () counts as d = 1.

    Args:
        v: one row an example, (n, …).
    """
    return v.flatten(1) if v.ndim != 1 else v.unsqueeze(1)


def _as_example_shape(row: Tensor, v: Tensor) -> Tensor:
    """A per-example number (n,) shaped to multiply ``v`` of shape (n, …)."""
    return row.reshape(-1, *(1 for _ in v.shape[1:]))


def per_example_norm(v: Tensor, p: float) -> Tensor:
    """``‖v_i‖_p``, shape (n,), accumulated in float64 and returned in float64.

    Args:
        v: one row an example, (n, …).
        p: exponent in [1, ∞].

    Raises:
        InputError: examples without a feature.
    """
    rows = flat(v)
    if rows.shape[1] == 0:
        raise InputError("expected at least one feature per example, got none")
    norms: Tensor
    if p in (1.0, 2.0, math.inf):
        norms = torch.linalg.vector_norm(rows, ord=p, dim=1, dtype=torch.float64)
        return norms
    # In units of the largest: |v|^p would leave the range of the numbers for large p.
    rows = rows.double()
    peak = rows.detach().abs().amax(dim=1)
    peak = torch.where((peak > 0) & torch.isfinite(peak), peak, torch.ones_like(peak))
    norms = peak * torch.linalg.vector_norm(rows / peak.unsqueeze(1), ord=p, dim=1)
    return norms


def dual_vector(g: Tensor, p: float) -> Tensor:
    """The direction of steepest ascent in the ℓp ball: ``argmax_{‖d‖_p ≤ 1} ⟨d, g_i⟩``.

    p = 2: g/‖g‖₂. p = ∞: sgn(g). p = 1: the signed unit vector of the largest
    |g_j| (the first one on a tie). Otherwise, with q dual to p,
    ``sgn(g) |g|^{q−1} / ‖g‖_q^{q−1}``. Where g_i = 0 the result is 0.

    Differentiable (as far as the direction is), and **bit-identical** when g is
    multiplied by a power of two: g_i is first divided by a power of two, the
    exponent of max_j |g_ij|, so that nothing under- or overflows on the way.

    Args:
        g: gradients, shape (n, …).
        p: exponent in [1, ∞].

    Returns:
        shape of g; ‖·‖_p is 1 or 0 to a rounding.
    """
    rows = flat(g)
    if math.isinf(p):
        return torch.sgn(g)
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    dead = largest == 0
    _, exponent = torch.frexp(largest)
    # ldexp would form 2^-exponent, which overflows for subnormal g: two exact halves.
    half = torch.div(-exponent, 2, rounding_mode="floor")
    scale_1 = torch.exp2(half.to(rows.dtype))
    scale_2 = torch.exp2((-exponent - half).to(rows.dtype))
    scaled = rows * scale_1 * scale_2
    # The zero rows are replaced, not masked afterwards: 0/0 would poison the backward pass.
    safe = torch.where(dead, torch.ones_like(scaled), scaled)
    if p == 1:
        # argmax is piecewise constant: the derivative of this direction is 0.
        index = safe.detach().abs().argmax(dim=1, keepdim=True)
        direction = torch.zeros_like(safe).scatter(1, index, torch.sgn(safe.gather(1, index)))
    elif p == 2:
        direction = safe / torch.linalg.vector_norm(safe, dim=1, keepdim=True)
    else:
        q = dual_exponent(p)
        # In units of the largest: for p near 1 (q in the hundreds) all |g|^q would underflow.
        size = safe.abs() / safe.detach().abs().amax(dim=1, keepdim=True)
        total = (size**q).sum(dim=1, keepdim=True)
        # Zero coordinates take no part: the derivative of |g|^{q−1} there is infinite for q < 2.
        size = torch.where(safe == 0, torch.ones_like(size), size)
        direction = torch.sgn(safe) * size ** (q - 1) / total ** (1 / p)
    return torch.where(dead, torch.zeros_like(direction), direction).reshape(g.shape)


def project(v: Tensor, p: float, radius: float) -> Tensor:
    """A point of the ball: ``argmin_{‖u_i‖_p ≤ radius} ‖u_i − v_i‖₂`` for p = 2 and p = ∞.

    For other p the point is ``v_i · min(1, radius/‖v_i‖_p)``, which lies in the ball
    but is not the nearest one. Idempotent to a rounding; the norm of the result
    exceeds the radius by at most one rounding.

    Args:
        v: one row an example, (n, …).
        p: exponent of the ball's norm, in [1, ∞].
        radius: of the ball, ≥ 0, in the units of v.

    Returns:
        of the shape of v.

    Raises:
        InputError: examples without a feature, for p < ∞.
    """
    if math.isinf(p):
        return v.clamp(-radius, radius)
    size = per_example_norm(v, p)
    inside = size <= radius
    factor = torch.where(inside, torch.ones_like(size), radius / torch.where(inside, 1.0, size))
    return v * _as_example_shape(factor.to(v.dtype), v)
