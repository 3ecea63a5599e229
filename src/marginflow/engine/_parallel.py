"""The loss gradient of a batch whose examples are divided among the processes of a job."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from marginflow.attacks import PGD, Attack
from marginflow.distributed import RowsGenerator, Team
from marginflow.engine._base import Engine, LossGradient
from marginflow.engine._captured import CapturedStep
from marginflow.engine._fused import FusedEngine
from marginflow.errors import InputError

_TRIED = 8


class ParallelEngine(Engine):
    """``G = ∇_W (1/n) Σ ℓ(z_i)`` of the whole batch, each process at its own rows of it.

    Each forms the gradient of its examples with the n of the batch, and these are added up in one message,
    with the margins and outputs beside them, so that every process takes the same step. For ``ln L`` each
    weighs its gradient by its share in the global sum, ``exp(ln Σ_own ℓ_i − ln Σ ℓ_i)``, formed
    in the log domain. The sums depend on the number of processes by their rounding only.

    Args:
        own: the engine of this process, on the same model in all processes.
        team: the processes.
    """

    name: ClassVar[str] = "parallel"

    def __init__(self, own: Engine, team: Team) -> None:
        super().__init__(own.model, own.loss, own.attack, own.derivative)
        self.own = own
        self.team = team

    @property
    def settings(self) -> dict[str, str]:
        """Those of the engine of each process."""
        return self.own.settings

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse what cannot be divided, and a data set as the process's own engine does.

        Raises:
            InputError: an example's output hangs on the others in its batch, or on chance; an attack
                that draws random numbers of its own.
        """
        check_divisible(self.attack)
        if not independent(self.model, x[:_TRIED]):
            raise InputError(
                "several processes: expected a model whose output for an example does not depend on the "
                "rest of its batch, nor on chance (batch normalisation, dropout); train in one process"
            )
        self.own.check(x, y)

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
        """The gradient on the batch (x, y); arguments as for :meth:`Engine.__call__`.

        Raises:
            ProcessLostError: another process is gone.
        """
        team, n = self.team, len(y)
        rows = team.rows(n)
        count = n if count is None else count
        found = self.own(
            x[rows], y[rows], rows_of(generator, self.team, n), log_reference, count, of_log=of_log
        )
        loss, gradients, logs = found.loss, found.gradients, None
        if of_log:
            # ln of the sum of one's own losses, and the share of that in the sum of all.
            own = loss + math.log(rows.stop - rows.start)
            logs = team.each(own if team.counts(n) else torch.full_like(own, -math.inf))
            share = torch.exp(logs[team.rank] - torch.logsumexp(logs, 0))
            gradients = tuple(share * g for g in gradients)
        margins = loss.new_zeros(n)
        outputs = loss.new_zeros((n, *found.outputs.shape[1:]))
        margins[rows], outputs[rows] = found.margins.to(loss), found.outputs.to(loss)
        parts = [loss, margins, outputs, *gradients]
        if not team.counts(n):
            parts = [torch.zeros_like(part) for part in parts]
        loss, margins, outputs, *summed = team.total(parts)
        if logs is not None:
            loss = torch.logsumexp(logs, 0) - math.log(n)
        return LossGradient(loss, tuple(summed), margins, outputs)

    def scores(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The scores z_i at the perturbed inputs, (n,), without gradients.

        Raises:
            ProcessLostError: another process is gone.
        """
        rows, n = self.team.rows(len(y)), len(y)
        return self.team.gather(
            self.own.scores(x[rows], y[rows], rows_of(generator, self.team, n)), n
        )

    def reach(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and how far each can move the weights; see :meth:`Engine.reach`.

        Raises:
            ProcessLostError: another process is gone.
        """
        rows, n = self.team.rows(len(y)), len(y)
        scores, reach = self.own.reach(x[rows], y[rows], rows_of(generator, self.team, n))
        scores = self.team.gather(scores, n)
        return scores, None if reach is None else self.team.gather(reach, n)


class ParallelFusedEngine(FusedEngine):
    """The step of :class:`FusedEngine`, with the perturbation and the forward pass divided.

    What the processes exchange are the perturbed inputs and the hidden layers of their examples, and each
    takes the rest of the step, backward pass and update, for all of the batch, as one process does. So
    the bits are those of one process wherever the library's product with some columns has the bits of that
    with all of them, which PyTorch's have as a rule. (Trajectories of networks with kinks, and of
    attacks by signs, double a difference in every few steps: agreement to a rounding would not last.)
    These factors are a smaller message than the gradient where a batch is small. Where it is not, see
    :func:`divided`, the gradients are added up.

    Args:
        own: the engine of one process.
        team: the processes.
    """

    def __init__(self, own: FusedEngine, team: Team, shape: Sequence[int]) -> None:
        super().__init__(
            own.model,
            own.loss,
            own.attack,
            own.derivative,
            shape=shape,
            products=own.products,
            perturbation_precision=own.perturbation_precision,
        )
        self.team = team

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse an attack that cannot be divided, and what one process refuses.

        Raises:
            InputError: an attack that draws random numbers of its own.
        """
        check_divisible(self.attack)
        super().check(x, y)

    def scores(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The scores z_i at the perturbed inputs, (n,), without gradients.

        Raises:
            ProcessLostError: another process is gone.
        """
        rows, n = self.team.rows(len(y)), len(y)
        source = rows_of(generator, self.team, n)
        return self.team.gather(super().scores(x[rows], y[rows], source), n)

    def reach(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and how far each can move the weights; see :meth:`Engine.reach`.

        Raises:
            ProcessLostError: another process is gone.
        """
        rows, n = self.team.rows(len(y)), len(y)
        scores, reach = super().reach(x[rows], y[rows], rows_of(generator, self.team, n))
        scores = self.team.gather(scores, n)
        return scores, None if reach is None else self.team.gather(reach, n)

    def _forward(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        team, n = self.team, len(y)
        rows = team.rows(n)
        own = self._perturbed(x[rows], y[rows], rows_of(generator, team, n))
        self.network.forward(own)
        parts = [own, *self.network.kept(own)]
        asked = own.new_full((1, own.shape[1]), float(team.asked))
        found = team.gather(torch.cat([*parts, asked]).mT, n).mT
        team.agreed |= bool((found[-1] > 0).any())
        z, *kept = torch.split(found[:-1], [len(part) for part in parts])
        z = self.network.columns(z.mT)
        return z, self.network.resumed(z, kept).mT

    def _captured_step(
        self, x: Tensor, y: Tensor, rate: float, count: int | None
    ) -> tuple[FusedEngine, CapturedStep] | None:
        return None  # no messages in a CUDA graph


def divided(own: Engine, team: Team, shape: Sequence[int], batch_size: int) -> Engine:
    """The engine of several processes, of which ``own`` is that of each.

    Args:
        own: the engine of one process.
        team: the processes.
        shape: the shape of an example.
        batch_size: examples in a batch, of all processes.
    """
    if isinstance(own, FusedEngine):
        factors = batch_size * sum(w.shape[1] for w in own.network.weights)
        if factors <= sum(w.numel() for w in own.network.weights):
            return ParallelFusedEngine(own, team, shape)
    return ParallelEngine(own, team)


def rows_of(generator: torch.Generator | None, team: Team, n: int) -> RowsGenerator | None:
    """The draws of the own rows, as one process draws them for the batch."""
    return None if generator is None else RowsGenerator.of(generator, team.rows(n), n)


def check_divisible(attack: Attack | None) -> None:
    """Refuse an attack whose draws cannot be divided among processes.

    Raises:
        InputError: random numbers that are not drawn example by example from the given generator.
    """
    if attack is not None and attack.random and type(attack) is not PGD:
        raise InputError(
            f"several processes: the attack {attack.name} draws random numbers of its own, which would be "
            "others in each process; use PGD, an attack without a random start, or one process"
        )


def independent(model: nn.Module, x: Tensor) -> bool:
    """Whether the outputs at x are the same, to rounding, when a part of the batch is missing."""
    model = copy.deepcopy(model).train()
    part = x[: max(2, len(x) // 2)]
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        whole_batch, alone = model(x)[: len(part)], model(part)
    scale = float(whole_batch.abs().max())
    return bool((whole_batch - alone).abs().max() <= 1e-4 * scale)
