"""The nearest point of an ℓp ball in the Euclidean distance, exactly, for any p ∈ [1, ∞].

:func:`marginflow.norms.project` is per example and exact for p = 2 and ∞ only; the distance from a
hull to a ball of perturbations needs the nearest point itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marginflow.norms import dual_exponent, per_example_norm

_ROUNDING = 4.0 * torch.finfo(torch.float64).eps
_MOST_ITERATIONS = 60


def lp_norm(v: Tensor, p: float) -> float:
    """``‖v‖_p`` of a vector, without under- or overflow of the powers."""
    return float(per_example_norm(v.unsqueeze(0), p))


class NearestInBall:
    """``v ↦ argmin_{‖u‖_p <= radius} ‖u − v‖₂`` for vectors v of shape (d,), float64.

    p = ∞ clips, p = 2 shortens, p = 1 thresholds at the level that a sort finds. For other p the
    optimality condition ``u_j + λ u_j^{p−1} = |v_j|`` is solved by Newton's method for all j at
    once, and λ by Newton's method on ``1/‖u(λ)‖_p = 1/radius``, which is affine in λ for p = 2.

    The difference ``w = v − u`` is what the point is for: ``<u, w> = radius·‖w‖_q`` (1/p + 1/q = 1),
    so u is the worst perturbation of the predictor w.

    Successive calls are expected to be at nearby points: λ starts from its last value.
    """

    def __init__(self, p: float, radius: float) -> None:
        self.p = p
        self.radius = radius
        self._level = 0.0

    def __call__(self, v: Tensor) -> Tensor:
        """The nearest point, shape (d,); its norm exceeds the radius by a rounding at most."""
        if self.radius == 0.0:
            return torch.zeros_like(v)
        if math.isinf(self.p):
            return v.clamp(-self.radius, self.radius)
        size = lp_norm(v, self.p)
        if size <= self.radius:
            return v
        if self.p == 2.0:
            return v * (self.radius / size)
        sizes = v.abs() / self.radius
        u = _thresholded(sizes) if self.p == 1.0 else self._curved(sizes)
        excess = lp_norm(u, self.p)
        return torch.copysign(u * (self.radius / max(excess, 1.0)), v)

    def _curved(self, sizes: Tensor) -> Tensor:
        """The nearest point of the unit ball for positive ``sizes`` outside it, 1 < p < ∞, p ≠ 2."""
        p = self.p
        low, high = 0.0, lp_norm(sizes, dual_exponent(p))
        level = self._level if low < self._level < high else high / 2.0
        # Norms and powers round: for p < 2, u = s^{1/(p−1)} carries that of s so many times over.
        enough = 16.0 * _ROUNDING * max(1.0, 1.0 / (p - 1.0))
        for _ in range(_MOST_ITERATIONS):
            u = _at_level(sizes, level, p)
            norm = lp_norm(u, p)
            if norm > 1.0:
                low = level
            else:
                high = level
            if abs(norm - 1.0) <= enough or high - low <= enough * high:
                break
            # d‖u‖_p/dλ, from u' (1 + λ(p−1)u^{p−2}) = −u^{p−1}; a coordinate at 0 stays there.
            inner = torch.where(u > 0.0, u, 1.0)
            fall = inner ** (p - 1.0) / (1.0 + level * (p - 1.0) * inner ** (p - 2.0))
            fall = fall * (inner / norm) ** (p - 1.0)
            slope = float(torch.where(u > 0.0, fall, 0.0).sum())
            level += (norm - 1.0) * norm / slope if slope > 0.0 else math.inf
            if not low < level < high:
                level = (low + high) / 2.0
        self._level = level
        return u


def _thresholded(sizes: Tensor) -> Tensor:
    """``max(sizes − c, 0)`` with sum 1."""
    falling = torch.sort(sizes, descending=True).values
    cuts = (falling.cumsum(0) - 1.0) / torch.arange(1, len(sizes) + 1, device=sizes.device)
    cut = cuts[int((falling > cuts).sum()) - 1]
    return (sizes - cut).clamp(min=0.0)


def _at_level(sizes: Tensor, level: float, p: float) -> Tensor:
    """The u >= 0 with ``u + level·u^{p−1} = sizes``.

    For p < 2 the unknown is ``s = u^{p−1}``: either way the equation reads ``s + c s^k = b`` with
    k > 1, whose left side is convex and increasing, so Newton's method falls to the root from the
    right without a safeguard. It starts where the larger term alone makes b.
    """
    c, k, b = (level, p - 1.0, sizes) if p > 2.0 else (1.0 / level, 1.0 / (p - 1.0), sizes / level)
    s = torch.minimum(b, (b / c) ** (1.0 / k))
    for _ in range(_MOST_ITERATIONS):
        power = c * s ** (k - 1.0)
        fall = (s + power * s - b) / (1.0 + k * power)
        s = (s - fall).clamp(min=0.0)
        if bool((fall <= _ROUNDING * s).all()):  # below: rounding, for it falls only
            break
    return s if p > 2.0 else s**k
