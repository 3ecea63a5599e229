"""The loss gradient of a batch whose examples are divided among the processes of a job."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from marginflow.attacks import PGD, Attack
from marginflow.distributed import RowsGenerator, Team
from marginflow.engine._base import Engine, LossGradient
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
            x[rows], y[rows], self._source(generator, n), log_reference, count, of_log=of_log
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
        return self.team.gather(self.own.scores(x[rows], y[rows], self._source(generator, n)), n)

    def reach(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and how far each can move the weights; see :meth:`Engine.reach`.

        Raises:
            ProcessLostError: another process is gone.
        """
        rows, n = self.team.rows(len(y)), len(y)
        scores, reach = self.own.reach(x[rows], y[rows], self._source(generator, n))
        scores = self.team.gather(scores, n)
        return scores, None if reach is None else self.team.gather(reach, n)

    def _source(self, generator: torch.Generator | None, n: int) -> torch.Generator | None:
        """The draws of the own rows, as one process draws them for the batch."""
        if generator is None:
            return None
        return RowsGenerator.of(generator, self.team.rows(n), n)


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
