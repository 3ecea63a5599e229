"""The loss gradient of a batch whose examples are divided among the processes of a job.

Source: the gradient of Algorithm 1, summed over processes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from marginflow.attacks import PGD, Attack, Derivative
from marginflow.distributed import RowsGenerator, Team
from marginflow.engine._autograd import AutogradEngine
from marginflow.engine._base import Engine, LossGradient
from marginflow.engine._captured import CapturedStep
from marginflow.engine._fused import FusedEngine
from marginflow.errors import InputError

_TRIED = 8


class ParallelEngine(Engine):
    """``G = ∇_W (1/n) Σ ℓ(z_i)`` of the whole batch, each process at its own rows of it.

    A batch is cut into shards, as even as can be. Each process forms the gradients of its shards with the
    n of the batch, and these are added up, so that every process takes the same step. For
    ``ln L`` each shard's gradient is weighed by its share in the whole sum,
    ``exp(ln Σ_shard ℓ_i − ln Σ ℓ_i)``, formed in the log domain.

    There are as many shards as processes unless their number is given. Given shards are added in the
    order of a fixed tree: the bits of a training then depend on their number, and not on how many processes
    share them, one included.

    Args:
        own: the engine of this process, on the same model in all processes.
        team: the processes; None for one.
        shards: a power of two that the number of processes divides.

    Raises:
        InputError: another number of shards.
    """

    name: ClassVar[str] = "parallel"

    def __init__(self, own: Engine, team: Team | None, shards: int | None = None) -> None:
        super().__init__(own.model, own.loss, own.attack, own.derivative)
        self.own = own
        self.team = team
        self.shards = shards
        size = 1 if team is None else team.size
        if shards is not None and (shards & (shards - 1) or shards % size):
            raise InputError(
                "shards: expected a power of two that the number of processes divides, got "
                f"{shards} for {size} process{'es' if size > 1 else ''}"
            )
        self._count = size if shards is None else shards
        self._rank, self._size = (0, 1) if team is None else (team.rank, team.size)

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
                "shards of a batch: expected a model whose output for an example does not depend on the "
                "rest of its batch, nor on chance (batch normalisation, dropout); train with an attack, in "
                "one process, or without shards"
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
        n = len(y)
        shards, counts = self._shards(n)
        found = []
        for rows in shards:
            source = None if generator is None else RowsGenerator.of(generator, rows, n)
            one = self.own(x[rows], y[rows], source, log_reference, count or n, of_log=of_log)
            # The next shard overwrites the outputs.
            found.append(replace(one, outputs=one.outputs.clone()))
        gradients = [f.gradients for f in found]
        losses = torch.stack([f.loss for f in found])
        if of_log:
            # ln of each shard's sum of losses, and its share in the sum of all.
            sizes = losses.new_tensor([rows.stop - rows.start for rows in shards])
            own = losses + sizes.log()
            logs = self._each(own if counts else torch.full_like(own, -math.inf))
            whole = torch.logsumexp(logs, 0)
            gradients = [
                tuple(share * g for g in gs)
                for share, gs in zip(torch.exp(own - whole), gradients, strict=True)
            ]
        else:
            logs = whole = losses
        first = found[0]
        margins = losses.new_zeros(n)
        outputs = losses.new_zeros((n, *first.outputs.shape[1:]))
        for rows, one in zip(shards, found, strict=True):
            margins[rows], outputs[rows] = one.margins.to(losses), one.outputs.to(losses)
        added = [_added(list(column)) for column in zip(*gradients, strict=True)]
        parts = [_added(list(losses)), margins, outputs, *added]
        if not counts:
            parts = [torch.zeros_like(part) for part in parts]
        loss, margins, outputs, *summed = self._total(parts)
        return LossGradient(
            whole - math.log(n) if of_log else loss, tuple(summed), margins, outputs
        )

    def scores(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The scores z_i at the perturbed inputs, (n,), without gradients.

        Raises:
            ProcessLostError: another process is gone.
        """
        if self.team is None:
            return self.own.scores(x, y, generator)
        rows, n = self.team.rows(len(y)), len(y)
        with divided_draws(generator, self.team, n) as source:
            scores = self.own.scores(x[rows], y[rows], source)
        return self.team.gather(scores, n)

    def reach(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and how far each can move the weights; see :meth:`Engine.reach`.

        Returns:
            both (n,).

        Raises:
            ProcessLostError: another process is gone.
        """
        if self.team is None:
            return self.own.reach(x, y, generator)
        rows, n = self.team.rows(len(y)), len(y)
        with divided_draws(generator, self.team, n) as source:
            scores, reach = self.own.reach(x[rows], y[rows], source)
        scores = self.team.gather(scores, n)
        return scores, None if reach is None else self.team.gather(reach, n)

    def _shards(self, n: int) -> tuple[list[slice], bool]:
        """The rows of this process's shards, and whether they enter the sum: a tiny batch is one shard."""
        if n < self._count:
            return [slice(0, n)], self._rank == 0
        each = self._count // self._size
        bounds = [n * s // self._count for s in range(self._count + 1)]
        mine = range(each * self._rank, each * (self._rank + 1))
        return [slice(bounds[s], bounds[s + 1]) for s in mine], True

    def _each(self, values: Tensor) -> Tensor:
        """A number of every shard, from those of one's own."""
        return values if self.team is None else self.team.each(values).flatten()

    def _total(self, parts: list[Tensor]) -> list[Tensor]:
        """The sums over processes."""
        if self.team is None:
            return parts
        if self.shards is None:
            return self.team.total(parts)
        # In the order of the tree, whose lower part was added up here.
        asked = parts[0].new_tensor([float(self.team.asked)])
        flat = torch.cat([asked, *(part.reshape(-1) for part in parts)])
        whole = _added(list(self.team.each(flat)))
        self.team.agreed |= bool(whole[0] > 0)
        split = torch.split(whole[1:], [part.numel() for part in parts])
        return [one.view(part.shape) for one, part in zip(split, parts, strict=True)]


class ParallelAutogradEngine(AutogradEngine):
    """The step of :class:`AutogradEngine` for any model, with the perturbation divided.

    Each process perturbs its rows of the batch; the perturbed inputs are exchanged, and every
    process takes the step from there, as one process does and with its bits (where those of x + δ do not
    hang on the rest of the batch, which of signs they hardly do). So the part of the work that is divided is
    the attack's, 2 of 5 passes with FGSM and 10 of 13 with five steps of PGD; with ``shards`` it is all.

    Args:
        own: the engine of one process.
        team: the processes.
    """

    def __init__(self, own: AutogradEngine, team: Team) -> None:
        super().__init__(own.model, own.loss, own.attack, own.derivative)
        self.team = team

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse an attack that cannot be divided.

        Raises:
            InputError: an attack that draws random numbers of its own.
        """
        check_divisible(self.attack)
        super().check(x, y)

    def _perturbed(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None, derivative: Derivative
    ) -> Tensor:
        rows, n = self.team.rows(len(y)), len(y)
        with divided_draws(generator, self.team, n) as source:
            own = super()._perturbed(x[rows], y[rows], source, derivative)
        return self.team.gather_and_ask(own.flatten(1), n).view(x.shape)


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
        with divided_draws(generator, self.team, n) as source:
            scores = super().scores(x[rows], y[rows], source)
        return self.team.gather(scores, n)

    def reach(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and how far each can move the weights; see :meth:`Engine.reach`.

        Raises:
            ProcessLostError: another process is gone.
        """
        rows, n = self.team.rows(len(y)), len(y)
        with divided_draws(generator, self.team, n) as source:
            scores, reach = super().reach(x[rows], y[rows], source)
        scores = self.team.gather(scores, n)
        return scores, None if reach is None else self.team.gather(reach, n)

    def _forward(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        team, n = self.team, len(y)
        rows = team.rows(n)
        with divided_draws(generator, team, n) as source:
            own = self._perturbed(x[rows], y[rows], source)
        self.network.forward(own)
        parts = [own, *self.network.kept(own)]
        found = team.gather_and_ask(torch.cat(parts).mT, n).mT
        z, *kept = torch.split(found, [len(part) for part in parts])
        z = self.network.columns(z.mT)
        return z, self.network.resumed(z, kept).mT

    def _captured_step(
        self, x: Tensor, y: Tensor, rate: float, count: int | None
    ) -> tuple[FusedEngine, CapturedStep] | None:
        return None  # no messages in a CUDA graph


def divided(
    own: Engine,
    team: Team | None,
    shape: Sequence[int],
    batch_size: int,
    shards: int | None = None,
) -> Engine:
    """The engine of several processes, of which ``own`` is that of each.

    Args:
        own: the engine of one process.
        team: the processes; None for one.
        shape: the shape of an example.
        batch_size: examples in a batch, of all processes.
        shards: see :class:`ParallelEngine`.
    """
    if shards is not None:
        return ParallelEngine(own, team, shards)
    if team is None:
        return own
    if isinstance(own, FusedEngine):
        factors = batch_size * sum(w.shape[1] for w in own.network.weights)
        if factors <= sum(w.numel() for w in own.network.weights):
            return ParallelFusedEngine(own, team, shape)
    elif isinstance(own, AutogradEngine) and own.attack and own.derivative == "detached":
        return ParallelAutogradEngine(own, team)
    return ParallelEngine(own, team)


def _added(terms: list[Tensor]) -> Tensor:
    """Their sum, neighbours first: in the same order wherever the tree is cut."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


@contextlib.contextmanager
def divided_draws(
    generator: torch.Generator | None, team: Team, n: int
) -> Iterator[RowsGenerator | None]:
    """The draws of the own rows, as one process draws them for the batch.

    Afterwards ``generator`` has drawn for the whole batch, and serves the next one.
    """
    source = None if generator is None else RowsGenerator.of(generator, team.rows(n), n)
    yield source
    if generator is not None and source is not None:
        generator.set_state(source.get_state())


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
    """Whether the outputs at x are the same, to rounding, when a part of the batch is missing.

    Args:
        model: the network; a copy is evaluated.
        x: some inputs, (n, …).
    """
    model = copy.deepcopy(model).train()
    part = x[: max(2, len(x) // 2)]
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        whole_batch, alone = model(x)[: len(part)], model(part)
    scale = float(whole_batch.abs().max())
    return bool((whole_batch - alone).abs().max() <= 1e-4 * scale)
