"""Deep linear networks under the exact ℓ2 perturbation, as plain numpy formulas, for the errata.

``z_i = y_i x_i`` are the signed examples, (n, d); ``m_i = ⟨W_Π, z_i⟩ − ε‖W_Π‖`` by Eq. (10). Nothing
here calls the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def product(layers: Sequence[Array]) -> Array:
    """``W_Π = W_L ⋯ W_1``, (1, d)."""
    return np.asarray(reduce(lambda below, above: above @ below, layers))


def margins(p: Array, z: Array, eps: float) -> Array:
    return np.asarray(z @ p - eps * np.linalg.norm(p))


def logistic(m: Array) -> float:
    """``(1/n) Σ ln(1 + e^{−m_i})``."""
    return float(np.logaddexp(0, -m).mean())


def slopes(m: Array) -> Array:
    """``|ℓ′(m)| = 1/(1 + e^m)`` of the logistic loss."""
    return np.asarray(np.exp(-np.logaddexp(0, m)))


def predictor_gradient(p: Array, z: Array, eps: float, weights: Array) -> Array:
    """``−(1/n) Σ weights_i (z_i − ε p/‖p‖)``, the gradient by p for weights |ℓ′(m_i)|."""
    unit = p / np.linalg.norm(p)
    return np.asarray(-(weights[:, None] * (z - eps * unit)).mean(axis=0))


def layer_gradients(layers: Sequence[Array], by_product: Array) -> list[Array]:
    """``∂L/∂W_k = (W_L ⋯ W_{k+1})ᵀ ∇ (W_{k−1} ⋯ W_1)ᵀ``, in the shapes of the layers."""
    found = []
    for k in range(len(layers)):
        above = reduce(lambda a, w: w @ a, layers[k + 1 :], np.eye(layers[k].shape[0]))
        below = reduce(lambda a, w: w @ a, layers[:k], np.eye(layers[0].shape[1]))
        found.append(above.T @ by_product[None, :] @ below.T)
    return found


@dataclass(frozen=True, eq=False)
class Descent:
    """A path of gradient descent on the logistic adversarial loss.

    Attributes:
        layers: the layers at each step.
        losses: L at each step.
        A, B: ``Σ η² G_kᵀG_k`` and ``Σ η² G_kG_kᵀ`` up to each step, one a layer (below Eq. 36).
    """

    layers: list[list[Array]]
    losses: list[float]
    A: list[list[Array]]
    B: list[list[Array]]


def descend(start: Sequence[Array], z: Array, eps: float, eta: float, steps: int) -> Descent:
    layers = [w.copy() for w in start]
    A = [np.zeros((w.shape[1],) * 2) for w in layers]
    B = [np.zeros((w.shape[0],) * 2) for w in layers]
    path = Descent([], [], [], [])
    for _ in range(steps + 1):
        p = product(layers)[0]
        m = margins(p, z, eps)
        path.layers.append([w.copy() for w in layers])
        path.losses.append(logistic(m))
        path.A.append([a.copy() for a in A])
        path.B.append([b.copy() for b in B])
        for k, g in enumerate(layer_gradients(layers, predictor_gradient(p, z, eps, slopes(m)))):
            layers[k] = layers[k] - eta * g
            A[k] += eta**2 * g.T @ g
            B[k] += eta**2 * g @ g.T
    return path


def top(w: Array) -> tuple[float, Array, Array]:
    """σ, u, v of the largest singular value."""
    u, s, vt = np.linalg.svd(w)
    return float(s[0]), u[:, 0], vt[0]
