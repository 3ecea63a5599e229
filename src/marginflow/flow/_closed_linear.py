"""``ln L`` of a deep linear network under the exact adversary, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from marginflow.flow._chain import LowRank, chain
from marginflow.flow._closed import ClosedForm
from marginflow.flow._dense import Array, Dense
from marginflow.norms import dual_exponent


class _Predictor(NamedTuple):
    """What a deep linear network says at one W.

    Attributes:
        b: ``b_k = (W_L ⋯ W_{k+1})ᵀ``, k = 0 … L; b_0 = w.
        margins: m. slopes: ``∂ ln L/∂m``. gradient: ``g = ∂ ln L/∂w``.
        size: ``‖w‖_q``. worst: its gradient, None where there is no adversary.
    """

    b: list[Array]
    margins: Array
    slopes: Array
    gradient: Array
    size: float
    worst: Array | None


class Linear(ClosedForm):
    """A deep linear network and the exact adversary of an ℓp ball.

    All depends on ``w = W_L ⋯ W_1``: ``m_i = y_i⟨w, x_i⟩ − ε‖w‖_q``. With g the gradient of ln L by w,
    ``∇_W ln L = ∇_W f(g)`` at fixed g, f the network: one example instead of n. The Hessian is
    ``∇²_W f(g) + Jᵀ H J``, J = ∂w/∂W, H the Hessian by w.
    """

    def __init__(
        self, network: Dense, x: Array, y: Array, logistic: bool, p: float, eps: float
    ) -> None:
        super().__init__(network, x, y, logistic)
        self.signed = y[:, np.newaxis] * x
        self.p = p
        self.q = dual_exponent(p)
        self.eps = eps
        self.units = np.eye(x.shape[1])
        self.one = np.ones(1)

    def velocity(self, w: Array) -> tuple[Array, Array]:
        layers = self.network.layers(w)
        at = self._evaluate(layers)
        found = np.empty_like(w)
        h = np.negative(at.gradient)  # −h_{k−1} from here on
        for k, (layer, place) in enumerate(zip(layers, self.network.places, strict=True)):
            np.multiply(at.b[k + 1][:, np.newaxis], h, out=found[place].reshape(layer.shape))
            if k + 1 < len(layers):
                h = layer @ h
        return found, at.margins

    def jacobian(self, w: Array) -> Array:
        layers = self.network.layers(w)
        at = self._evaluate(layers)
        by_weights = self.network.rows(layers, self.units, np.ones(len(self.units)))
        total = self.network.hessian(layers, at.gradient[np.newaxis], np.ones(1))
        total += by_weights.T @ (self._bent(at) @ by_weights)
        return np.negative(total, out=total)

    @property
    def rank(self) -> int:
        return 1 + sum(rows + columns - 1 for rows, columns in self.network.shapes)

    def low_rank(self, w: Array) -> LowRank:
        layers = self.network.layers(w)
        at = self._evaluate(layers)
        h = [at.gradient]
        for layer in layers[:-1]:
            h.append(layer @ h[-1])
        return chain(w, self.network, layers, h, at.b[1:], self._bent(at))

    def _evaluate(self, layers: Sequence[Array]) -> _Predictor:
        b = [self.one, layers[-1][0]]
        for layer in layers[-2::-1]:
            b.append(b[-1] @ layer)
        product = b[-1]
        margins = self.signed @ product
        if not self.eps:
            slopes = self.slopes(margins)
            return _Predictor(b[::-1], margins, slopes, slopes @ self.signed, 0.0, None)
        size = self._norm(product)
        margins -= self.eps * size
        slopes = self.slopes(margins)
        gradient = slopes @ self.signed
        if not size:
            return _Predictor(b[::-1], margins, slopes, gradient, size, None)
        worst = self._worst(product, size)
        gradient -= (self.eps * np.add.reduce(slopes)) * worst
        return _Predictor(b[::-1], margins, slopes, gradient, size, worst)

    def _bent(self, at: _Predictor) -> Array:
        """``∂² ln L/∂w∂w``, (d, d)."""
        rows, inner = self.signed, -np.outer(at.gradient, at.gradient)
        if at.worst is not None:
            rows = rows - self.eps * at.worst
            inner -= self.eps * at.slopes.sum() * self._bend(at.b[0], at.size, at.worst)
        inner += (rows.T * self.bends(at.margins)) @ rows
        return inner

    def _norm(self, v: Array) -> float:
        """``‖v‖_q``."""
        if self.q == 2.0:
            return math.sqrt(v @ v)
        return float(np.linalg.norm(v, self.q))

    def _worst(self, v: Array, size: float) -> Array:
        """``∇‖v‖_q``: the dual vector of v in the ℓp ball."""
        if self.q == 2.0:
            direction: Array = v / size
            return direction
        if math.isinf(self.q):
            found: Array = np.sign(v) * (np.arange(len(v)) == np.abs(v).argmax())
            return found
        found = np.sign(v) * (np.abs(v) / size) ** (self.q - 1)
        return found

    def _bend(self, v: Array, size: float, worst: Array) -> Array:
        """``∇²‖v‖_q``; a coordinate that is 0 takes no part."""
        if self.q == 2.0:
            flat: Array = (self.units - np.outer(worst, worst)) / size
            return flat
        if self.q == 1.0 or math.isinf(self.q):
            return np.zeros((len(v), len(v)))
        part = np.abs(v) / size
        part = np.where(part > 0, part, 1.0) ** (self.q - 2) * (part > 0)
        found: Array = (self.q - 1) / size * (np.diag(part) - np.outer(worst, worst))
        return found
