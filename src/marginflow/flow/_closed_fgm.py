"""``ln L`` of a dense network under FGM, through δ(W)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marginflow.flow._closed import ClosedForm
from marginflow.flow._dense import Array, Dense, Pass

_TINY = 1e-40  # a complex step: its square is nothing beside 1
_COMPLEX = 4_000  # numbers in one array of a batch of complex steps: 64 kB; 8 MB take twice as long


class FastGradient(ClosedForm):
    """FGM on a network that is not linear: ``δ_i = −ε y_i g_i/‖g_i‖``, ``g_i = ∇_x f(x_i)``.

    The ``total`` derivative goes through δ: with ``r_i = ∇_x f(x_i + δ_i)`` and
    ``t_i = −ε s_i (r_i − ĝ_i⟨ĝ_i, r_i⟩)/‖g_i‖`` it adds the derivative by W of ``Σ ⟨t_i, ∇_x f(x_i)⟩``, t_i
    held: that of the change of the outputs along t_i. The Jacobian is taken column by column by a complex
    step, ``Im v(W + ih e_j)/h`` with h = 1e-40: forward mode, to rounding.
    """

    exact = False

    def __init__(
        self, network: Dense, x: Array, y: Array, logistic: bool, eps: float, total: bool
    ) -> None:
        super().__init__(network, x, y, logistic)
        self.eps = eps
        self.total = total

    def velocity(self, w: Array) -> tuple[Array, Array]:
        return self._velocity(w, total=self.total)

    def potential_slope(self, w: Array) -> Array:
        return self._velocity(w, total=True)[0]

    def jacobian(self, w: Array) -> Array:
        widest = max(max(shape) for shape in self.network.shapes)
        step = max(1, _COMPLEX // (len(self.x) * widest))
        found = np.empty((len(w), len(w)))
        for start in range(0, len(w), step):
            stop = min(start + step, len(w))
            moved = np.repeat(w[np.newaxis].astype(np.complex128), stop - start, axis=0)
            moved[np.arange(stop - start), np.arange(start, stop)] += 1j * _TINY
            found[:, start:stop] = self._velocity(moved, total=self.total)[0].imag.T / _TINY
        return found

    def along(self, w: Array, u: Array) -> Array:
        moved = w + 1j * _TINY * u
        found: Array = self._velocity(moved, total=True)[0].imag / _TINY
        return found

    def _velocity(self, w: Array, *, total: bool) -> tuple[Array, Array]:
        network, layers = self.network, self.network.layers(w)
        clean = network.forward(layers, self.x)
        above = network.backward(layers, clean, np.ones(len(self.x)))
        g = above[0] @ layers[0]
        square = (g * g).sum(axis=-1, keepdims=True)
        dead = square.real == 0
        size = np.sqrt(np.where(dead, 1.0, square))
        g = g / size
        signs = self.y[:, np.newaxis]
        at = network.forward(layers, self.x - self.eps * signs * g)
        margins = self.y * at.outputs
        slopes = self.y * self._slopes(margins)
        pulled = network.backward(layers, at, slopes)
        found = network.gradient(pulled, at.inputs)
        if not total:
            return -found, margins
        r = pulled[0] @ layers[0]  # s_i r_i
        t = (-self.eps * signs / size) * (r - g * (g * r).sum(axis=-1, keepdims=True))
        # The change of h_k along t, and how σ′ changes with the weights below.
        moved, carried = [np.where(dead, 0.0, t)], []
        for layer, slope in zip(layers, clean.slopes, strict=False):
            change = moved[-1] @ layer.swapaxes(-1, -2)
            carried.append(change)
            moved.append(change if slope is None else change * slope)
        found = found + network.gradient(above, moved)
        if any(activation.squared for activation in network.activations):
            found = found + network.gradient(
                self._bent(layers, clean, above, carried), clean.inputs
            )
        return -found, margins

    def _bent(
        self, layers: Sequence[Array], at: Pass, above: Sequence[Array], carried: Sequence[Array]
    ) -> list[Array]:
        """The derivative of ``Σ ⟨t_i, ∇_x f(x_i)⟩`` by what the layers give, through σ′."""
        found: list[Array] = [np.zeros_like(above[-1])]
        for k in range(len(layers) - 2, -1, -1):
            slope = at.slopes[k]
            back = found[-1] @ layers[k + 1]
            if slope is not None:
                back = back * slope
                if self.network.activations[k].squared:
                    back = back + 2.0 * (slope.real > 0) * carried[k] * (
                        above[k + 1] @ layers[k + 1]
                    )
            found.append(back)
        return found[::-1]

    def _slopes(self, margins: Array) -> Array:
        slopes = self.slopes(margins.real)
        if not np.iscomplexobj(margins):
            return slopes
        change = margins.imag
        along = (slopes * change).sum(axis=-1, keepdims=True)
        found: Array = slopes + 1j * (self.bends(margins.real) * change - slopes * along)
        return found
