"""``ln L`` of a dense network under perturbations that are constant between their jumps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marginflow.attacks import PGD, Attack, FiniteSet
from marginflow.flow._closed import ClosedForm
from marginflow.flow._dense import Array, Dense

_BLOCK = 500_000  # numbers of per-example gradients held at once: 4 MB
_MANY = 256  # examples from which on it pays to leave some out
_NOTHING = 1e-25  # a weight; those of all examples add up to about 1


class Held(ClosedForm):
    """Perturbations that are constant between their jumps: none, a finite set, signs.

    With s_i, b_i the slopes and bends of ln L by the margins,
    ``∇² ln L = Σ s_i ∇²m_i + Σ b_i ∇m_i ∇m_iᵀ − (∇ ln L)(∇ ln L)ᵀ``.
    """

    def __init__(
        self, network: Dense, x: Array, y: Array, logistic: bool, attack: Attack | None
    ) -> None:
        super().__init__(network, x, y, logistic)
        self.attack = attack
        self.deltas: Array | None = None
        if isinstance(attack, FiniteSet):
            self.deltas = attack.deltas.double().flatten(1).numpy()

    def velocity(self, w: Array) -> tuple[Array, Array]:
        layers = self.network.layers(w)
        at = self.network.forward(layers, self._perturbed(layers))
        margins = self.y * at.outputs
        slopes = self.slopes(margins)
        if len(slopes) >= _MANY:
            # What weighs nothing is left out: late in a flow that is almost all.
            kept = slopes < -_NOTHING
            if 2 * int(kept.sum()) < len(slopes):
                at, slopes, y = at.part(kept), slopes[kept], self.y[kept]
                pulled = self.network.backward(layers, at, slopes * y)
                return -self.network.gradient(pulled, at.inputs), margins
        pulled = self.network.backward(layers, at, slopes * self.y)
        return -self.network.gradient(pulled, at.inputs), margins

    def jacobian(self, w: Array) -> Array:
        network, layers = self.network, self.network.layers(w)
        x = self._perturbed(layers)
        at = network.forward(layers, x)
        margins = self.y * at.outputs
        slopes, bends = self.slopes(margins) * self.y, self.bends(margins)
        gradient = network.gradient(network.backward(layers, at, slopes), at.inputs)
        total = np.outer(gradient, gradient)
        step = max(1, _BLOCK // network.size)
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            rows = network.rows(layers, x[part], np.sqrt(bends[part]))
            total -= rows.T @ rows
        total -= network.hessian(layers, x, slopes)
        return total

    def _perturbed(self, layers: Sequence[Array]) -> Array:
        """``x_i + δ_i``, (n, d)."""
        if self.attack is None:
            return self.x
        if self.deltas is not None:
            return self.x + self.deltas[self._worst(layers)]
        if isinstance(self.attack, PGD):
            delta = np.zeros_like(self.x)
            for _ in range(self.attack.steps):
                delta -= self.attack.step_size * self._signs(layers, self.x + delta)
                np.clip(delta, -self.attack.eps, self.attack.eps, out=delta)
            return self.x + delta
        found = self._signs(layers, self.x)
        # In place: at 1000 images new memory takes longer than the numbers.
        found *= -self.attack.eps
        found += self.x
        return found

    def _signs(self, layers: Sequence[Array], x: Array) -> Array:
        at = self.network.forward(layers, x)
        first = self.network.backward(layers, at, self.y)[0]
        signs: Array = np.sign(first @ layers[0])
        return signs

    def _worst(self, layers: Sequence[Array]) -> Array:
        """The element of the finite set that is worst for each example, (n,)."""
        if self.deltas is None:
            return np.zeros(len(self.x), dtype=np.intp)
        # W_1(x + δ) = W_1x + W_1δ: n + m products instead of n·m.
        first = layers[0].T
        u = (self.x @ first)[:, np.newaxis, :] + (self.deltas @ first)[np.newaxis]
        for layer, activation in zip(layers[1:], self.network.activations, strict=True):
            u = activation(u)[0] @ layer.T
        found: Array = (self.y[:, np.newaxis] * u[..., 0]).argmin(axis=1)
        return found
