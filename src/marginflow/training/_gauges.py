"""Quantities that need every single step, not only the measured ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marginflow.errors import ModelError
from marginflow.homogeneity import Homogeneity
from marginflow.models import linear_layers
from marginflow.training._callback import Callback
from marginflow.training._trainer import Trainer


class Gauge(Callback):
    """A callback that follows every step and can be read at any time.

    Source: marginflow; each gauge names its law.
    """

    def read(self) -> dict[str, float]:
        """The present values, for the record of a measurement.

        Drifts are relative, see the gauge.
        """
        return {}


class BalanceDrift(Gauge):
    """How exactly Eq. (36) holds.

    ``W_{k+1}ᵀW_{k+1} − W_kW_kᵀ`` minus its initial value minus
    ``Σ η² (G_{k+1}ᵀG_{k+1} − G_kG_kᵀ)`` is 0 for gradient descent and SGD on a deep linear network, with
    any step, loss, attack and derivative. Reads ``balance_drift``: its largest Frobenius
    norm over k, divided by max_k ‖W_k‖_F². Not with momentum, nor with undone epochs.

    Args:
        model: a deep linear network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._start: list[Tensor] = []
        self._sums: list[Tensor] = []

    @staticmethod
    def fits(trainer: Trainer) -> bool:
        """Whether the law applies to this training: a frozen layer breaks it, too.

        Args:
            trainer: the training.
        """
        try:
            layers = linear_layers(trainer.model)
        except ModelError:
            return False
        trained = len(trainer.engine.parameters) == len(layers) > 1
        return trained and trainer.momentum == 0 and not trainer.rate.undoes

    def on_start(self, trainer: Trainer) -> None:
        """Note the initial balance, unless a resumed run brought it along."""
        if not self._start:
            self._start = self._balances()
            self._sums = [torch.zeros_like(b) for b in self._start]

    def on_step(self, trainer: Trainer) -> None:
        """Add the step's η² term."""
        g = [v.detach().double().cpu() for v in trainer.gradients]
        eta2 = trainer.learning_rate**2
        for k, total in enumerate(self._sums):
            total.add_(g[k + 1].T @ g[k + 1] - g[k] @ g[k].T, alpha=eta2)

    def read(self) -> dict[str, float]:
        """The relative drift since the start."""
        if not self._start:
            return {}
        size = max(float(w.square().sum()) for w in linear_layers(self.model))
        drifts = [
            float(torch.linalg.matrix_norm(now - start - total))
            for now, start, total in zip(self._balances(), self._start, self._sums, strict=True)
        ]
        return {"balance_drift": max(drifts) / size}

    def state(self) -> dict[str, Tensor]:
        """Initial balances and sums.

        Returns:
            by name, the balances of layer k, (units, units).
        """
        tensors = {f"start.{k}": v for k, v in enumerate(self._start)}
        return tensors | {f"sum.{k}": v for k, v in enumerate(self._sums)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from saved sums.

        Raises:
            ModelError: the sums are those of another network.
        """
        count = len(state) // 2
        self._start = [state[f"start.{k}"] for k in range(count)]
        self._sums = [state[f"sum.{k}"] for k in range(count)]
        if state:
            _check_like(self._balances(), self._start)
            _check_like(self._balances(), self._sums)

    def _balances(self) -> list[Tensor]:
        w = linear_layers(self.model)
        return [w[k + 1].T @ w[k + 1] - w[k] @ w[k].T for k in range(len(w) - 1)]


def _check_like(own: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Refuse sums of a checkpoint that are those of another network."""
    kinds = [[(tuple(v.shape), v.dtype) for v in tensors] for tensors in (own, found)]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"the checkpoint is of another model: it has sums of {kinds[1]} in place of {kinds[0]}"
        )


class NormGrowth(Gauge):
    """How exactly the layers' norms grow alike (Lemma 11 for steps of any size).

    ``[‖W_k‖_F² − Σ η² ‖G_k‖_F²]/c_k`` grows alike in every layer at each step, by ``2ην`` (Lemma 4), whatever
    the network, loss, attack and derivative: multiplying W_k by a is multiplying f by a^{c_k}. Reads
    ``norm_drift``: how far two layers have come apart, divided by max_k ‖W_k‖_F². Not
    with momentum, nor with undone epochs; in float64, where it can be told from rounding.

    Args:
        model: the network in training.
        homogeneity: its layers.

    Attributes:
        degrees: c_k, (L,).
    """

    def __init__(self, model: nn.Module, homogeneity: Homogeneity) -> None:
        self.model = model
        self.degrees = torch.tensor(homogeneity.degrees, dtype=torch.float64)
        named = dict(model.named_parameters())
        self._layers = [[named[n] for n in layer.parameters] for layer in homogeneity.layers]
        place = {id(p): k for k, layer in enumerate(self._layers) for p in layer}
        self._place = [place.get(id(p)) for p in model.parameters() if p.requires_grad]
        self._start: Tensor | None = None
        self._sums = torch.zeros_like(self.degrees)

    @staticmethod
    def fits(trainer: Trainer, homogeneity: Homogeneity) -> bool:
        """Whether the law applies to this training and can be told from rounding.

        Args:
            trainer: the training.
            homogeneity: the layers of its network.
        """
        double = all(p.dtype == torch.float64 for p in trainer.engine.parameters)
        several = len(homogeneity.layers) > 1
        return several and double and trainer.momentum == 0 and not trainer.rate.undoes

    def on_start(self, trainer: Trainer) -> None:
        """Note the initial norms, unless a resumed run brought them along."""
        if self._start is None:
            self._start = self._squares()

    def on_step(self, trainer: Trainer) -> None:
        """Add the step's η² terms."""
        for k, square in zip(self._place, trainer.gradient_squares(), strict=True):
            if k is not None:
                self._sums[k] += trainer.learning_rate**2 * square

    def read(self) -> dict[str, float]:
        """The relative drift since the start."""
        if self._start is None:
            return {}
        now = self._squares()
        grown = (now - self._start - self._sums) / self.degrees
        return {"norm_drift": float((grown.max() - grown.min()) / now.max())}

    def state(self) -> dict[str, Tensor]:
        """Initial norms and sums.

        Returns:
            by name, each (L,).
        """
        return {} if self._start is None else {"start": self._start, "sums": self._sums}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from saved sums.

        Raises:
            ModelError: the sums are those of another network.
        """
        if state:
            self._start, self._sums = state["start"], state["sums"]
            _check_like([self.degrees, self.degrees], [self._start, self._sums])

    def _squares(self) -> Tensor:
        """``‖W_k‖_F²``, (L,)."""
        squares = [sum(float(p.detach().square().sum()) for p in ps) for ps in self._layers]
        return torch.tensor(squares, dtype=torch.float64)


class Descent(Gauge):
    """How far Eq. (30) is kept: ``L(t+1) − L(t) + (η/2)‖∇L(t)‖² ≤ 0`` at every step.

    For full-batch gradient descent. Reads ``descent_excess``, the largest left side so far
    divided by L(t), and ``loss_rise``, the largest ``(L(t+1) − L(t))/L(t)``; both are
    at most 0, but for rounding, where the lemma holds.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        self._excess = -math.inf
        self._rise = -math.inf

    @staticmethod
    def fits(trainer: Trainer) -> bool:
        """Whether every step sees the whole training set.

        Args:
            trainer: the training.
        """
        return trainer.steps_per_epoch == 1 and trainer.momentum == 0 and not trainer.rate.undoes

    def on_step(self, trainer: Trainer) -> None:
        """Compare the loss before this step with that before the last one."""
        loss = trainer.step_loss
        if self._last is not None and self._last[0] > 0:  # a loss that underflowed has no ratio
            before, decrease = self._last
            self._rise = max(self._rise, (loss - before) / before)
            self._excess = max(self._excess, (loss - before + decrease) / before)
        self._last = (loss, trainer.learning_rate / 2 * sum(trainer.gradient_squares()))

    def read(self) -> dict[str, float]:
        """The largest excess and rise so far, relative to L."""
        if self._rise == -math.inf:
            return {}
        return {"descent_excess": self._excess, "loss_rise": self._rise}

    def state(self) -> dict[str, Tensor]:
        """The running maxima and the last step.

        Returns:
            ``values``, (4,).
        """
        last = self._last if self._last is not None else (math.nan, math.nan)
        return {"values": torch.tensor([*last, self._excess, self._rise], dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from saved maxima."""
        loss, decrease, self._excess, self._rise = state["values"].tolist()
        self._last = None if math.isnan(loss) else (loss, decrease)
