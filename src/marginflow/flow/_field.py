"""The vector field of the gradient flow: ``v(W) = −∇ ln L``, with its Jacobian.

Source: the gradient flow of Section 3.2, by the clock of marginflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marginflow.attacks import Attack, Derivative
from marginflow.flow._chain import LowRank
from marginflow.flow._closed_choice import closed_form
from marginflow.losses import CrossEntropy, Loss, margins_of

Vector = NDArray[np.float64]

_CHUNK = 512  # rows of the Jacobian in one batched backward pass


@dataclass(frozen=True, eq=False)
class FieldValue:
    """The field at one point.

    Attributes:
        log_loss: ln L at the perturbed examples.
        velocity: ``v = −∇ ln L``, (N,).
        smoothed: ``ℓ = −ln Σ e^{−m_i}``.
        margin: ``min_i m_i``.
    """

    log_loss: float
    velocity: Vector
    smoothed: float
    margin: float


@dataclass(eq=False)
class _Last:
    """The last point; in closed form what is not asked for is not computed."""

    w: Vector
    velocity: Vector
    margins: Vector | None
    value: FieldValue | None


class Field:
    """``W ↦ −∇ ln L(W)`` on vectors of all N trainable weights, in float64.

    The flow ``dW/ds = −∇ ln L`` runs through the same curve as ``dW/dt = −∇L``; its clock is
    ``dt = ds/L``. With the ``detached`` derivative of an inexact attack v is not the gradient of
    ln L(W) as a function of W; :attr:`conservative` says whether it is.

    Dense networks of one output have it in closed form (``_closed_choice.py`` says when); everything
    else goes by autograd, and its Jacobian by batched double backward (reverse mode: forward over
    reverse is slower up to some 1000 weights, and no faster beyond).

    Args:
        model: a network in float64; its weights are overwritten by evaluations by autograd.
        x: examples, (n, …).
        y: labels −1/+1, (n,).
        loss: the loss ℓ.
        attack: δ, or None.
        derivative: ``detached`` or ``total``.
        seed: of a random start, which all evaluations share.
        closed: use the closed form where there is one.

    Attributes:
        closed: the closed form, or None.
        evaluations: of v, whose last point is remembered.
        jacobians: evaluations of its Jacobian, likewise.
        factorizations: of linear systems with the Jacobian, counted by the integrator.
        parameters: the trainable ones, in the order of the vector.
        size: N, how many numbers these are.
        conservative: whether v is the gradient of −ln L(W) as a function of W.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss,
        attack: Attack | None,
        derivative: Derivative,
        seed: int = 0,
        closed: bool = True,
    ) -> None:
        self.model = model
        self.x = x
        self.y = y
        self.loss = loss
        self.attack = attack
        self.derivative: Derivative = derivative
        self.seed = seed
        self.parameters = tuple(p for p in model.parameters() if p.requires_grad)
        self.size = sum(p.numel() for p in self.parameters)
        self.evaluations = 0
        self.jacobians = 0
        self.factorizations = 0
        self._last: _Last | None = None
        self._last_jacobian: tuple[Vector, NDArray[np.float64]] | None = None
        self._last_factors: tuple[Vector, LowRank] | None = None
        # The sign of an input gradient is constant between its jumps, so there the derivatives agree;
        # an exact inner maximum has none to the first order (Danskin), for losses of the margin.
        exact = attack is not None and attack.exact and not self._several
        signs = attack is not None and math.isinf(attack.p) and not attack.exact
        self.conservative = attack is None or derivative == "total" or exact or signs
        # Where they agree the cheaper one serves; the Jacobian differentiates through δ in any case.
        self._through: Derivative = "detached" if exact or signs else derivative
        self.closed = None
        if closed:
            self.closed = closed_form(model, x, y, loss=loss, attack=attack, derivative=derivative)
        if self.closed is not None:
            self.conservative |= self.closed.exact

    @property
    def _several(self) -> bool:
        return isinstance(self.loss, CrossEntropy) and int(self.y.max()) > 1

    def read(self) -> Vector:
        """The model's weights as one vector."""
        return np.concatenate([p.detach().reshape(-1).cpu().numpy() for p in self.parameters])

    def write(self, w: Vector) -> None:
        """Put the weights ``w`` into the model.

        Args:
            w: (N,).
        """
        start = 0
        with torch.no_grad():
            for p in self.parameters:
                part = torch.from_numpy(w[start : start + p.numel()])
                p.copy_(part.reshape(p.shape))
                start += p.numel()

    def forget(self) -> None:
        """Forget the last points."""
        self._last = None
        self._last_jacobian = None
        self._last_factors = None

    def __call__(self, w: Vector) -> FieldValue:
        """The field at ``w``; the last point is remembered."""
        last = self._evaluated(w)
        if last.value is None:
            if self.closed is None or last.margins is None:
                raise TypeError("expected a field with a closed form")
            log_loss, smoothed, least = self.closed.levels(last.margins)
            last.value = FieldValue(log_loss, last.velocity, smoothed, least)
        return last.value

    def velocity(self, w: Vector) -> Vector:
        """``v`` alone, which is less work in closed form; the same memory as that of a call.

        Args:
            w: weights, (N,).
        """
        return self._evaluated(w).velocity

    def _evaluated(self, w: Vector) -> _Last:
        if self._last is not None and (self._last.w == w).all():
            return self._last
        self.evaluations += 1
        if self.closed is None:
            value = self._by_autograd(w)
            self._last = _Last(w.copy(), value.velocity, None, value)
        else:
            velocity, margins = self.closed.velocity(w)
            self._last = _Last(w.copy(), velocity, margins, None)
        return self._last

    def _by_autograd(self, w: Vector) -> FieldValue:
        self.write(w)
        x = self.x
        if self.attack is not None:
            x = x + self._delta(self._through)
        outputs = self.model(x)
        log_loss = self.loss.log_mean(self.loss.scores(outputs, self.y))
        gradient = torch.autograd.grad(log_loss, self.parameters, materialize_grads=True)
        with torch.no_grad():
            margins = margins_of(outputs, self.y, checked=True)
            smoothed = -float(torch.logsumexp(-margins, dim=0))
        return FieldValue(
            float(log_loss.detach()), -_vector(gradient), smoothed, float(margins.detach().min())
        )

    def potential_slope(self, w: Vector) -> Vector:
        """``−∇ ln L`` with the derivative through δ(W): of ln L(W) itself, whatever v is.

        Args:
            w: weights, (N,).
        """
        if self.conservative:
            return self.velocity(w)
        self.evaluations += 1
        if self.closed is not None:
            return self.closed.potential_slope(w)
        self.write(w)
        log_loss = self._log_loss(self._delta("total"))
        return -_vector(torch.autograd.grad(log_loss, self.parameters, materialize_grads=True))

    def jacobian(self, w: Vector) -> NDArray[np.float64]:
        """``∂v/∂W``, (N, N), through δ(W) too; the last one is remembered.

        Args:
            w: weights, (N,).
        """
        if self._last_jacobian is not None and np.array_equal(self._last_jacobian[0], w):
            return self._last_jacobian[1]
        self.jacobians += 1
        found = self._double_backward(w) if self.closed is None else self.closed.jacobian(w)
        self._last_jacobian = (w.copy(), found)
        return found

    @property
    def has_low_rank(self) -> bool:
        """Whether the Jacobian has a rank much smaller than N, and is known in factors."""
        return self.closed is not None and self.closed.has_low_rank

    @property
    def jacobian_numbers(self) -> int:
        """How many numbers the Jacobian takes, in factors where it has a low rank."""
        rank = self.closed.rank if self.closed is not None and self.has_low_rank else self.size
        return rank * self.size

    def low_rank(self, w: Vector) -> LowRank:
        """The Jacobian in factors, W in the span of the first; the last one is remembered.

        Args:
            w: weights, (N,).

        Raises:
            TypeError: it has none (:attr:`has_low_rank`).
        """
        if self.closed is None:
            raise TypeError("expected a field with a closed form")
        if self._last_factors is not None and np.array_equal(self._last_factors[0], w):
            return self._last_factors[1]
        self.jacobians += 1
        found = self.closed.low_rank(w)
        self._last_factors = (w.copy(), found)
        return found

    def _double_backward(self, w: Vector) -> NDArray[np.float64]:
        self.write(w)
        delta = self._delta("total")
        if self.conservative:
            gradient = self._gradient(delta)
            return -self._rows(gradient, self.parameters)[0]
        held = delta.detach().requires_grad_()
        gradient = self._gradient(held)
        by_weights, by_delta = self._rows(gradient, (*self.parameters, held), split=True)
        # v depends on W directly, and through the δ that its gradient holds fixed.
        if by_delta is not None and delta.requires_grad:
            cotangents = torch.from_numpy(by_delta).reshape(self.size, *delta.shape)
            by_weights = by_weights + self._pulled(delta, cotangents)
        return -by_weights

    def curvature(self, w: Vector, u: Vector) -> Vector:
        """``−(∇² ln L) u`` of ln L(W) as a function of W, (N,).

        Args:
            w: weights, (N,).
            u: a direction, (N,).
        """
        if self.closed is not None:
            return self.closed.along(w, u)
        self.write(w)
        gradient = self._gradient(self._delta("total"))
        product = torch.autograd.grad(
            gradient @ torch.from_numpy(u), self.parameters, materialize_grads=True
        )
        return -_vector(product)

    def _delta(self, derivative: Derivative) -> Tensor:
        if self.attack is None:
            return torch.zeros_like(self.x)
        generator = None
        if self.attack.random:
            generator = torch.Generator().manual_seed(self.seed)
        return self.attack(
            self.model, self.x, self.y, derivative=derivative, generator=generator
        ).delta

    def _log_loss(self, delta: Tensor) -> Tensor:
        return self.loss.log_mean(self.loss.scores(self.model(self.x + delta), self.y))

    def _gradient(self, delta: Tensor) -> Tensor:
        parts = torch.autograd.grad(
            self._log_loss(delta), self.parameters, create_graph=True, materialize_grads=True
        )
        return torch.cat([part.reshape(-1) for part in parts])

    def _rows(
        self, gradient: Tensor, by: tuple[Tensor, ...], split: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """``∂gradient/∂by``, row by row: the weights', and apart from them that of the last."""
        if not gradient.requires_grad:  # a network that is linear in its only layer, say
            return np.zeros((self.size, self.size)), None
        count = len(by) - 1 if split else len(by)
        weights, last = [], []
        for start in range(0, self.size, _CHUNK):
            stop = min(start + _CHUNK, self.size)
            unit = torch.zeros(stop - start, self.size, dtype=torch.float64)
            unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
            parts = torch.autograd.grad(
                gradient,
                by,
                unit,
                is_grads_batched=True,
                retain_graph=True,
                materialize_grads=True,
            )
            weights.append(torch.cat([p.reshape(stop - start, -1) for p in parts[:count]], dim=1))
            if split:
                last.append(parts[-1].reshape(stop - start, -1))
        return torch.cat(weights).numpy(), torch.cat(last).numpy() if split else None

    def _pulled(self, delta: Tensor, cotangents: Tensor) -> NDArray[np.float64]:
        rows = []
        for start in range(0, self.size, _CHUNK):
            part = cotangents[start : start + _CHUNK]
            grads = torch.autograd.grad(
                delta,
                self.parameters,
                part,
                is_grads_batched=True,
                retain_graph=True,
                materialize_grads=True,
            )
            rows.append(torch.cat([g.reshape(len(part), -1) for g in grads], dim=1))
        return torch.cat(rows).numpy()


def _vector(parts: tuple[Tensor, ...]) -> Vector:
    return torch.cat([part.detach().reshape(-1) for part in parts]).cpu().numpy()
