"""What the closed forms of ``ln L`` have in common: the loss as a function of the margins."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from marginflow.flow._chain import LowRank
from marginflow.flow._dense import Array, Dense

_MUCH_SMALLER = 0.6  # of N: a Jacobian of smaller rank is kept in factors


class ClosedForm(ABC):
    """``−∇ ln L`` and its Jacobian for one dense network, data set, loss and attack.

    Attributes:
        exact: whether ``detached`` and ``total`` derivatives agree.
    """

    exact: bool = True

    def __init__(self, network: Dense, x: Array, y: Array, logistic: bool) -> None:
        self.network = network
        self.x = x
        self.y = y
        self.logistic = logistic

    @abstractmethod
    def velocity(self, w: Array) -> tuple[Array, Array]:
        """``−∇ ln L``, (N,), and the margins m_i, (n,)."""

    @abstractmethod
    def jacobian(self, w: Array) -> Array:
        """``∂(−∇ ln L)/∂W``, (N, N)."""

    def potential_slope(self, w: Array) -> Array:
        """``−∇ ln L`` through δ(W), (N,)."""
        return self.velocity(w)[0]

    @property
    def rank(self) -> int:
        """The columns of P in :meth:`low_rank`; N where there is none."""
        return self.network.size

    @property
    def has_low_rank(self) -> bool:
        """Whether the Jacobian's rank is known to be much smaller than N."""
        return self.rank <= _MUCH_SMALLER * self.network.size

    def low_rank(self, w: Array) -> LowRank:
        """The Jacobian as ``P K Pᵀ`` with w in the span of P.

        Raises:
            TypeError: its rank is not much smaller than N.
        """
        raise TypeError("expected a Jacobian of low rank")

    def along(self, w: Array, u: Array) -> Array:
        """``−(∇² ln L) u`` of ln L(W) as a function of W, (N,)."""
        found: Array = self.jacobian(w) @ u
        return found

    def levels(self, margins: Array) -> tuple[float, float, float]:
        """``ln L``, ``ℓ = −ln Σ e^{−m_i}`` and ``min_i m_i``."""
        least = float(np.minimum.reduce(margins))
        smoothed = least - math.log(float(np.add.reduce(np.exp(least - margins))))
        log_sum = _log_sum_exp(_log_logistic(margins)) if self.logistic else -smoothed
        return log_sum - math.log(len(margins)), smoothed, least

    def slopes(self, margins: Array) -> Array:
        """``s_i = ∂ ln L/∂m_i``, of the shape of the margins (…, n)."""
        if self.logistic:
            values = _log_logistic(margins)
            weights = np.exp(values - np.maximum.reduce(values, axis=-1, keepdims=True))
            weights *= _log_slope(margins) / np.add.reduce(weights, axis=-1, keepdims=True)
        else:
            weights = np.exp(np.minimum.reduce(margins, axis=-1, keepdims=True) - margins)
            weights /= np.add.reduce(weights, axis=-1, keepdims=True)
        found: Array = np.negative(weights, out=weights)
        return found

    def bends(self, margins: Array) -> Array:
        """The b_i with ``∂² ln L/∂m_i∂m_j = b_i [i = j] − s_i s_j``, s the slopes; (n,)."""
        slopes = self.slopes(margins)
        if not self.logistic:
            return -slopes
        # σ(m): with ln ℓ = g it is b = p (g″ + g′²) = −p g′ σ(m).
        t = np.exp(-np.abs(margins))
        found: Array = -slopes * np.where(margins > 0, 1.0, t) / (1.0 + t)
        return found


def _log_sum_exp(values: Array) -> float:
    top = float(values.max())
    return top + math.log(float(np.exp(values - top).sum()))


def _log_logistic(m: Array) -> Array:
    """``ln ln(1 + e^{−m})``, real m."""
    far = m > 0
    t = np.exp(-np.where(far, m, 0.0))
    # log1p(t)/t tends to 1; where t underflows it is 1.
    ratio = np.log1p(t) / np.where(t > 0, t, 1.0)
    near = np.where(far, 0.0, m)
    found: Array = np.where(
        far, np.log(np.where(t > 0, ratio, 1.0)) - m, np.log(np.log1p(np.exp(near)) - near)
    )
    return found


def _log_slope(m: Array) -> Array:
    """``−d ln ℓ/dm = σ(−m)/ln(1 + e^{−m})`` of the logistic loss ℓ; 1 as m → ∞."""
    t = np.exp(-np.abs(m))
    chance = np.where(m > 0, t, 1.0) / (1.0 + t)
    level = np.log1p(t) + np.maximum(-m, 0.0)
    found: Array = np.where(level > 0, chance / np.where(level > 0, level, 1.0), 1.0)
    return found
