"""``ln L`` of a dense network at perturbed inputs, with gradient and Hessian, in closed form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from marginflow.attacks import FGM, FGSM, PGD, Attack, Derivative, ExactLinear, FiniteSet
from marginflow.flow._chain import LowRank, chain
from marginflow.flow._dense import Array, Dense, Pass, dense_network
from marginflow.losses import Exponential, Logistic, Loss
from marginflow.norms import dual_exponent

_MANY = 256  # examples from which on it pays to leave some out
_NOTHING = 1e-25  # a weight; those of all examples add up to about 1
_TINY = 1e-40  # a complex step: its square is nothing beside 1
_MUCH_SMALLER = 0.6  # of N: a Jacobian of smaller rank is kept in factors
_BLOCK = 500_000  # numbers of per-example gradients held at once: 4 MB
_COMPLEX = 4_000  # numbers in one array of a batch of complex steps: 64 kB; 8 MB take twice as long


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
    def has_low_rank(self) -> bool:
        """Whether the Jacobian's rank is known to be much smaller than N."""
        return False

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
    def has_low_rank(self) -> bool:
        rank = sum(rows + columns - 1 for rows, columns in self.network.shapes)
        return rank + 1 <= _MUCH_SMALLER * self.network.size

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
        found *= (
            -self.attack.eps
        )  # in place: at 1000 images the memory takes longer than the numbers
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


class Gradient(ClosedForm):
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


def closed_form(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss,
    attack: Attack | None,
    derivative: Derivative,
) -> ClosedForm | None:
    """The closed form of ``ln L``, or None where there is none: other networks, losses, attacks.

    There is one for dense networks (:func:`~marginflow.flow._dense.dense_network`), the exponential
    and the logistic loss, and no attack, a finite set, FGM, FGSM, PGD by signs without a random start,
    the exact linear one; the inputs without bounds.
    """
    network = dense_network(model)
    if network is None or type(loss) not in (Exponential, Logistic):
        return None
    flat = any(isinstance(module, nn.Flatten) for module in model.modules())
    if x.dtype != torch.float64 or x.device.type != "cpu" or (x.ndim != 2 and not flat):
        return None
    logistic = type(loss) is Logistic
    data = x.detach().flatten(1).numpy()
    if data.shape[1] != network.shapes[0][1]:
        return None
    labels = y.double().numpy()
    kind = type(attack)
    if attack is None:
        if network.linear:
            return Linear(network, data, labels, logistic, 2.0, 0.0)
        return Held(network, data, labels, logistic, None)
    if attack.bounds is not None or not attack.scale_invariant:
        return None
    if network.linear and kind in (ExactLinear, FGM, FGSM):
        return Linear(network, data, labels, logistic, attack.p, attack.eps)
    if kind is FGM:
        return Gradient(network, data, labels, logistic, attack.eps, derivative == "total")
    signs = kind is PGD and attack.piecewise_constant and not attack.random
    if kind in (FGSM, FiniteSet) or signs:
        return Held(network, data, labels, logistic, attack)
    return None


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
