"""The Jacobian of a deep linear flow in the few directions in which it acts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marginflow.flow._dense import Array, Dense


@dataclass(frozen=True, eq=False)
class LowRank:
    """``P K Pᵀ`` with r orthonormal columns in P; where one is 0, so are its row and column of K.

    Attributes:
        basis: P, (N, r).
        core: K, (r, r).
    """

    basis: NDArray[np.float64]
    core: NDArray[np.float64]

    def dense(self) -> NDArray[np.float64]:
        """The matrix, (N, N)."""
        found: NDArray[np.float64] = self.basis @ self.core @ self.basis.T
        return found


def chain(
    w: Array,
    network: Dense,
    layers: Sequence[Array],
    h: Sequence[Array],
    b: Sequence[Array],
    inner: Array,
) -> LowRank:
    """``−∇² ln L`` where ln L is a function of ``w = W_L ⋯ W_1``, with W in the span of P.

    With g the gradient by w and H its Hessian, ``h_{k−1} = W_{k−1} ⋯ W_1 g`` and ``b_k = (W_L ⋯ W_{k+1})ᵀ``:

    - ``∂w/∂W_k[a, b] = b_k[a] (W_{k−1} ⋯ W_1)[b, :]``,
    - ``∂²f(g)/∂W_k[a, b] ∂W_l[c, d] = b_l[c] A[d, a] h_{k−1}[b]``, ``A = W_{l−1} ⋯ W_{k+1}``, k < l.

    So the block of W_k acts on e_a ⊗ h_{k−1} and b_k ⊗ e_b only: d_k + d_{k−1} − 1 directions of
    d_k d_{k−1}. A last column of P holds what is left of W.

    Args:
        w: the weights.
        network: of identities.
        layers: W_1 … W_L.
        h: ``h_0 = g``, …, h_{L−1}.
        b: b_1, …, b_L.
        inner: H.
    """
    frames = [_frame(vector) for vector in h]
    sizes = [rows + columns - 1 for rows, columns in network.shapes]
    starts = np.cumsum([0, *sizes]).tolist()
    rank = starts[-1] + 1
    basis = np.zeros((network.size, rank))
    core = np.zeros((rank, rank))
    predictor = np.zeros((len(inner), rank))  # ∂w/∂W in the basis
    below: Array = np.eye(len(inner))  # W_{k−1} ⋯ W_1
    for k, (layer, (first, others, length)) in enumerate(zip(layers, frames, strict=True)):
        rows = len(layer)
        left, right = slice(starts[k], starts[k] + rows), slice(starts[k] + rows, starts[k + 1])
        size = math.sqrt(float(b[k] @ b[k]))
        direction = b[k] / size if size else np.zeros(rows)
        place = basis[network.places[k]].reshape(*layer.shape, rank)
        place[np.arange(rows), :, np.arange(left.start, left.stop)] = first
        place[:, :, right] = direction[:, np.newaxis, np.newaxis] * others
        predictor[:, left] = np.outer(first @ below, b[k])
        predictor[:, right] = size * (others.T @ below).T
        through: Array = np.eye(rows)  # W_{l−1} ⋯ W_{k+1}
        for m in range(k + 1, len(layers)):
            first_m, others_m, _ = frames[m]
            stop = starts[m] + len(layers[m])
            core[left, starts[m] : stop] = length * np.outer(first_m @ through, b[m])
            size_m = math.sqrt(float(b[m] @ b[m]))
            core[left, stop : starts[m + 1]] = length * size_m * (through.T @ others_m)
            through = layers[m] @ through
        below = layer @ below
    core += core.T
    core += predictor.T @ (inner @ predictor)
    inside = basis[:, :-1]
    rest = w - inside @ (w @ inside)
    rest -= inside @ (rest @ inside)
    size = math.sqrt(float(rest @ rest))
    if size > 1e-10 * math.sqrt(float(w @ w)):
        basis[:, -1] = rest / size
    return LowRank(basis, np.negative(core, out=core))


def _frame(v: Array) -> tuple[Array, Array, float]:
    """``v/‖v‖``, orthonormal columns that complete it, and ‖v‖: by a reflection."""
    length = math.sqrt(float(v @ v))
    first = v / length if length else np.eye(len(v))[0]
    mirror = first.copy()
    sign = math.copysign(1.0, first[0])
    mirror[0] += sign
    # I − u uᵀ/u[0] with u = v̂ ± e_1 takes e_1 to ∓v̂: |u[0]| ≥ 1, nothing cancels.
    others = np.eye(len(v))[:, 1:] - np.outer(mirror, mirror[1:]) / (sign * mirror[0])
    return first, others, length
