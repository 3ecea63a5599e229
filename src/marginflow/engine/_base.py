"""What every engine offers: the loss gradient at perturbed inputs, and the scores there.

Source: the gradient of Algorithm 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from marginflow._logmath import log_mean_exp
from marginflow.attacks import Attack, Derivative
from marginflow.losses import Loss


@dataclass(frozen=True, eq=False)
class LossGradient:
    """What one step needs and what comes free with it.

    Attributes:
        loss: ``L = (1/n) Σ ℓ(z_i)`` at the perturbed inputs, or ``ln L`` where its gradient was
            asked for; a scalar tensor.
        gradients: ``G = ∂L/∂W``, one per trainable parameter, each of its shape, in their order;
            none after :meth:`Engine.descend`, see :meth:`Engine.last_gradients`.
        margins: the margins m_i at the perturbed inputs, (n,).
        outputs: the outputs at the perturbed inputs, (n,), (n, 1) or (n, C); the next call may
            overwrite them.
    """

    loss: Tensor
    gradients: tuple[Tensor, ...]
    margins: Tensor
    outputs: Tensor


class Engine(ABC):
    """``G = ∇_W (1/n) Σ ℓ(z(x_i + δ_i(W)))``.

    Args:
        model: any torch module; its ``.grad`` fields are not touched.
        loss: the loss ℓ.
        attack: δ, or None for standard training.
        derivative: ``detached`` holds δ fixed (Algorithm 1), ``total`` differentiates through it.

    Attributes:
        name: what ``engine=`` calls it.
        parameters: the trainable parameters, in the order of the model.
    """

    name: ClassVar[str]
    in_place: ClassVar[bool] = False
    """Whether :meth:`descend` is there."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        attack: Attack | None,
        derivative: Derivative = "detached",
    ) -> None:
        self.model = model
        self.loss = loss
        self.attack = attack
        self.derivative: Derivative = derivative
        self.shards: int | None = None
        """Parts of a batch whose gradients are added in a fixed order, where that was asked for."""
        self.parameters = tuple(p for p in model.parameters() if p.requires_grad)

    @property
    def settings(self) -> dict[str, str]:
        """What of the engine decides the last bits of a training, for ``run.json``."""
        return {"engine": self.name}

    def check(self, x: Tensor, y: Tensor) -> None:  # noqa: B027 - autograd checks in each call
        """Refuse a data set, once, whose batches will then be taken unchecked.

        Args:
            x: all examples, (n, …).
            y: their labels, (n,).

        Raises:
            DataError: labels that do not fit the outputs, examples outside the attack's bounds.
        """

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        log_reference: float | None = None,
        count: int | None = None,
        *,
        of_log: bool = False,
    ) -> LossGradient:
        """The gradient on the batch (x, y).

        Args:
            x: examples of the batch, of the model's dtype and device.
            y: their labels.
            generator: serves a random start.
            log_reference: a number r; the gradient is then that of ``L/e^r``, formed in the
                log domain, so that it neither under- nor overflows where L does.
            count: the n of ``1/n``, by default the number of examples; larger where examples
                of no weight were left out of the batch.
            of_log: the gradient of ``ln L``, ``−Σ w_i ∇z_i`` with the weights of
                :meth:`Loss.log_weights`, which exists where L underflows. ``log_reference``
                and ``count`` say nothing then.
        """

    @abstractmethod
    def scores(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The scores z_i at the perturbed inputs, (n,), without gradients.

        Args:
            x: examples, (n, …).
            y: labels, (n,).
            generator: serves a random start.
        """

    def reach(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The scores z_i at the perturbed inputs, and how far each can move the weights.

        Args:
            x: examples, (n, …).
            y: labels, (n,).
            generator: serves a random start.

        Returns:
            z, (n,); ``max_k ‖∂z_i/∂W_k‖_F / ‖W_k‖_F``, (n,), or None where it costs a pass an example.
        """
        return self.scores(x, y, generator), None

    def descend(
        self,
        x: Tensor,
        y: Tensor,
        rate: float,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> LossGradient:
        """``W ← W − rate G`` in place, unless L is not finite: then W stays. The gradient is not formed.

        Arguments as for a call. Only where :attr:`in_place` is True.

        Args:
            x: examples of the batch, (n, …).
            y: their labels, (n,).
            rate: η > 0.
            generator: serves a random start.
            count: the n of ``1/n``, by default the number of examples.
        """
        raise NotImplementedError(f"{type(self).__name__} forms the gradient")

    def last_gradients(self) -> tuple[Tensor, ...]:
        """G of the last :meth:`descend`, formed now.

        Returns:
            one tensor a parameter, each of its shape.

        Raises:
            RuntimeError: the engine was used since, or there was none.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no step")

    def log_loss(
        self,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        batch_size: int = 1024,
    ) -> float:
        """``ln L`` of all examples at their perturbed inputs, in batches, without gradients.

        Args:
            x: examples, (n, …).
            y: labels, (n,).
            generator: serves a random start.
            batch_size: examples per pass.
        """
        # One place for all: small results kept between the passes would keep the heap apart.
        values = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
        for start in range(0, x.shape[0], batch_size):
            part = slice(start, start + batch_size)
            values[part] = self.loss.log_values(self.scores(x[part], y[part], generator).double())
        return float(log_mean_exp(values))
