"""Gradient flow on one example in closed form, at times no float64 could hold.

One example whose (adversarial) margin is g ρ, ρ the norm of the product of the layers: an ℓ2
adversary on a linear network whose product points along y x has ``g = ‖x‖₂ − ε``. Exponential
loss, balanced layers aligned with the example. The reduced flow
``ρ̇ = L ρ^{2−2/L} g e^{−gρ}`` then integrates to

    L = 1:  ρ(t) = ln(e^{gρ₀} + g² t) / g
    L = 2:  Ei(gρ(t)) − Ei(gρ₀) = 2 g t

Times are given and kept as ln t, so ln t = 10⁶ is an ordinary argument; −∞ is t = 0.
Relative error against mpmath: below 1e-12 for every ln t up to 10⁶ (tested).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import expi

from marginflow._checks import real
from marginflow.errors import InputError
from marginflow.references._inputs import Array

_EULER_GAMMA = float(np.euler_gamma)
_ASYMPTOTIC_FROM = 50.0  # there the smallest term of Ei's series, v!/v^v, is below 1e-20
_STEPS = 100


def one_layer_norm(log_time: npt.ArrayLike, *, slope: float, start: float) -> Array:
    """``ρ(t) = ln(e^{gρ₀} + g² t)/g`` of a one-layer network.

    Of the shape of the times.

    Source: marginflow, from the flow of Section 3.1.

    Args:
        log_time: ln t, any shape; −∞ for t = 0.
        slope: g > 0, the margin per unit of norm.
        start: ρ₀ >= 0, the norm at t = 0.

    Returns:
        ρ(t), of ``log_time``'s shape.

    Raises:
        InputError: slope not positive, start negative, or a time that is NaN or +∞.
    """
    times = _times(log_time)
    g = real("slope", slope, above=0.0)
    initial = real("start", start, least=0.0)
    return np.asarray(np.logaddexp(g * initial, 2.0 * np.log(g) + times) / g)


def two_layer_norm(log_time: npt.ArrayLike, *, slope: float, start: float) -> Array:
    """``ρ(t)`` with ``Ei(gρ(t)) = Ei(gρ₀) + 2 g t``, of a balanced two-layer network's product.

    Of the shape of the times.

    Source: marginflow, from the flow of Section 3.1.

    Args:
        log_time: ln t, any shape; −∞ for t = 0.
        slope: g > 0, the margin per unit of norm.
        start: ρ₀ > 0, the product's norm at t = 0 (0 is a saddle: the flow never leaves it).

    Returns:
        ρ(t), of ``log_time``'s shape.

    Raises:
        InputError: slope or start not positive, or a time that is NaN or +∞.
    """
    times = _times(log_time)
    g = real("slope", slope, above=0.0)
    initial = g * real("start", start, above=0.0)
    return inverse_expi_sum(initial, np.log(2.0 * g) + times) / g


def inverse_expi_sum(v0: float, log_increment: npt.ArrayLike) -> Array:
    """The v with ``Ei(v) = Ei(v0) + e^a``, v0 > 0, a = ``log_increment`` of any shape.

    Newton's method in ln v, where ``h(ln v) = Ei(v)`` is convex with slope e^v, as long as the
    right side is below Ei(1); beyond, in v on ``ln Ei(v)``, whose slope tends to 1.
    """
    a = np.atleast_1d(np.asarray(log_increment, dtype=np.float64))
    first = float(expi(v0))
    small = np.full(a.shape, False)
    if v0 < 1.0:
        small = a < np.log(float(expi(1.0)) - first)
    v = np.empty(a.shape)
    v[small] = _solve_small(v0, first + np.exp(a[small]))
    v[~small] = _solve_large(_log_sum(v0, first, a[~small]))
    return np.asarray(v.reshape(np.shape(log_increment)))


def log_expi(v: npt.ArrayLike) -> Array:
    """``ln Ei(v)`` for v >= 0.5 (Ei is positive from 0.3725): no overflow, relative error 1e-14.

    Below 50 from ``scipy.special.expi``, above from ``Ei(v) ~ e^v/v Σ k!/v^k``.
    """
    values = np.atleast_1d(np.asarray(v, dtype=np.float64))
    low = values < _ASYMPTOTIC_FROM
    result = np.empty(values.shape)
    result[low] = np.log(expi(values[low]))
    high = values[~low]
    result[~low] = high - np.log(high) + np.log1p(_series(high))
    return result.reshape(np.shape(v))


def _series(v: Array) -> Array:
    """``Σ_{k >= 1} k!/v^k``, summed from the smallest term, for v >= 50."""
    total = np.zeros(v.shape)
    for k in range(int(_ASYMPTOTIC_FROM), 0, -1):
        total = (1.0 + total) * k / v
    return total


def _log_sum(v0: float, first: float, a: Array) -> Array:
    """``ln(Ei(v0) + e^a)`` where that is at least Ei(1)."""
    if first > 0.0:
        return np.logaddexp(float(log_expi(v0)) if v0 >= 0.5 else np.log(first), a)
    return np.asarray(a + np.log1p(first * np.exp(-a)))


def _solve_small(v0: float, target: Array) -> Array:
    """``Ei(v) = target <= Ei(1)``, by Newton in s = ln v from the right of the root."""
    s = np.zeros(target.shape)
    for _ in range(_STEPS):
        v = np.exp(s)
        step = (expi(v) - target) / np.exp(v)
        s = s - step
        if np.all(np.abs(step) <= 4.0 * np.finfo(float).eps * np.maximum(np.abs(s), 1.0)):
            break
    return np.maximum(np.exp(s), v0)


def _solve_large(log_target: Array) -> Array:
    """``ln Ei(v) = log_target >= ln Ei(1)``, by Newton from ``v = max(1, l + ln l)``."""
    v = np.maximum(1.0, log_target + np.log(np.maximum(log_target, 1.0)))
    for _ in range(_STEPS):
        value = log_expi(v)
        slope = np.exp(v - np.log(v) - value)
        step = (value - log_target) / slope
        v = np.maximum(v - step, 0.5)
        if np.all(np.abs(step) <= 4.0 * np.finfo(float).eps * v):
            break
    return np.asarray(v)


def _times(log_time: npt.ArrayLike) -> Array:
    try:
        times = np.asarray(log_time, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"log_time: expected real numbers ({error})") from error
    if np.isnan(times).any() or np.isposinf(times).any():
        raise InputError("log_time: expected ln t below infinity, got NaN or +∞")
    return times
