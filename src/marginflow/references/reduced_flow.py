"""The gradient flow of a balanced deep linear network, reduced to its product p.

For ``f(x) = W_L ⋯ W_1 x`` with ``W_{k+1}ᵀ W_{k+1} = W_k W_kᵀ`` at the start (and hence for ever),
the flow of a loss φ of the product ``p = (W_L ⋯ W_1)ᵀ`` closes over p (Arora, Cohen & Hazan 2018,
theorem 1, with one output):

    ṗ = −‖p‖^{2−2/L} (I + (L−1) p̂ p̂ᵀ) ∇φ(p),   p̂ = p/‖p‖₂ .

Here φ is the adversarial loss ``(1/n) Σ ℓ(m_i)``, ``m_i = <p, z_i> − ε‖p‖_q``, z_i = y_i x_i,
1/p + 1/q = 1 (for p = 2: Lyu & Zhu 2022, Section 3.1), ℓ exponential or logistic. For L = 1 it is
the plain flow of φ. The field is smooth away from p = 0 for 1 < p < ∞; for p = 1 and p = ∞ it jumps
where coordinates tie or vanish, and a flow that slides along such a set defeats the integrator,
which then says so.

Two clocks: raw time t by an explicit method (DOP853), and ``s = ln(1 + t)`` by an implicit one
(Radau with the exact Jacobian), in which ln t = 10⁶ costs little more than ln t = 10, because all
is computed as ``e^{ln t + ln|ℓ′|}`` and never as t or ℓ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.integrate import Radau, solve_ivp
from scipy.special import log_expit, logsumexp

from marginflow._checks import choice, real
from marginflow.errors import InputError
from marginflow.references._inputs import (
    Array,
    budget,
    depth_of,
    dual_exponent,
    exponent,
    lp_norm,
    signed_examples,
    vector,
)

_ADVICE = (
    " The field jumps for p = 1 and p = ∞, and at p̂ = 0: if the flow slides along a jump, take "
    "1 < p < ∞ or the limit direction itself (robust_svm); else loosen rtol and atol."
)


@dataclass(frozen=True)
class ReducedFlow:
    """A trajectory of the product.

    Attributes:
        log_time: ln t of each record, shape (k,); shorter than asked if the integrator stopped.
        weights: the product p at these times, shape (k, d).
        log_loss: ln φ(p), shape (k,).
        margins: adversarial margins m_i, shape (k, n), not normalised.
        success: whether the last time asked for was reached.
        message: the integrator's own words and, if it stopped early, what to try.
        evaluations: how often the field was evaluated.
    """

    log_time: Array
    weights: Array
    log_loss: Array
    margins: Array
    success: bool
    message: str
    evaluations: int

    @property
    def direction(self) -> Array:
        """``p/‖p‖₂``, shape (k, d)."""
        return np.asarray(self.weights / np.linalg.norm(self.weights, axis=1, keepdims=True))


def reduced_flow(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    start: npt.ArrayLike,
    *,
    depth: int,
    log_times: npt.ArrayLike,
    eps: float = 0.0,
    p: float = 2.0,
    loss: str = "exponential",
    clock: str = "log",
    rtol: float = 1e-10,
    atol: float = 1e-12,
) -> ReducedFlow:
    """Integrate the reduced flow from ``start`` at t = 0 to the given times.

    Args:
        x: shape (n, d).
        y: labels −1 or +1, shape (n,).
        start: the product at t = 0, shape (d,), not zero.
        depth: L >= 1.
        log_times: ln t at which to record, increasing, shape (k,).
        eps: radius of the perturbations, in the units of x.
        p: their exponent, in [1, ∞].
        loss: "exponential" or "logistic".
        clock: "log" (s = ln(1 + t), Radau) or "time" (DOP853; ln t below 700).
        rtol: relative tolerance of the integrator.
        atol: absolute tolerance of the integrator; by the log clock no less than what margins of
            the size of ``‖p‖`` leave of a float64 (10⁻¹⁰ ‖p‖ at the default rtol).

    Raises:
        DataError: bad shapes, labels, NaN, infinity or a zero start.
        InputError: depth, eps, p, tolerances or times out of range, or an unknown loss or clock.
    """
    z = signed_examples(x, y)
    field = _Field(
        z=z,
        depth=depth_of(depth),
        eps=budget(eps),
        q=dual_exponent(exponent(p)),
        logistic=choice("loss", loss, ("exponential", "logistic")) == "logistic",
    )
    logarithmic = choice("clock", clock, ("log", "time")) == "log"
    times = _increasing(log_times, logarithmic)
    ticks = np.logaddexp(0.0, times) if logarithmic else np.exp(times)
    solution = solve_ivp(
        field.in_log_time if logarithmic else field.in_time,
        (0.0, float(ticks[-1])),
        vector("start", start, z.shape[1]),
        t_eval=ticks,
        rtol=real("rtol", rtol, above=0.0),
        atol=real("atol", atol, above=0.0),
        method=_Radau if logarithmic else "DOP853",
        **({"jac": field.jacobian} if logarithmic else {}),
    )
    weights = np.asarray(solution.y).T if len(solution.y) else np.empty((0, z.shape[1]))
    margins = np.array([field.margins(row) for row in weights]).reshape(len(weights), len(z))
    return ReducedFlow(
        log_time=times[: len(weights)],
        weights=weights,
        log_loss=logsumexp(field.log_losses(margins), axis=1) - math.log(len(z)),
        margins=margins,
        success=bool(solution.success),
        message=f"{solution.message}{'' if solution.success else _ADVICE}",
        evaluations=int(solution.nfev),
    )


class _Radau(Radau):  # type: ignore[misc]  # scipy has no types
    """Radau whose absolute tolerance stays above the rounding of the field.

    The field hangs on differences s − m_i, which are rounded to EPS ‖p‖. A coordinate that stays
    small while ‖p‖ grows like ln t is moved by that, and no step however short would settle it to
    rtol of its own size: Newton's iteration, which stops at ``newton_tol`` of the tolerance, would not
    converge, and the step would shrink until ln t = 10⁶ took hours.
    """

    atol: float | Array

    def _step_impl(self) -> tuple[bool, str | None]:
        rounding = 10 * np.finfo(float).eps * float(np.linalg.norm(self.y))
        self.atol = np.maximum(self.atol, rounding / self.newton_tol)
        done: tuple[bool, str | None] = super()._step_impl()
        return done


@dataclass(frozen=True)
class _Field:
    """ṗ and its Jacobian; ``shift`` multiplies both by e^shift inside the exponentials."""

    z: Array
    depth: int
    eps: float
    q: float
    logistic: bool

    def margins(self, w: Array) -> Array:
        return np.asarray(self.z @ w - self.eps * lp_norm(w, self.q))

    def log_losses(self, m: Array) -> Array:
        """The log loss ln ℓ(m): −m, or ``ln ln(1 + e^{−m})``, whose inner logarithm tends to e^{−m}."""
        if not self.logistic:
            return -m
        return np.asarray(np.where(m > 37.0, -m, np.log(-log_expit(np.minimum(m, 37.0)))))

    def in_time(self, _: float, w: Array) -> Array:
        return self._product(w, self._gradient(w, 0.0))

    def in_log_time(self, s: float, w: Array) -> Array:
        return self._product(w, self._gradient(w, s))

    def jacobian(self, s: float, w: Array) -> Array:
        """The derivative of ``in_log_time`` with respect to w, shape (d, d)."""
        r = float(np.linalg.norm(w))
        unit = w / r
        across = (np.eye(len(w)) - np.outer(unit, unit)) / r
        gradient, hessian = self._gradient(w, s), self._hessian(w, s)
        extra, power = self.depth - 1.0, 2.0 - 2.0 / self.depth
        along = float(unit @ gradient)
        moved = hessian + extra * (
            along * across + np.outer(unit, gradient @ across + unit @ hessian)
        )
        stretched = power / r * np.outer(gradient + extra * along * unit, unit)
        return np.asarray(-(r**power) * (moved + stretched))

    def _product(self, w: Array, gradient: Array) -> Array:
        r = float(np.linalg.norm(w))
        unit = w / r
        turned = gradient + (self.depth - 1.0) * float(unit @ gradient) * unit
        return np.asarray(-(r ** (2.0 - 2.0 / self.depth)) * turned)

    def _gradient(self, w: Array, shift: float) -> Array:
        """``e^shift ∇φ``: −(1/n) Σ e^{shift + ln|ℓ′(m_i)|} (z_i − ε ∇‖w‖_q)."""
        slopes = self._slopes(w, shift)
        return np.asarray(self.eps * float(slopes.sum()) * self._norm_slope(w) - slopes @ self.z)

    def _hessian(self, w: Array, shift: float) -> Array:
        slopes = self._slopes(w, shift)
        curved = slopes
        if self.logistic:
            curved = slopes * np.exp(log_expit(self.margins(w)))  # ℓ″ = |ℓ′| σ(m)
        rows = self.z - self.eps * self._norm_slope(w)
        bent = self.eps * float(slopes.sum()) * self._norm_curvature(w)
        return np.asarray(rows.T @ (curved[:, None] * rows) + bent)

    def _slopes(self, w: Array, shift: float) -> Array:
        """``e^shift |ℓ′(m_i)|/n``."""
        m = self.margins(w)
        logs = log_expit(-m) if self.logistic else -m
        return np.asarray(np.exp(np.minimum(shift + logs, 700.0)) / len(m))

    def _norm_slope(self, w: Array) -> Array:
        """``∇‖w‖_q``; at a kink of q = 1 or ∞ one subgradient."""
        if math.isinf(self.q):
            slope = np.zeros_like(w)
            slope[np.argmax(np.abs(w))] = 1.0
            return np.asarray(slope * np.sign(w))
        ratio = np.abs(w) / lp_norm(w, self.q)
        return np.asarray(np.sign(w) * ratio ** (self.q - 1.0))

    def _norm_curvature(self, w: Array) -> Array:
        """``∇²‖w‖_q``, with coordinates at 0 held away from 0 where it is infinite (q < 2)."""
        if self.q == 1.0 or math.isinf(self.q):
            return np.zeros((len(w), len(w)))
        size = lp_norm(w, self.q)
        slope = self._norm_slope(w)
        ratio = np.maximum(np.abs(w) / size, np.finfo(float).eps)
        return np.asarray(
            (self.q - 1.0) / size * (np.diag(ratio ** (self.q - 2.0)) - np.outer(slope, slope))
        )


def _increasing(log_times: npt.ArrayLike, logarithmic: bool) -> Array:
    times = np.asarray(log_times, dtype=np.float64)
    if times.ndim != 1 or times.size == 0 or not np.isfinite(times).all():
        raise InputError("log_times: expected a list of finite ln t")
    if np.any(np.diff(times) <= 0.0):
        raise InputError("log_times: expected increasing ln t; sort them and drop repetitions")
    if not logarithmic and times[-1] > 700.0:
        raise InputError(f"log_times: t = e^{times[-1]:g} is no float64; use clock='log'")
    return times
