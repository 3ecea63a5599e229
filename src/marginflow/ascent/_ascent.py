"""The ascent: a training whose steps seek the normalised adversarial margin itself.

Source: maximises γ̂_m of Section 3.2; methods as named in ``_methods.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from marginflow._checks import whole
from marginflow.ascent._method import Method
from marginflow.ascent._tempered import Tempered
from marginflow.datasets import Dataset
from marginflow.engine import Engine, LossGradient, build
from marginflow.errors import DivergedError, InputError
from marginflow.homogeneity import Homogeneity
from marginflow.training import Callback, Part, Trainer, TrainingState

_CHUNK = 1024
_COLD = 1e6
# In units of the batch's median margin: chance does not come so near to 0.
_DEAD = 1e-9


class Ascent(Trainer):
    """Steps along ``∇ ln L_τ``, made by a :class:`Method`, on batches that hard examples fill up.

    The margins that a step meets on its way are kept (:attr:`seen`), one per example: they say
    which examples are hard, and how large the temperature must be. Everything else, from the
    batch order to checkpoints that are resumed to the last bit, is the trainer's.

    Args:
        engine: of the :class:`Tempered` loss.
        data: training examples, of the model's dtype and device.
        method: how a step is made.
        homogeneity: the measured layers of the model.
        batch_size: examples per step; None takes the whole data set.
        epochs: the epoch after which the ascent ends; the schedules run to it.
        seed: seed of the batch order, of the hard examples and of random starts.
        callbacks: told of each step and epoch, in this order.

    Raises:
        InputError: a number out of range, an engine without a temperature.

    Attributes:
        seen: the margin m_i of each example when it was last met, (n,).
        progress: the share of all steps that is done, in [0, 1].
        loss: the loss of the engine, at a temperature where the method asks for one.
        layers: the parameters of each layer.
    """

    def __init__(
        self,
        engine: Engine,
        data: Dataset,
        *,
        method: Method,
        homogeneity: Homogeneity,
        batch_size: int | None,
        epochs: int,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not isinstance(engine.loss, Tempered):
            raise InputError("engine: expected one of a Tempered loss")
        self.method = method
        self.homogeneity = homogeneity
        self.loss = engine.loss
        named = dict(engine.model.named_parameters())
        self.layers = [[named[name] for name in layer.parameters] for layer in homogeneity.layers]
        place = {id(p): index for index, p in enumerate(engine.parameters)}
        self.places = [[place[id(p)] for p in layer] for layer in self.layers]
        """Where each layer's parameters stand among the engine's."""
        self.seen = torch.full((data.n,), -math.inf, dtype=data.x.dtype, device=data.x.device)
        self._unperturbed: Engine | None = None
        self._counted = 0
        self._walked = 0
        self._turn = -1
        self._order = torch.empty(0, dtype=torch.long, device=data.x.device)
        super().__init__(
            engine,
            data,
            lr=method,
            batch_size=batch_size,
            epochs=whole("epochs", epochs, least=1),
            seed=seed,
            callbacks=callbacks,
        )

    @property
    def progress(self) -> float:
        """The share of all steps that is done."""
        return self.step / (self.epochs * self.steps_per_epoch)

    def look(self) -> None:
        """Meet every example once, without a step: the margins that a method begins with."""
        # Scores of several classes are soft margins; of cold ones the softness is (ln C)/τ at most.
        self.loss.temperature = _COLD
        for start in range(0, self.data.n, _CHUNK):
            part = slice(start, start + _CHUNK)
            scores = self.engine.scores(self.data.x[part], self.data.y[part], self.generator())
            self.seen[part] = scores.detach()

    def batches(self) -> Callable[[int], Part]:
        """As a trainer's; a method may fill a share of each batch with the hardest examples."""
        ordinary = super().batches()
        if self.method.hard == 0 or self.batch_size == self.data.n:
            everybody = torch.arange(self.data.n, device=self.data.x.device)

            def plain(number: int) -> Part:
                part = ordinary(number)
                return part if part.rows is not None else dataclasses.replace(part, rows=everybody)

            return plain
        pool = min(max(2 * self.batch_size, math.ceil(self.method.pool * self.data.n)), self.data.n)

        def mixed(number: int) -> Part:
            size = min(self.batch_size, self.data.n - number * self.batch_size)
            hard = round(self.method.hard_share(self.progress) * size)
            hardest = torch.topk(self.seen, pool, largest=False).indices
            draw = torch.randint(pool, (hard,), generator=self.stream("hard", self.step))
            return self.part(torch.cat([self._walk(size - hard), hardest[draw.to(hardest.device)]]))

        return mixed

    def _walk(self, count: int) -> Tensor:
        """The next examples of a walk through permutations, which meets each one as often."""
        found = []
        while count > 0:
            turn, place = divmod(self._walked, self.data.n)
            if turn != self._turn:
                self._turn, self._order = turn, self.permutation(turn)
            rows = self._order[place : place + count]
            found.append(rows)
            self._walked += len(rows)
            count -= len(rows)
        return torch.cat(found) if found else self._order[:0]

    def average(self) -> None:
        """The means over the epoch; of accuracy, over the margins last seen."""
        self.epoch_loss = self._loss_sum / max(1, self._counted)
        self.epoch_accuracy = float((self.seen > 0).double().mean())

    def turn_over(self) -> None:
        """Begin to count the next epoch."""
        super().turn_over()
        self._counted = 0

    def state(self) -> TrainingState:
        """A copy of the present state, for a checkpoint."""
        state = super().state()
        tensors = {**state.tensors, "ascent.seen": self.seen.clone()}
        tensors["ascent.counts"] = torch.tensor([self._counted, self._walked])
        tensors |= {f"method.{name}": value for name, value in self.method.tensors().items()}
        return dataclasses.replace(state, tensors=tensors)

    def restore(self, state: TrainingState) -> None:
        """Continue from ``state``; errors as for a trainer.

        Args:
            state: what :meth:`state` gave.
        """
        super().restore(state)
        self.seen = state.tensors["ascent.seen"].to(self.seen).clone()
        self._counted, self._walked = state.tensors["ascent.counts"].tolist()
        self.method.take(
            {
                name.removeprefix("method."): value
                for name, value in state.tensors.items()
                if name.startswith("method.")
            }
        )

    def _take_step(self, part: Part) -> bool:
        self.loss.temperature = self.method.temperature(self)
        result = self.engine(part.x, part.y, self.generator(), of_log=True)
        log_loss = float(result.loss)
        if not math.isfinite(log_loss):
            raise self.divergence(result, part.rows)
        if part.rows is not None:
            self.seen[part.rows] = result.margins.detach()
        self.learning_rate = self.method.rate(self)
        gradients = self._with_the_dead(part, result)
        try:
            self.method.move(self, gradients, log_loss)
        except InputError as error:
            step, epoch = self.step + 1, self.epoch + 1
            raise DivergedError(
                f"the ascent stopped at step {step} (epoch {epoch}): {error}", step, epoch
            ) from None
        self._counted += len(part.y)
        correct = int((result.margins > 0).sum())
        # There is no t: the steps follow no gradient flow of one loss.
        self.note(math.exp(min(log_loss, 700.0)), self.log_time, len(part.y), correct, gradients)
        return True

    def _with_the_dead(self, part: Part, result: LossGradient) -> tuple[Tensor, ...]:
        """The gradient, with that of examples at whose perturbed inputs no unit is active.

        Their margin is 0 and has no gradient: however heavy they weigh, they would stay. Theirs is
        taken at the inputs themselves, with the weight that they have in the batch.
        """
        if self.engine.attack is None:
            return result.gradients
        size = result.margins.abs()
        dead = size <= _DEAD * size.median()
        if not bool(dead.any()):
            return result.gradients
        if self._unperturbed is None:
            self._unperturbed = build(
                self.model,
                self.loss,
                None,
                shape=self.data.shape,
                batch_size=self.batch_size,
                engine="fused" if self.engine.settings["engine"] == "fused" else "autograd",
                products="default",
                shards=self.engine.shards,
            )
        theirs = self._unperturbed(part.x[dead], part.y[dead], of_log=True).gradients
        share = float(self.loss.log_weights(result.margins).exp()[dead].sum())
        share /= self.loss.temperature
        if not all(bool(torch.isfinite(g).all()) for g in theirs):
            return result.gradients
        return tuple(g + share * t for g, t in zip(result.gradients, theirs, strict=True))

    def divergence(self, result: LossGradient, rows: Tensor | None = None) -> DivergedError:
        """The error that says why the next step cannot be taken; arguments as for a trainer."""
        largest = float(result.margins.abs().max())
        if math.isfinite(largest) and self.loss.overflows(result.margins):
            step, epoch = self.step + 1, self.epoch + 1
            return DivergedError(
                f"the ascent stopped at step {step} (epoch {epoch}): τ·margin overflows "
                f"{result.outputs.dtype} at τ = {self.loss.temperature:g} and a margin of "
                f"{largest:.3g}; lower the temperature, or use float64",
                step,
                epoch,
            )
        return super().divergence(result, rows)
