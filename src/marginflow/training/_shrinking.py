"""Leaving examples of no weight out of the epochs, as SVM solvers do."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from marginflow._checks import real, whole
from marginflow.errors import InputError

if TYPE_CHECKING:
    from marginflow.training._trainer import Trainer

_CHUNK = 1024
_TRIED = 8


@dataclass(frozen=True, eq=False)
class Part:
    """What is left of a batch.

    Attributes:
        rows: the examples that are kept, by their place in the data set.
        size: how many the batch has with those left out.
        loss: Σ ℓ over those left out, as it was at the last examination.
    """

    rows: Tensor
    size: int
    loss: float


class Shrinking:
    """Leaves examples out of the epochs whose weights ``|ℓ′(z_i)|`` cannot move a weight of the network.

    Late in training nearly all of ``G = −(1/n) Σ |ℓ′(z_i)| ∇z_i`` comes from few examples. At an
    *examination* all scores at perturbed inputs are taken, and the largest set O of lightest examples
    is left out that keeps one of two bounds, with u the unit rounding (2⁻²⁴ in float32, 2⁻⁵³ in float64):

    - **movement**: ``(η/B) Σ_{i∈O} |ℓ′(z_i)| max_k ‖∂z_i/∂W_k‖_F / ‖W_k‖_F ≤ θ``, θ = u: all that
      an epoch misses is less than one rounding of any layer's weights, and full training makes one at
      each of its steps. For the fused engine, a constant rate η and no momentum.
    - **share**: ``Σ_{i∈O} |ℓ′(z_i)| ≤ θ Σ_i |ℓ′(z_i)|``: one rounding of the gradient. For all others.

    Weights change until the next examination; so O is chosen for ``θ e^{−s}`` with a slack s, and there
    the *actual* sum over those left out is measured first. Beyond θ it is a *violation*: it is
    counted, the next examination comes after one epoch, and the slack grows. Else the epochs between
    examinations double, up to ``longest`` and to an eighth of those done: in the long run ln(weight) moves
    with ln(epoch). An epoch whose mean loss is more than twice the last one's is followed by an
    examination at once. Between examinations the bound is not known to hold.

    Batches, their order and ``1/n`` are those of the full training; where nobody of a batch is left,
    its step moves nothing (but momentum does). No example of a negative score is left out. Sums are
    formed in the log domain, in float64.

    The epoch's mean loss and accuracy count those left out as they were at the last
    examination. A random start is drawn for the examples that are kept.

    Args:
        theta: θ in (0, 1); by default the unit rounding of the data's type.
        longest: the most epochs between two examinations.
        least: the least share of the examples for which leaving out pays; below it, all are kept.
        slack: s at the start, in nats, and the least it gets.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        *,
        theta: float | None = None,
        longest: int = 64,
        least: float = 1 / 16,
        slack: float = 2.0,
    ) -> None:
        self.theta = None if theta is None else real("theta", theta, above=0.0)
        if self.theta is not None and self.theta >= 1:
            raise InputError(f"theta: expected a number below 1, got {theta!r}")
        self.longest = whole("longest", longest, least=1)
        self.least = real("least", least, least=0.0)
        self.slack = self._slack = real("slack", slack, least=0.0)
        self.kept: Tensor | None = None
        """Who is in the epochs, (n,) bool; None before the first examination: all."""
        self.interval = 1
        """Epochs until the next examination, when it is set."""
        self.next = 1
        """Completed epochs at which the next examination is due."""
        self.violations = 0
        """Examinations that found the bound exceeded."""
        self.examinations = 0
        """Examinations so far."""
        self.log_share = -math.inf
        """ln of the bounded sum over those who were left out, at the last examination: the check."""
        self._losses = torch.empty(0, dtype=torch.float64)
        self._last_loss = math.inf

    def check(self, trainer: Trainer) -> None:
        """Refuse a training that cannot be shrunk, before step 0.

        Raises:
            InputError: epochs that may be undone; a model in which an example's output hangs on the
                others in its batch, or on chance.
        """
        if trainer.rate.undoes:
            raise InputError(
                f"shrink: expected a learning rate that undoes no epoch, got lr={trainer.rate.spec!r}: "
                "it takes the loss of all examples after each epoch, so that little is saved; use a "
                "constant lr, or shrink=False"
            )
        if not _independent(trainer.model, trainer.data.x[:_TRIED]):
            raise InputError(
                "shrink: expected a model whose output for an example does not depend on the rest of "
                "its batch, nor on chance (batch normalisation, dropout); use shrink=False"
            )

    def begin_epoch(self, trainer: Trainer) -> None:
        """Examine if it is time."""
        if trainer.epoch >= self.next:
            self.examine(trainer)

    def end_epoch(self, trainer: Trainer) -> None:
        """Have an examination at once if the loss jumped."""
        if self.left_out and trainer.epoch_loss > 2 * self._last_loss:
            self.next = trainer.epoch
        self._last_loss = trainer.epoch_loss

    @property
    def left_out(self) -> int:
        """How many examples are left out at present."""
        return 0 if self.kept is None else int((~self.kept).sum())

    def parts(self, order: Tensor, batch_size: int) -> list[Part] | None:
        """What is left of each batch of ``order``; None where everybody is kept."""
        if not self.left_out or self.kept is None:
            return None
        n = order.numel()
        batches = -(-n // batch_size)
        stays = self.kept[order]
        absent = torch.where(stays, 0.0, self._losses[order])

        def by_batch(values: Tensor) -> list[float]:
            padded = nn.functional.pad(values, (0, batches * batch_size - n))
            sums: list[float] = padded.view(batches, batch_size).sum(dim=1).tolist()
            return sums

        counts = [int(count) for count in by_batch(stays.double())]
        sizes = [min(batch_size, n - b * batch_size) for b in range(batches)]
        rows: Sequence[Tensor] = torch.split(order[stays], counts)
        return [Part(*of) for of in zip(rows, sizes, by_batch(absent), strict=True)]

    def examine(self, trainer: Trainer) -> None:
        """Take all scores, check the bound, and choose anew whom to leave out."""
        scores, log_weights = self._weigh(trainer)
        self.examinations += 1
        if not bool(torch.isfinite(torch.logsumexp(log_weights, 0))):
            self.kept, self.next = None, trainer.epoch + 1  # the next step says what diverged
            return
        log_theta = math.log(self.theta or torch.finfo(trainer.data.x.dtype).eps / 2)
        self.log_share = -math.inf
        if self.left_out and self.kept is not None:
            self.log_share = float(torch.logsumexp(log_weights[~self.kept], 0))
        violated = self.log_share > log_theta
        if violated:
            self.violations += 1
            self._slack += max(1.0, self.log_share - log_theta)
        else:
            self._slack = max(self.slack, self._slack - 0.25)
        lightest = torch.argsort(log_weights)
        sums = torch.logcumsumexp(log_weights[lightest], 0)
        out = torch.zeros_like(scores, dtype=torch.bool)
        out[lightest] = sums <= log_theta - self._slack
        out &= scores > 0
        if int(out.sum()) < max(1, self.least * out.numel()):
            out[:] = False
        self.kept = ~out
        self._losses = trainer.engine.loss.values(scores)
        longest = self.longest
        if self.left_out:
            longest = max(1, min(longest, trainer.epoch // 8))
        self.interval = 1 if violated else min(2 * self.interval, longest)
        self.next = trainer.epoch + self.interval

    def record(self) -> dict[str, float]:
        """For a measurement: who is in, and how the last examinations went."""
        return {
            "left_out_examples": self.left_out,
            "left_out_weight": math.exp(self.log_share),
            "shrink_examinations": self.examinations,
            "shrink_violations": self.violations,
        }

    def state(self) -> dict[str, Tensor]:
        """All that changes, for a checkpoint."""
        numbers = [
            *(self.interval, self.next, self.violations, self.examinations),
            *(self._slack, self.log_share, self._last_loss),
        ]
        state = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        if self.kept is not None:
            state |= {"kept": self.kept, "losses": self._losses}
        return state

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what :meth:`state` gave, with the data on ``device``."""
        numbers = state["numbers"].tolist()
        self.interval, self.next, self.violations, self.examinations = map(int, numbers[:4])
        self._slack, self.log_share, self._last_loss = numbers[4:]
        self.kept = None
        if "kept" in state:
            self.kept, self._losses = state["kept"].to(device), state["losses"].to(device)

    def _weigh(self, trainer: Trainer) -> tuple[Tensor, Tensor]:
        """All scores z_i at perturbed inputs, and ln of what each example adds to the bounded sum."""
        data, generator = trainer.data, trainer.examination_generator()
        moving = trainer.rate.known and trainer.momentum == 0
        scores, reaches = [], []
        for x, y in zip(torch.split(data.x, _CHUNK), torch.split(data.y, _CHUNK), strict=True):
            z, reach = trainer.engine.reach(x, y, generator)
            scores.append(z.double())
            if reach is not None:
                reaches.append(reach.double())
        z = torch.cat(scores)
        log_slopes = trainer.engine.loss.log_slopes(z)
        if not moving or not reaches:
            return z, log_slopes - torch.logsumexp(log_slopes, 0)
        step = math.log(trainer.rate.rate(trainer) / trainer.batch_size)
        return z, log_slopes + torch.cat(reaches).log() + step


def _independent(model: nn.Module, x: Tensor) -> bool:
    """Whether the outputs at x are the same, to rounding, when a part of the batch is missing."""
    model = copy.deepcopy(model).train()
    part = x[: max(2, len(x) // 2)]
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        whole_batch, alone = model(x)[: len(part)], model(part)
    scale = float(whole_batch.abs().max())
    return bool((whole_batch - alone).abs().max() <= 1e-4 * scale)
