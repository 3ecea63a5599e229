"""Dense networks with one output as functions of one weight vector, with derivatives in numpy.

Small networks spend their time on calling, not on computing: a gradient by autograd takes some 300
calls of 3 µs. Written out it is some 30 calls of 1 µs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from marginflow.engine import DenseNetwork

Array = NDArray[Any]
"""Real, or complex where a derivative is taken by a complex step."""

_BLOCK = 2_000_000  # numbers of per-example derivatives that are held at once: 16 MB


@dataclass(frozen=True)
class Activation:
    """``u ↦ max(u, 0)^q`` for u > 0 and ``slope · u`` elsewhere, q = 1 or 2 (then slope = 0)."""

    slope: float
    squared: bool = False

    @property
    def linear(self) -> bool:
        """Whether it is the identity."""
        return self.slope == 1.0 and not self.squared

    def __call__(self, u: Array) -> tuple[Array, Array | None]:
        """``σ(u)`` and ``σ′(u)``; None stands for 1 everywhere."""
        if self.linear:
            return u, None
        positive = u.real > 0
        if self.squared:
            rectified = u * positive
            return rectified * rectified, 2.0 * rectified
        if self.slope == 0.0:
            return u * positive, positive
        factor: Array = np.where(positive, 1.0, self.slope)
        return u * factor, factor


@dataclass(frozen=True, eq=False)
class Pass:
    """One evaluation of a network at n inputs.

    Attributes:
        inputs: ``h_{k−1}``, what layer k was given, (…, n, d_{k−1}), k = 1 … L.
        slopes: ``σ′(u_k)``, (…, n, d_k), k = 1 … L − 1; None stands for 1.
        outputs: f, (…, n).
    """

    inputs: list[Array]
    slopes: list[Array | None]
    outputs: Array

    def part(self, kept: Array) -> Pass:
        """The evaluation at some of the inputs."""
        slopes = [None if slope is None else slope[kept] for slope in self.slopes]
        return Pass([h[kept] for h in self.inputs], slopes, self.outputs[kept])


class Dense:
    """``f(x) = W_L σ(W_{L−1} … σ(W_1 x))`` of one output, on vectors of all weights.

    Layers may carry leading axes (a batch of weight vectors); inputs then broadcast against them.

    Args:
        shapes: (d_k, d_{k−1}) of W_k.
        activations: σ behind each layer but the last.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], activations: Sequence[Activation]
    ) -> None:
        self.shapes = tuple(shapes)
        self.activations = tuple(activations)
        ends = np.cumsum([0, *(rows * columns for rows, columns in shapes)]).tolist()
        self.places = [slice(a, b) for a, b in pairwise(ends)]
        self.size: int = ends[-1]
        self.linear = all(activation.linear for activation in activations)

    def layers(self, w: Array) -> list[Array]:
        """The matrices W_1 … W_L in ``w`` (…, N), as views."""
        lead = w.shape[:-1]
        return [
            w[..., place].reshape(*lead, *shape)
            for place, shape in zip(self.places, self.shapes, strict=True)
        ]

    def forward(self, layers: Sequence[Array], x: Array) -> Pass:
        """Evaluate at the inputs ``x``, (…, n, d)."""
        inputs, slopes = [x], []
        for layer, activation in zip(layers, self.activations, strict=False):
            h, slope = activation(inputs[-1] @ layer.swapaxes(-1, -2))
            inputs.append(h)
            slopes.append(slope)
        outputs = inputs[-1] @ layers[-1].swapaxes(-1, -2)
        return Pass(inputs, slopes, outputs[..., 0])

    def backward(self, layers: Sequence[Array], at: Pass, seeds: Array) -> list[Array]:
        """``b_k = seeds · ∂f/∂u_k``, (…, n, d_k), k = 1 … L, u_k what layer k gives."""
        found = [seeds[..., np.newaxis]]
        for layer, slope in zip(reversed(layers), reversed(at.slopes), strict=False):
            pulled = found[-1] @ layer
            found.append(pulled if slope is None else pulled * slope)
        return found[::-1]

    def gradient(self, pulled: Sequence[Array], inputs: Sequence[Array]) -> Array:
        """``Σ_i b_ki h_{k−1,i}ᵀ`` of all layers, (…, N): with ``seeds`` c that is ``Σ c_i ∇f(x_i)``."""
        parts = [b.swapaxes(-1, -2) @ h for b, h in zip(pulled, inputs, strict=True)]
        return np.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)

    def rows(self, layers: Sequence[Array], x: Array, seeds: Array) -> Array:
        """``seeds_i ∇f(x_i)``, example by example, (n, N)."""
        at = self.forward(layers, x)
        pulled = self.backward(layers, at, seeds)
        parts = [
            (b[:, :, np.newaxis] * h[:, np.newaxis, :]).reshape(len(x), -1)
            for b, h in zip(pulled, at.inputs, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    def hessian(self, layers: Sequence[Array], x: Array, q: Array) -> Array:
        """``Σ_i q_i ∇²f(x_i)``, (N, N), of real weights.

        Between layers k < l, with ``A = ∂h_{l−1}/∂u_k`` and ``b_l = ∂f/∂u_l``:
        ``∂²f/∂W_k[a,b] ∂W_l[c,d] = b_l[c] A[d,a] h_{k−1}[b]``. Within a layer, and beyond it, only
        σ″ adds: ``Σ_j σ″(u_m[j]) ∂f/∂h_m[j] · ∂u_m[j]/∂W ∂u_m[j]/∂Wᵀ``.
        """
        across, bent = np.zeros((2, self.size, self.size))
        step = max(1, _BLOCK // self._numbers())
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            self._add(across, bent, layers, x[part], q[part])
        total: Array = across + across.T + bent
        return total

    def _numbers(self) -> int:
        """The most numbers per example that :meth:`hessian` holds at once."""
        sizes = [rows * columns for rows, columns in self.shapes]
        hidden = [rows for rows, _ in self.shapes[:-1]]
        most = [rows * sizes[k] for k in range(len(sizes) - 2) for rows in hidden[k + 1 :]]
        if any(activation.squared for activation in self.activations[1:]):
            most += [rows * self.size for rows in hidden]
        return max([self.size, *most])

    def _add(self, across: Array, bent: Array, layers: Sequence[Array], x: Array, q: Array) -> None:
        """The sum over some examples: blocks k < l to ``across``, what σ″ adds to ``bent``."""
        at = self.forward(layers, x)
        pulled = self.backward(layers, at, q)
        hidden = len(layers) - 1
        reached: dict[tuple[int, int], Array] = {}  # ∂u_m/∂u_k, (n, d_m, d_k), k < m
        for k in range(hidden):
            h, slope, units = at.inputs[k], at.slopes[k], self.shapes[k][0]
            carried = h[:, np.newaxis, :]
            through = np.ones((len(x), units)) if slope is None else slope
            # A is diagonal for l = k + 1: a weight of unit a meets those that read this unit.
            near = (through[:, :, np.newaxis] * carried).reshape(len(x), -1)
            block = (pulled[k + 1].T @ near).reshape(-1, units, h.shape[1])  # (c, a, b)
            unit = np.arange(units)
            view = self._block(across, k, k + 1)  # (a, b, c, d)
            view[unit, :, :, unit] += block.transpose(1, 2, 0)
            change: Array = through[:, :, np.newaxis] * np.eye(units)  # ∂h_k/∂u_k
            for m in range(k + 1, hidden):
                change = layers[m] @ change
                reached[k, m] = change
                turn = at.slopes[m]
                if turn is not None:
                    change = change * turn[:, :, np.newaxis]
                far = (change[..., np.newaxis] * carried[:, np.newaxis]).reshape(len(x), -1)
                shape = (-1, self.shapes[m][0], units, h.shape[1])
                block = (pulled[m + 1].T @ far).reshape(shape)  # (c, d, a, b)
                self._block(across, k, m + 1)[...] += block.transpose(2, 3, 0, 1)
        for m in range(hidden):
            if self.activations[m].squared:
                bend = 2.0 * (at.slopes[m] > 0) * (pulled[m + 1] @ layers[m + 1])  # type: ignore[operator]
                self._add_bend(bent, at, bend, [reached[k, m] for k in range(m)])

    def _add_bend(self, bent: Array, at: Pass, bend: Array, reached: Sequence[Array]) -> None:
        """``Σ_i Σ_j bend_ij · ∂u_m[j]/∂W ∂u_m[j]/∂Wᵀ``, m the layer above those ``reached``."""
        m, n = len(reached), len(bend)
        h, units = at.inputs[m], self.shapes[m][0]
        unit = np.arange(units)
        # ∂u_m[j]/∂W_m is h in row j: units of the same layer do not meet.
        own = np.matmul(h.T * bend.T[:, np.newaxis, :], h)  # (j, b, b′)
        self._block(bent, m, m)[unit, :, unit, :] += own
        if not reached:
            return
        below = [
            (change[..., np.newaxis] * h_k[:, np.newaxis, np.newaxis, :]).reshape(n, units, -1)
            for change, h_k in zip(reached, at.inputs, strict=False)
        ]
        rows = np.concatenate(below, axis=2)  # (n, j, weights below)
        stop = rows.shape[2]
        weighted = bend[..., np.newaxis] * rows
        bent[:stop, :stop] += weighted.reshape(-1, stop).T @ rows.reshape(-1, stop)
        mixed = np.einsum("njw,nb->wjb", weighted, h).reshape(stop, -1)
        bent[:stop, self.places[m]] += mixed
        bent[self.places[m], :stop] += mixed.T

    def _block(self, matrix: Array, k: int, m: int) -> Array:
        """The block of W_k and W_m, as (d_k, d_{k−1}, d_m, d_{m−1}): a view."""
        return matrix[self.places[k], self.places[m]].reshape(*self.shapes[k], *self.shapes[m])


def dense_network(model: nn.Module, shape: Sequence[int]) -> Dense | None:
    """The dense network that ``model`` computes, or None where it is another one.

    That is what :meth:`marginflow.engine.DenseNetwork.of` recognises, with one output and every weight
    trainable, in float64, in the order of use.

    Args:
        model: any module.
        shape: the shape of an example.
    """
    found = DenseNetwork.of(model, shape)
    if found is None or found.classes != 1:
        return None
    for parameter, weight in zip(model.parameters(), found.weights, strict=True):
        plain = parameter.requires_grad and parameter.dtype == torch.float64
        if parameter is not weight or not plain or parameter.device.type != "cpu":
            return None
    activations = [
        Activation(1.0 if a.name == "identity" else a.slope, squared=a.name == "squared-relu")
        for a in found.activations
    ]
    return Dense([(w.shape[0], w.shape[1]) for w in found.weights], activations)
