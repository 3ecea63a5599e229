"""Leaving examples of no weight out of the epochs, as SVM solvers do.

Source: the shrinking of SVM solvers, Joachims (1999), for Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from marginflow._checks import real, whole
from marginflow.datasets import Dataset
from marginflow.engine import independent
from marginflow.errors import InputError

if TYPE_CHECKING:
    from marginflow.training._trainer import Trainer

_CHUNK = 1024
_TRIED = 8
_SHARE = 2.0**-7


@dataclass(frozen=True, eq=False)
class Part:
    """What is left of a batch.

    Attributes:
        x, y: the examples that are kept, (k, …), and their labels, (k,).
        size: how many the batch has with those left out.
        loss: Σ ℓ over those left out, as it was at the last examination.
        rows: which examples of the data set they are, (k,), where somebody asks for it.
    """

    x: Tensor
    y: Tensor
    size: int
    loss: float = 0.0
    rows: Tensor | None = None


class Shrinking:
    """Leaves examples out of the epochs whose weights ``|ℓ′(z_i)|`` are too small to matter.

    Late in training most of ``G = −(1/n) Σ |ℓ′(z_i)| ∇z_i`` comes from few examples. At an
    *examination* all scores at perturbed inputs are taken, and the largest set O of lightest
    examples is left out that keeps the bounds, with u the unit rounding (2⁻²⁴ in float32, 2⁻⁵³ in
    float64):

    - **movement**: ``(η/B) Σ_{i∈O} |ℓ′(z_i)| max_k ‖∂z_i/∂W_k‖_F / ‖W_k‖_F ≤ θ``, θ = u: all
      that an epoch misses is less than one rounding of any layer's weights, and full training
      makes one at each of its steps. And ``Σ_{i∈O} |ℓ′(z_i)| ≤ 2⁻⁷ Σ_i |ℓ′(z_i)|``, since in the
      end a whole epoch moves less than a rounding. For the fused engine, a constant rate η and no
      momentum.
    - **share**: ``Σ_{i∈O} |ℓ′(z_i)| ≤ θ Σ_i |ℓ′(z_i)|``, θ = u: one rounding of the gradient. For
      all others.

    Weights change until the next examination; so O is chosen for ``θ e^{−s}`` with a slack s, and
    there the *actual* sums over those left out are measured first. Beyond a bound it is a *violation*:
    it is counted, the next examination comes after one epoch, and the slack grows. Else the
    epochs between examinations double, up to ``longest`` and to an eighth of those done: in the
    long run ln(weight) moves with ln(epoch). An epoch whose mean loss is more than twice the last
    one's is followed by an examination at once. Between examinations the bounds are not known to
    hold.

    Batches, their order and ``1/n`` are those of the full training; where nobody of a batch is
    left, its step moves nothing (but momentum does). Nobody is left out before all examples are
    fitted (positive scores): until then the weights jump. Sums are formed in the log domain, in
    float64.

    The epoch's mean loss and accuracy count those left out as they were at the last
    examination. A random start is drawn for the examples that are kept. An epoch works on a copy
    of these.

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
        slack: float = 1.0,
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
        self._fitted = False

    def check(self, trainer: Trainer) -> None:
        """Refuse a training that cannot be shrunk, before step 0.

        Args:
            trainer: the training.

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
        if not independent(trainer.model, trainer.data.x[:_TRIED]):
            raise InputError(
                "shrink: expected a model whose output for an example does not depend on the rest of "
                "its batch, nor on chance (batch normalisation, dropout); use shrink=False"
            )

    def begin_epoch(self, trainer: Trainer) -> None:
        """Examine if it is time; while all are kept, only after an epoch that fitted all.

        Args:
            trainer: the training.
        """
        if trainer.epoch >= self.next and (self.left_out or self._fitted):
            self.examine(trainer)

    def end_epoch(self, trainer: Trainer) -> None:
        """Have an examination at once if the loss jumped.

        Args:
            trainer: the training.
        """
        if self.left_out and trainer.epoch_loss > 2 * self._last_loss:
            self.next = trainer.epoch
        self._last_loss = trainer.epoch_loss
        self._fitted = trainer.epoch_accuracy == 1

    @property
    def left_out(self) -> int:
        """How many examples are left out at present."""
        return 0 if self.kept is None else int((~self.kept).sum())

    def parts(self, data: Dataset, order: Tensor | None, batch_size: int) -> list[Part] | None:
        """What is left of each batch of an epoch; None where everybody is kept.

        Those kept are copied here once: a copy in each step would take a good part of its time.

        Args:
            data: the training examples.
            order: of the epoch, (n,); None is that of the data.
            batch_size: of all batches but the last.
        """
        if not self.left_out or self.kept is None:
            return None
        n = data.n
        if order is None:
            order = torch.arange(n, device=self.kept.device)
        batches = -(-n // batch_size)
        stays = self.kept[order]
        absent = torch.where(stays, 0.0, self._losses[order])

        def by_batch(values: Tensor) -> list[float]:
            padded = nn.functional.pad(values, (0, batches * batch_size - n))
            sums: list[float] = padded.view(batches, batch_size).sum(dim=1).tolist()
            return sums

        counts = [int(count) for count in by_batch(stays.double())]
        sizes = [min(batch_size, n - b * batch_size) for b in range(batches)]
        rows = order[stays]
        xs, ys = torch.split(data.x[rows], counts), torch.split(data.y[rows], counts)
        return [Part(*of) for of in zip(xs, ys, sizes, by_batch(absent), strict=True)]

    def examine(self, trainer: Trainer) -> None:
        """Take all scores, check the bounds, and choose anew whom to leave out.

        Args:
            trainer: the training.
        """
        scores, bounds = self._weigh(trainer)
        self.examinations += 1
        if not all(bool(torch.isfinite(logs.logsumexp(0))) for logs, _ in bounds):
            self.kept, self.next = None, trainer.epoch + 1  # the next step says what diverged
            return
        excess = self.log_share = -math.inf
        if self.left_out and self.kept is not None:
            sums = [float(logs[~self.kept].logsumexp(0)) for logs, _ in bounds]
            self.log_share = sums[0]
            excess = max(found - limit for found, (_, limit) in zip(sums, bounds, strict=True))
        if excess > 0:
            self.violations += 1
            self._slack += max(1.0, excess)
        else:
            self._slack = max(self.slack, self._slack - 0.25)
        lightest = torch.argsort(bounds[0][0])
        out = torch.ones_like(scores, dtype=torch.bool)
        for logs, limit in bounds:
            out[lightest] &= torch.logcumsumexp(logs[lightest], 0) <= limit - self._slack
        if not bool((scores > 0).all()) or int(out.sum()) < self.least * out.numel():
            out[:] = False
        self.kept = ~out
        self._losses = trainer.engine.loss.values(scores)
        longest = self.longest
        if self.left_out:
            longest = max(1, min(longest, trainer.epoch // 8))
        self.interval = 1 if excess > 0 else min(2 * self.interval, longest)
        self.next = trainer.epoch + self.interval

    def record(self) -> dict[str, float]:
        """For a measurement: who is in, and how the last examinations went.

        Counts, and the bounded sum over those left out, ≥ 0.
        """
        return {
            "left_out_examples": self.left_out,
            "left_out_weight": math.exp(self.log_share),
            "shrink_examinations": self.examinations,
            "shrink_violations": self.violations,
        }

    def state(self) -> dict[str, Tensor]:
        """All that changes, for a checkpoint.

        Returns:
            by name, (n,) or a scalar.
        """
        numbers = [
            *(self.interval, self.next, self.violations, self.examinations),
            *(self._slack, self.log_share, self._last_loss, self._fitted),
        ]
        state = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        if self.kept is not None:
            state |= {"kept": self.kept, "losses": self._losses}
        return state

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what :meth:`state` gave, with the data on ``device``.

        Args:
            state: what :meth:`state` gave, of the same shapes.
            device: where the data are.
        """
        numbers = state["numbers"].tolist()
        self.interval, self.next, self.violations, self.examinations = map(int, numbers[:4])
        self._slack, self.log_share, self._last_loss = numbers[4:7]
        self._fitted = bool(numbers[7])
        self.kept = None
        if "kept" in state:
            self.kept, self._losses = state["kept"].to(device), state["losses"].to(device)

    def _weigh(self, trainer: Trainer) -> tuple[Tensor, list[tuple[Tensor, float]]]:
        """All scores at perturbed inputs; of each bound, ln of every example's term and of the limit."""
        data, generator = trainer.data, trainer.examination_generator()
        moving = trainer.rate.known and trainer.momentum == 0
        scores, reaches = [], []
        for x, y in zip(torch.split(data.x, _CHUNK), torch.split(data.y, _CHUNK), strict=True):
            z, reach = trainer.engine.reach(x, y, generator)
            scores.append(z.double())
            if reach is not None:
                reaches.append(reach.double())
        z = torch.cat(scores)
        log_theta = math.log(self.theta or torch.finfo(data.x.dtype).eps / 2)
        log_slopes = trainer.engine.loss.log_slopes(z)
        shares = log_slopes - log_slopes.logsumexp(0)
        if not moving or not reaches:
            return z, [(shares, log_theta)]
        step = math.log(trainer.rate.rate(trainer) / trainer.batch_size)
        movements = log_slopes + torch.cat(reaches).log() + step
        return z, [(movements, log_theta), (shares, math.log(_SHARE))]
