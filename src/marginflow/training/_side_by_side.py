"""Several seeds of one training at once: their trainers in step, their products batched.

Source: marginflow.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from marginflow._memory import memory_watched
from marginflow.engine import FusedEngine, LossGradient, StackedEngine, StackPlace, stacking_refusal
from marginflow.errors import DivergedError, InputError
from marginflow.training._callback import Callback
from marginflow.training._rates import Constant
from marginflow.training._trainer import Trainer, deferred_interrupt

_EVENTS = ("on_start", "on_step", "on_epoch", "on_interrupt", "on_end")


class SideBySide:
    """Trains the networks of several trainers that differ in seed alone, a step of each at a time.

    Each trainer keeps its own batch order, random starts, callbacks and checkpoints: its path is
    that of :meth:`Trainer.run` but for the rounding of the products, and it can go on alone
    from any of its states. A trainer that diverges drops out, and the others go on. The global
    random state takes no part: dense networks draw nothing from it.

    Args:
        trainers: at one step, alike but for seed and weights, and with the same data.
        watchers: told of every event, with the first of the trainers that are still going.

    Raises:
        InputError: trainers that :func:`side_by_side_refusal` refuses, or at different steps.

    Attributes:
        diverged: what stopped a trainer, by its place among ``trainers``.
    """

    def __init__(self, trainers: Sequence[Trainer], watchers: Sequence[Callback] = ()) -> None:
        for trainer in trainers:
            reason = side_by_side_refusal(trainer)
            if reason is not None:
                raise InputError(f"side by side: {reason}")
        if len({(t.step, t.batch, t.batch_size, t.epochs, t.momentum) for t in trainers}) != 1:
            raise InputError("side by side: expected trainers at one step, alike but for the seed")
        self.trainers = tuple(trainers)
        self.watchers = tuple(watchers)
        self.diverged: dict[int, DivergedError] = {}
        self._going = list(range(len(trainers)))
        data = trainers[0].data
        self._x = data.x
        # Slopes are multiplied by labels −1 and +1: numbers of the network's type once and for all.
        binary = trainers[0].engine.parameters[-1].shape[0] == 1
        self._y = data.y.to(data.x.dtype) if binary else data.y
        self._parts: list[Tensor] = []
        self._velocity: tuple[Tensor, ...] = ()

    def run(self) -> None:
        """Train up to the trainers' ``epochs``; those that did not get there are in :attr:`diverged`.

        Raises:
            OutOfMemoryError: with the batch size to try.
            KeyboardInterrupt: after Ctrl-C, at the end of a step and after the callbacks of
                every trainer have been told.
        """
        lead = self.trainers[0]
        devices = [self._x.device] if self._x.is_cuda else []
        with torch.random.fork_rng(devices=devices), deferred_interrupt() as interrupted:
            # Not the lead's: after a crash another may lead, and checkpoints keep this state.
            torch.manual_seed(0)
            lead.engine.check(lead.data.x, lead.data.y)
            self._stack()
            try:
                self._tell("on_start")
                with memory_watched("training", lead.batch_size):
                    while self._going and self._active[0].epoch < lead.epochs:
                        self._run_epoch(interrupted)
                self._check_weights()
                self._tell("on_end")
            finally:
                self._unstack()

    def _stack(self) -> None:
        """Put together what the trainers that are still going have in common."""
        self._active = [self.trainers[place] for place in self._going]
        self._calls: dict[str, list[tuple[Callable[[Trainer], None], Trainer]]] = {}
        for event in _EVENTS:
            heard = [(c, t) for t in self._active for c in t.callbacks]
            heard += [(c, self._active[0]) for c in self.watchers if self._active]
            self._calls[event] = [
                (getattr(c, event), t)
                for c, t in heard
                # Most hear of few events, and a step is short.
                if getattr(type(c), event) is not getattr(Callback, event)
            ]
        if not self._active:
            return
        self._engine = StackedEngine(
            [t.engine for t in self._active if isinstance(t.engine, FusedEngine)]
        )
        for index, trainer in enumerate(self._active):
            trainer.stand = StackPlace(self._engine, index)
        if self._active[0].steps_per_epoch == 1:
            x, y = ([v] * len(self._active) for v in (self._x, self._y))
            self._full = torch.stack(x), torch.stack(y)
        kept = [_velocity(trainer) for trainer in self._active]
        self._velocity = tuple(torch.stack(same) for same in zip(*kept, strict=True))
        self._share_velocity()

    def _unstack(self) -> None:
        """Give each network, and what its momentum keeps, memory of its own."""
        for trainer in self.trainers:
            trainer.stand = None
            if isinstance(trainer.engine, FusedEngine):
                trainer.engine.network.release()
            trainer.velocities[:] = [None if v is None else v.clone() for v in trainer.velocities]

    def _run_epoch(self, interrupted: threading.Event) -> None:
        lead = self._active[0]
        if lead.steps_per_epoch > 1:
            orders = [t.order() for t in self._active]
            index = torch.stack([order for order in orders if order is not None])
            size = lead.batch_size
            self._parts = [index[:, i : i + size] for i in range(0, index.shape[1], size)]
        for batch in range(lead.batch, lead.steps_per_epoch):
            self._take_step(batch)
            if not self._going:
                return
            if batch + 1 < lead.steps_per_epoch:
                self._tell("on_step")
                self._stop_if(interrupted)
        for trainer in self._active:
            trainer.average()
            trainer.turn_over()
        self._tell("on_step")
        self._tell("on_epoch")
        if self._going and self._active[0].epoch < lead.epochs:
            self._stop_if(interrupted)

    def _take_step(self, batch: int) -> None:
        """One update of each network whose loss is finite; the others drop out."""
        while self._going:
            x, y = self._examples(batch)
            sources = [g for t in self._active if (g := t.generator()) is not None]
            result = self._engine.look(x, y, sources or None)
            losses = result.loss.tolist()
            broken = [s for s, loss in enumerate(losses) if not math.isfinite(loss)]
            if not broken:
                break
            self._drop({s: self._divergence(s, batch, result) for s in broken})
        if not self._going:
            return
        lead = self._active[0]
        rate = lead.next_rate()
        if lead.momentum:
            if not self._velocity:
                self._velocity = self._engine.still()
                self._share_velocity()
            self._engine.move(self._velocity, lead.momentum, rate)
        else:
            self._engine.descend(rate)
        correct = (result.margins > 0).sum(-1).tolist()
        log_time = float(np.logaddexp(lead.log_time, math.log(rate)))
        for s, trainer in enumerate(self._active):
            trainer.learning_rate = rate
            trainer.note(losses[s], log_time, y.shape[1], correct[s])

    def _examples(self, batch: int) -> tuple[Tensor, Tensor]:
        """The batch of each seed, (S, n, …) and (S, n)."""
        if self._active[0].steps_per_epoch == 1:
            return self._full
        index = self._parts[batch]
        chosen = index.reshape(-1)
        x = self._x.index_select(0, chosen).view(*index.shape, *self._x.shape[1:])
        return x, self._y.index_select(0, chosen).view(index.shape)

    def _divergence(self, s: int, batch: int, result: LossGradient) -> DivergedError:
        """Why the network at place ``s`` cannot take the step."""
        trainer = self._active[s]
        trainer.learning_rate = trainer.rate.rate(trainer)
        rows = None if trainer.steps_per_epoch == 1 else self._parts[batch][s]
        found = LossGradient(result.loss[s], (), result.margins[s], result.outputs[s])
        return trainer.divergence(found, rows)

    def _drop(self, broken: Mapping[int, DivergedError]) -> None:
        for s, error in broken.items():
            self.diverged[self._going[s]] = error
        stay = [s for s in range(len(self._going)) if s not in broken]
        self._unstack()
        self._going = [self._going[s] for s in stay]
        self._parts = [part[stay] for part in self._parts]
        self._stack()

    def _share_velocity(self) -> None:
        if self._velocity:
            for s, trainer in enumerate(self._active):
                trainer.velocities[:] = [v[s] for v in self._velocity]

    def _tell(self, event: str) -> None:
        """Tell the callbacks; a network whose weights one of them finds spoilt drops out."""
        broken: dict[int, DivergedError] = {}
        place = {id(trainer): s for s, trainer in enumerate(self._active)}
        for call, trainer in self._calls[event]:
            if place[id(trainer)] in broken:
                continue
            try:
                call(trainer)
            except DivergedError as error:
                broken[place[id(trainer)]] = error
        if broken:
            self._drop(broken)

    def _check_weights(self) -> None:
        """Drop the networks that the last step has spoilt."""
        broken: dict[int, DivergedError] = {}
        for s, trainer in enumerate(self._active):
            try:
                trainer.check_weights()
            except DivergedError as error:
                broken[s] = error
        if broken:
            self._drop(broken)

    def _stop_if(self, interrupted: threading.Event) -> None:
        if interrupted.is_set() or any(trainer.stopping for trainer in self._active):
            self._tell("on_interrupt")
            raise KeyboardInterrupt


def side_by_side_refusal(trainer: Trainer) -> str | None:
    """Why trainings such as this one cannot run side by side, or None if they can.

    Args:
        trainer: one of them.
    """
    if not isinstance(trainer.rate, Constant):
        return f"the learning rate {trainer.rate.name} follows one network at a time"
    if trainer.shrinking is not None:
        return "each network leaves other examples out"
    return stacking_refusal(trainer.engine)


def _velocity(trainer: Trainer) -> list[Tensor]:
    """What momentum keeps; nothing before the first step and without momentum."""
    return [v for v in trainer.velocities if v is not None]
