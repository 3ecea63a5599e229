"""Algorithm 1 of the paper: perturb the batch at the current weights, step down the loss there."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from marginflow._checks import real, whole
from marginflow._finite import broken_examples, spoilt
from marginflow._memory import memory_watched
from marginflow.datasets import Dataset
from marginflow.distributed import current
from marginflow.engine import Engine, LossGradient, StackPlace
from marginflow.errors import DivergedError, InputError, ModelError, RunError
from marginflow.models import load_weights
from marginflow.training._callback import Callback
from marginflow.training._rates import Rate, build_rate
from marginflow.training._shrinking import Part, Shrinking

_Stream = Literal["order", "attack", "global", "examination", "hard"]
_STREAMS: dict[_Stream, int] = {"order": 0, "attack": 1, "global": 2, "examination": 3, "hard": 4}


@dataclass(frozen=True, eq=False)
class TrainingState:
    """All that the rest of a training depends on, taken between two steps.

    Attributes:
        tensors: weights (``model.…``), momentum (``momentum.…``), what callbacks keep, who is left
            out (``shrinking.…``), the clock and the random state; each of its own shape, so of any
            shape.
        epoch: completed epochs.
        step: completed steps (mini-batch updates).
        batch: completed batches of the running epoch.
        loss_sum, correct: running sums of the epoch, over examples.
        rate: the changing numbers of the learning rate, such as its η.
    """

    tensors: dict[str, Tensor]
    epoch: int
    step: int
    batch: int
    loss_sum: float
    correct: int
    rate: dict[str, float]


class Trainer:
    """Gradient descent or SGD, at a constant rate unless told otherwise, on the adversarial loss.

    Every random choice is a function of the seed and of the epoch or step that needs it,
    so a training resumed from a :class:`TrainingState` repeats the very bits.

    Args:
        engine: computes the loss gradient; holds model, loss, attack, derivative.
        data: training examples, of the model's dtype and device.
        lr: learning rate η > 0, its specification, or a :class:`Rate`.
        batch_size: examples per step; None takes the whole data set (gradient descent).
        epochs: the epoch after which training ends.
        momentum: heavy-ball momentum in [0, 1) as in torch.optim.SGD; 0 is Algorithm 1.
        seed: seed of the batch order and of random starts.
        callbacks: told of each step and epoch, in this order.
        shrinking: leaves examples of no weight out of the epochs; None trains on all.

    Attributes:
        rate: the learning rate, with its changing numbers.
        epoch: completed epochs.
        step: completed updates.

    Raises:
        InputError: a number out of range; a training that cannot be shrunk.
    """

    def __init__(
        self,
        engine: Engine,
        data: Dataset,
        *,
        lr: float | str | Rate,
        batch_size: int | None,
        epochs: int,
        momentum: float = 0.0,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        shrinking: Shrinking | None = None,
    ) -> None:
        self.engine = engine
        self.data = data
        self.rate = build_rate(lr)
        self.learning_rate = math.nan
        """η of the last step."""
        self._gradients: tuple[Tensor, ...] | None = ()
        self._squares: list[float] | None = None
        self.stand: StackPlace | None = None
        """Where the steps are taken, if they are those of several networks at once."""
        self.step_loss = math.nan
        """L of the last step's batch, before the step."""
        self.log_time = -math.inf
        """``ln t`` with t = Σ η, the time of the gradient flow that the steps follow."""
        self.batch_size = (
            data.n if batch_size is None else min(whole("batch_size", batch_size, least=1), data.n)
        )
        self.epochs = whole("epochs", epochs, least=0)
        self.momentum = real("momentum", momentum, least=0.0)
        if self.momentum >= 1:
            raise InputError(f"momentum: expected a number below 1, got {momentum!r}")
        self.seed = whole("seed", seed, least=0)
        self.callbacks = tuple(callbacks)
        self.velocities: list[Tensor | None] = [None] * len(engine.parameters)
        """What momentum keeps, one per trainable parameter; None before the first step."""
        self.epoch = self.step = self._batch = 0
        self._loss_sum = 0.0
        self._correct = 0
        self.epoch_loss = math.nan
        """Mean training loss over the last completed epoch, at the weights of each step."""
        self.epoch_accuracy = math.nan
        """Share of training examples with a positive adversarial margin in the last epoch."""
        self.stopping = False
        """Whether :meth:`stop` was called."""
        self._global_state: Tensor | None = None
        self._undo: dict[str, Tensor] = {}
        self._undo_time = -math.inf
        self._zeros: tuple[Tensor, ...] = ()
        self.shrinking = shrinking
        self.rate.check(self)
        if shrinking is not None:
            shrinking.check(self)

    @property
    def model(self) -> nn.Module:
        """The network in training."""
        return self.engine.model

    @property
    def steps_per_epoch(self) -> int:
        """Number of updates in an epoch; the last batch may be smaller."""
        return -(-self.data.n // self.batch_size)

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        """What η multiplied in the last step, one per trainable parameter.

        For callbacks, in ``on_step``: a step in place forms them only if they are asked for.

        Returns:
            one tensor a parameter, each of its shape.
        """
        if self._gradients is None:
            self._gradients = (self.stand or self.engine).last_gradients()
        return self._gradients

    def gradient_squares(self) -> list[float]:
        """``‖G_k‖²`` of each of :attr:`gradients`, in float64."""
        if self._squares is None:
            if self._gradients is None and self.stand is not None:
                self._squares = self.stand.last_squares()
            else:
                self._squares = [float(g.double().square().sum()) for g in self.gradients]
        return self._squares

    @property
    def batch(self) -> int:
        """Completed batches of the running epoch."""
        return self._batch

    def run(self) -> None:
        """Train up to ``epochs``. The weights are left in the model, its ``.grad`` fields empty.

        Raises:
            DivergedError: NaN or infinity, with the step and the cause found.
            OutOfMemoryError: with the batch size to try.
            KeyboardInterrupt: after Ctrl-C, at the end of a step and after the callbacks
                have been told.
        """
        modes = {module: module.training for module in self.model.modules()}
        devices = [self.data.x.device] if self.data.x.is_cuda else []
        with torch.random.fork_rng(devices=devices), deferred_interrupt() as interrupted:
            if self._global_state is None:
                torch.manual_seed(_seed(self.seed, "global", 0))
            else:
                torch.set_rng_state(self._global_state)
            self.model.train()
            try:
                self.engine.check(self.data.x, self.data.y)
                if self.step == 0:
                    self.rate.begin(self)
                self._tell("on_start")
                with memory_watched("training", self.batch_size):
                    while self.epoch < self.epochs:
                        self._run_epoch(interrupted)
                self.check_weights()
                self._tell("on_end")
            finally:
                for parameter in self.engine.parameters:
                    parameter.grad = None
                for module, training in modes.items():
                    module.training = training

    def stop(self) -> None:
        """End as Ctrl-C does: after the running step, once the callbacks are told, by KeyboardInterrupt."""
        self.stopping = True

    def state(self) -> TrainingState:
        """A copy of the present state, for a checkpoint."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, velocity in enumerate(self.velocities):
            if velocity is not None:
                tensors[f"momentum.{index}"] = velocity
        tensors |= {f"undo.{name}": value for name, value in self._undo.items()}
        for callback in self.callbacks:
            for name, value in callback.state().items():
                tensors[f"callback.{type(callback).__name__}.{name}"] = value
        if self.shrinking is not None:
            for name, value in self.shrinking.state().items():
                tensors[f"shrinking.{name}"] = value
        tensors["clock"] = torch.tensor([self.log_time, self._undo_time], dtype=torch.float64)
        tensors["random.global"] = torch.get_rng_state()
        return TrainingState(
            {name: value.detach().clone().contiguous() for name, value in tensors.items()},
            self.epoch,
            self.step,
            self._batch,
            self._loss_sum,
            self._correct,
            dict(self.rate.state),
        )

    def restore(self, state: TrainingState) -> None:
        """Continue from ``state``.

        Args:
            state: what :meth:`state` gave.

        Raises:
            ModelError: the state belongs to another model.
            RunError: a place in the epoch that there is not: other data, or damaged.
        """
        if not 0 <= state.batch < self.steps_per_epoch:
            raise RunError(f"the checkpoint is damaged: no epoch has a batch {state.batch}")
        load_weights(self.model, _under("model.", state.tensors))
        self._undo = _under("undo.", state.tensors)
        for callback in self.callbacks:
            callback.restore(_under(f"callback.{type(callback).__name__}.", state.tensors))
        if self.shrinking is not None:
            self.shrinking.restore(_under("shrinking.", state.tensors), self.data.x.device)
        self.rate.state = dict(state.rate)
        self.log_time, self._undo_time = state.tensors["clock"].tolist()
        for index, parameter in enumerate(self.engine.parameters):
            velocity = state.tensors.get(f"momentum.{index}")
            if velocity is not None:
                if velocity.shape != parameter.shape:
                    raise ModelError("the checkpoint's momentum is that of another model")
                self.velocities[index] = velocity.to(parameter).clone()
        self._global_state = state.tensors["random.global"].clone()
        self.epoch, self.step, self._batch = state.epoch, state.step, state.batch
        self._loss_sum, self._correct = state.loss_sum, state.correct

    def log_loss(self) -> float:
        """``ln L`` of the whole training set at the present weights, under the attack."""
        return self.engine.log_loss(self.data.x, self.data.y, self.generator())

    def examination_generator(self) -> torch.Generator | None:
        """The source of the random starts of an examination before the next epoch, if there are any."""
        return self._source("examination", self.epoch)

    def _run_epoch(self, interrupted: threading.Event) -> None:
        batches = self.batches()
        if self.rate.undoes and self._batch == 0:
            self._undo = {n: v.detach().clone() for n, v in self.model.state_dict().items()}
            self._undo_time = self.log_time
        for batch in range(self._batch, self.steps_per_epoch):
            if not self._take_step(batches(batch)):
                self._loss_sum = math.inf
                break
            if self._batch < self.steps_per_epoch:
                self._tell("on_step")
                self._stop_if(interrupted)
        self.average()
        if self.rate.undoes and not self.rate.accept_epoch(self):
            load_weights(self.model, self._undo)
            self.log_time = self._undo_time
        self._undo = {}
        self.turn_over()
        self._tell("on_step")
        self._tell("on_epoch")
        if self.epoch < self.epochs:
            self._stop_if(interrupted)

    def average(self) -> None:
        """The means over the epoch that is done."""
        self.epoch_loss = self._loss_sum / self.data.n
        self.epoch_accuracy = self._correct / self.data.n

    def turn_over(self) -> None:
        """Begin to count the next epoch."""
        self.epoch += 1
        if self.shrinking is not None:
            self.shrinking.end_epoch(self)
        self._batch, self._loss_sum, self._correct = 0, 0.0, 0

    def _take_step(self, part: Part) -> bool:
        """One update; False where the loss overflows in an epoch that can still be undone."""
        x, y, size = part.x, part.y, part.size
        reference = self.rate.log_reference
        in_place = self._in_place
        # Engines of one's own need to know of it only where examples are left out.
        count: dict[str, Any] = {} if len(y) == size else {"count": size}
        if in_place:
            self.learning_rate = self.next_rate()
        if len(y) == 0:
            result = self._nothing()
        elif in_place:
            result = self.engine.descend(x, y, self.learning_rate, self.generator(), **count)
        else:
            result = self.engine(x, y, self.generator(), reference, **count)
        loss = float(result.loss) + part.loss / size
        if not math.isfinite(loss):
            if self.rate.undoes and self._batch > 0:
                return False
            raise self.divergence(result, part.rows)
        if not in_place:
            self.learning_rate = self.next_rate()
            self._descend(result.gradients)
        log_step = math.log(self.learning_rate) - (reference or 0.0)
        log_time = float(np.logaddexp(self.log_time, log_step))
        # Those left out had positive scores.
        correct = int((result.margins > 0).sum()) + size - len(y)
        gradients = None if in_place and len(y) else result.gradients
        self.note(loss, log_time, size, correct, gradients)
        return True

    def note(
        self,
        loss: float,
        log_time: float,
        count: int,
        correct: int,
        gradients: tuple[Tensor, ...] | None = None,
    ) -> None:
        """Count a step that was taken.

        Args:
            loss: L of its batch before it.
            log_time: ``ln t`` after it.
            count: examples in the batch.
            correct: those of them with a positive margin.
            gradients: one tensor a parameter, each of its shape; None where the step did not form
                them.
        """
        self.step += 1
        self._batch += 1
        self._gradients, self._squares = gradients, None
        self.rate.after_step(self)
        self.step_loss = loss
        self.log_time = log_time
        self._loss_sum += loss * count
        self._correct += correct

    @property
    def _in_place(self) -> bool:
        """Whether the step can be taken without the gradient."""
        return self.engine.in_place and self.rate.known and self.momentum == 0

    def _descend(self, gradients: Sequence[Tensor]) -> None:
        """``v ← μv + G, W ← W − ηv``, with v = G at first, by the function behind torch.optim.SGD.

        An SGD object would import torch's compiler, which takes most of a second and is not used.
        """
        with torch.no_grad():
            sgd(
                list(self.engine.parameters),
                list(gradients),
                self.velocities,
                lr=self.learning_rate,
                momentum=self.momentum,
                dampening=0.0,
                nesterov=False,
                weight_decay=0.0,
                maximize=False,
            )

    def batches(self) -> Callable[[int], Part]:
        """The examples of each step of the running epoch, by its number."""
        order = self.order()
        if self.shrinking is not None:
            if self._batch == 0:
                self.shrinking.begin_epoch(self)
            parts = self.shrinking.parts(self.data, order, self.batch_size)
            if parts is not None:
                return parts.__getitem__

        def batch(number: int) -> Part:
            if order is None:
                return Part(self.data.x, self.data.y, self.data.n)
            return self.part(order[number * self.batch_size : (number + 1) * self.batch_size])

        return batch

    def part(self, rows: Tensor) -> Part:
        """The examples of these ``rows`` of the data set as a batch.

        Args:
            rows: indices, (k,).
        """
        return Part(self.data.x[rows], self.data.y[rows], len(rows), rows=rows)

    def _nothing(self) -> LossGradient:
        """What a batch gives of which nobody is left."""
        if not self._zeros:
            self._zeros = tuple(torch.zeros_like(p) for p in self.engine.parameters)
        empty = self._zeros[0].new_empty(0)
        return LossGradient(empty.sum(), self._zeros, empty, empty)

    def generator(self) -> torch.Generator | None:
        """The source of the next step's random start, if the attack has one."""
        return self._source("attack", self.step)

    def _source(self, stream: _Stream, index: int) -> torch.Generator | None:
        if self.engine.attack is None or not self.engine.attack.random:
            return None
        return self.stream(stream, index)

    def stream(self, name: _Stream, index: int) -> torch.Generator:
        """A source of randomness for one use, on the CPU.

        Args:
            name: the use.
            index: its number: of the epoch or of the step.
        """
        return torch.Generator().manual_seed(_seed(self.seed, name, index))

    def permutation(self, index: int) -> Tensor:
        """The order of the examples in their pass number ``index``.

        Shape (n,).

        Args:
            index: number of the pass, from 0.
        """
        order = torch.randperm(self.data.n, generator=self.stream("order", index))
        return order.to(self.data.x.device)

    def order(self) -> Tensor | None:
        """The order of the examples in the running epoch; None where a batch is all of them.

        Shape (n,).
        """
        if self.batch_size == self.data.n:
            return None
        return self.permutation(self.epoch)

    def _tell(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self)

    def _stop_if(self, interrupted: threading.Event) -> None:
        team = current()
        asked = interrupted.is_set() if team is None else team.agreed
        if asked or self.stopping:
            self._tell("on_interrupt")
            raise KeyboardInterrupt

    def next_rate(self) -> float:
        """η of the next step.

        Raises:
            DivergedError: the rate or schedule gives no positive, finite number.
        """
        eta = self.rate.rate(self)
        if not 0 < eta < math.inf:
            step, epoch = self.step + 1, self.epoch + 1
            raise DivergedError(
                f"training stopped at step {step} (epoch {epoch}): the learning rate "
                f"{self.rate.name!r}: expected a positive, finite number, got {eta:g}; mend the "
                "schedule, or give a constant lr",
                step,
                epoch,
            )
        return eta

    def check_weights(self) -> None:
        """Refuse to go on with weights, or buffers, that the last step has spoilt.

        A step looks at its loss alone, which is NaN once a weight is. So a spoilt weight is found
        by the next step, or by this, before anything of it is measured or kept.

        Raises:
            DivergedError: NaN or infinity in a weight, NaN in a buffer.
        """
        name = spoilt(self.model)
        if name is not None:
            raise self._spoilt(name, self.step)

    def divergence(self, result: LossGradient, rows: Tensor | None = None) -> DivergedError:
        """The error that says why the next step cannot be taken.

        Args:
            result: the gradient that is not finite, or whose loss is not.
            rows: the batch's places in the data set, (n,); None where it is all of it.
        """
        step, epoch = self.step + 1, self.epoch + 1
        broken = spoilt(self.model)
        if broken is not None:
            return self._spoilt(broken, step)
        if not bool(torch.isfinite(result.outputs).all()):
            where, kind = broken_examples(result.outputs, rows)
            cause = f"the network's outputs are {kind} at {where}"
            if kind == "infinite":
                cause += (
                    f" (they overflow {result.outputs.dtype}); lower lr (now "
                    f"{self.learning_rate:g}) or use float64"
                )
            else:
                cause += (
                    f" though its weights are finite; evaluate the model there, or lower lr (now "
                    f"{self.learning_rate:g})"
                )
        else:
            cause = (
                f"the {self.engine.loss.name} loss overflows {result.outputs.dtype} at margin "
                f"{float(result.margins.min()):.3g}; lower lr (now {self.learning_rate:g}) "
                "or use loss='logistic'"
            )
        return DivergedError(
            f"training diverged at step {step} (epoch {epoch}): {cause}", step, epoch
        )

    def _spoilt(self, name: str, step: int) -> DivergedError:
        """The error for a weight that is not finite, seen at ``step``."""
        epoch = min(self.epoch + (step > self.step), self.epochs) or 1
        cause = f"the weights of {name!r} are no longer finite: "
        names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        # A step in place does not form gradients, and those of spoilt weights say nothing.
        found = zip(names, self._gradients or (), strict=False)
        wrong = [n for n, g in found if not bool(torch.isfinite(g).all())]
        if self.step == 0:
            cause += "they were so at the start; initialise the model, or load other weights"
        elif wrong:
            cause += (
                f"the gradient of step {self.step} by {wrong[0]!r} was NaN or infinite (a hook, a "
                f"division by 0, or an overflow); look there, or lower lr (now {self.learning_rate:g})"
            )
        else:
            cause += (
                f"the update of step {self.step} overflowed; lower lr (now {self.learning_rate:g})"
            )
        return DivergedError(
            f"training diverged at step {step} (epoch {epoch}): {cause}", step, epoch
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with ``prefix``, without it."""
    return {n.removeprefix(prefix): v.clone() for n, v in tensors.items() if n.startswith(prefix)}


def _seed(seed: int, stream: _Stream, index: int) -> int:
    """A seed for one use, independent of every other (seed, stream, index)."""
    state = np.random.SeedSequence([seed, _STREAMS[stream], index]).generate_state(2, np.uint32)
    return int(state[0]) << 31 ^ int(state[1])


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising in the middle of an update; twice raises at once.

    Of several processes at work together each is told so by a signal of its own (of torchrun, SIGINT
    or SIGTERM); they stop after the same step, when all of them know.
    """
    event = threading.Event()
    team = current()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        if event.is_set() and team is None:
            raise KeyboardInterrupt
        event.set()

    signals = [signal.SIGINT] if team is None else [signal.SIGINT, signal.SIGTERM]
    previous = {kind: signal.signal(kind, handler) for kind in signals}
    try:
        with contextlib.nullcontext() if team is None else team.watched(event):
            yield event
    finally:
        for kind, before in previous.items():
            signal.signal(kind, before)
