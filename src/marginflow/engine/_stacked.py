"""Networks of one shape trained side by side: one batched product does the work of all.

Source: marginflow; each network takes the steps of Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marginflow.attacks import PGD
from marginflow.engine._base import Engine, LossGradient
from marginflow.engine._dense import DenseNetwork
from marginflow.engine._fused import FusedEngine, loss_slopes
from marginflow.engine._perturber import Perturber
from marginflow.errors import InputError

_LARGEST = 1 << 20
"""Weights of the largest layer × examples of a batch below which networks are stacked.

Measured on a CPU by ``benchmarks/seeds.py``: eight at once take a fifth of the time far below, 0.4 here;
beyond, :func:`choose_products` may find a faster library for one network at a time."""


class StackedEngine:
    """The work of S fused engines in batched products: tensors have an axis for the network in front.

    The engines' weights become views of stacks (:meth:`DenseNetwork.stacked`), so that each
    network can be measured and saved as ever; ``network.release()`` of each gives them memory of their
    own again. What a network gets differs from what its own engine gives by the rounding of products.

    Args:
        engines: of networks of one shape, with one loss and one attack, none of which
            :func:`stacking_refusal` refuses.

    Attributes:
        loss: that of all engines.
        network: the stack of their networks.

    Raises:
        InputError: networks of different shapes.
    """

    def __init__(self, engines: Sequence[FusedEngine]) -> None:
        first = engines[0]
        shapes = {tuple((w.shape, w.dtype, w.device) for w in e.network.weights) for e in engines}
        if len(shapes) > 1:
            raise InputError("expected networks of one shape, dtype and device")
        self.loss = first.loss
        self.network = DenseNetwork.stacked([engine.network for engine in engines])
        self._perturber = None if first.attack is None else Perturber(self.network, first.attack)
        self._looked: tuple[Tensor, Tensor] | None = None
        self._stepped: Tensor | None = None
        self._gradients: tuple[Tensor, ...] | None = None
        self._squares: list[list[float]] | None = None

    def look(
        self, x: Tensor, y: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> LossGradient:
        """L (S,), margins (S, n) and outputs (S, n, C) at the perturbed inputs; nothing changes.

        Args:
            x: examples, (S, n, …).
            y: labels, (S, n).
            generators: serve random starts, one for each network.
        """
        self._stepped = self._gradients = self._squares = None
        with torch.no_grad():
            perturber = self._perturber
            z = self.network.columns(x) if perturber is None else perturber(x, y, generators)[0]
            outputs = self.network.forward(z).mT
            loss, margins, seeds = loss_slopes(self.loss, outputs, y)
            self._looked = z, seeds
            return LossGradient(loss, (), margins, outputs)

    def descend(self, rate: float) -> None:
        """``W ← W − rate G`` with the gradient at what was looked at last, which is not formed.

        Args:
            rate: η > 0.
        """
        self.network.descend(self._backward(), rate)

    def still(self) -> tuple[Tensor, ...]:
        """V = 0, with which the first step of momentum is one along the gradient.

        Returns:
            one tensor a layer, (S, outputs, inputs).
        """
        return tuple(torch.zeros_like(weight) for weight in self.network.weights)

    def move(self, velocities: Sequence[Tensor], momentum: float, rate: float) -> None:
        """``V ← μ V + G``, then ``W ← W − rate V``.

        Args:
            velocities: V, one tensor a layer, (S, outputs, inputs); changed.
            momentum: μ in [0, 1).
            rate: η.
        """
        self._backward()
        for weight, v, g in zip(self.network.weights, velocities, self.gradients(), strict=True):
            v.mul_(momentum).add_(g)
            weight.add_(v, alpha=-rate)

    def gradients(self) -> tuple[Tensor, ...]:
        """``G_k`` of the last step, (S, fan-out, fan-in), formed when first asked for.

        Returns:
            one tensor a layer, (S, outputs, inputs).

        Raises:
            RuntimeError: the engine looked at other examples since, or there was no step.
        """
        if self._stepped is None:
            raise RuntimeError("no step whose factors are still there")
        if self._gradients is None:
            self._gradients = self.network.gradients(self._stepped)
        return self._gradients

    def squares(self) -> list[list[float]]:
        """``‖G_k‖²`` of the last step in float64, for each network one number a layer."""
        if self._squares is None:
            sums = [g.double().square().sum((1, 2)) for g in self.gradients()]
            self._squares = torch.stack(sums, dim=1).tolist()
        return self._squares

    def _backward(self) -> Tensor:
        if self._looked is None:
            raise RuntimeError("expected look(x, y) before a step")
        z, seeds = self._looked
        self._looked, self._stepped = None, z
        self.network.backward(z, seeds.mT)
        return z


class StackPlace:
    """What a stack's last step was for one of its networks.

    Args:
        engine: the stack.
        index: the network's place in it.
    """

    def __init__(self, engine: StackedEngine, index: int) -> None:
        self.engine = engine
        self.index = index

    def last_gradients(self) -> tuple[Tensor, ...]:
        """As :meth:`Engine.last_gradients`.

        Returns:
            one tensor a parameter, each of its shape.
        """
        return tuple(g[self.index] for g in self.engine.gradients())

    def last_squares(self) -> list[float]:
        """``‖G_k‖²``, in float64."""
        return self.engine.squares()[self.index]


def stacking_refusal(engine: Engine) -> str | None:
    """Why networks such as the engine's cannot be stacked, or None if they can.

    Args:
        engine: of one of the networks.
    """
    if not isinstance(engine, FusedEngine):
        return f"the {engine.name} engine serves one network at a time"
    if engine.seen is not engine.network:
        return "the attack sees the network in another precision"
    if engine.products != "default":
        return f"products by {engine.products} are of one network at a time"
    attack = engine.attack
    if isinstance(attack, PGD) and attack.random and attack.p == 2:
        return "a random start in the ℓ2 ball is drawn for one network at a time"
    return None


def stacking_gains(engine: Engine, batch_size: int) -> bool:
    """Whether stacked networks of this size are faster than one after the other.

    They are where a step's time is that of its calls. Where it is that of its products nothing is to
    be gained, and several networks push each other out of the cache.

    Args:
        engine: of one of the networks.
        batch_size: examples in a batch.
    """
    return max(w.numel() for w in engine.parameters) * batch_size < _LARGEST
