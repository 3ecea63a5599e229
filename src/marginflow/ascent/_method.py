"""What every method of margin maximisation shares: schedules, temperature, hard examples.

Source: marginflow; the margin is that of Section 3.2.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from marginflow._checks import real
from marginflow.errors import InputError, ModelError
from marginflow.homogeneity import Homogeneity
from marginflow.training import Rate, Trainer

if TYPE_CHECKING:
    from marginflow.ascent._ascent import Ascent

Range = tuple[float, float]
"""First and last value of a schedule."""

_SCALE_STEPS = 20
_HARD_FROM = 0.25


class Method(Rate):
    """How a step is made of ``G = ∇ ln L_τ``; its numbers are part of every checkpoint.

    The step length and the temperature go from their first to their last value by equal factors,
    from the first step to the last. τ is counted in units of the margins themselves, ``τ = c/median |m_i|``
    of the margins last met, so that one schedule fits data sets and networks of any scale.

    Args:
        step: the step length, first and last; falling.
        tau: c, first and last, rising; None leaves the loss as it is (τ = 1).
        hard: share of each batch drawn from the hardest examples, in [0, 1). It is 0 at first and
            full after a quarter of the steps: where the hardest cannot be fitted yet, a
            network that sees little else learns to be 0.
        pool: the share of all examples that counts as hardest, in (0, 1].

    Attributes:
        name: the word that its :attr:`spec` begins with.
        lengths: the step length, first and last.

    Raises:
        InputError: a number out of range, a step that rises, a temperature that falls.
    """

    known: ClassVar[bool] = False
    length: ClassVar[str] = "step"
    """What the step length is called."""
    separated: ClassVar[bool] = False
    """Whether every adversarial margin must be positive at the start."""

    def __init__(self, step: Range, tau: Range | None, hard: float, pool: float) -> None:
        super().__init__()
        self.lengths = checked_range(f"{self.name}: {self.length}", step)
        self.tau = None if tau is None else checked_range(f"{self.name}: tau", tau)
        self.hard = checked_share(f"{self.name}: hard", hard)
        self.pool = real(f"{self.name}: pool", pool, above=0.0)
        if self.pool > 1:
            raise InputError(f"{self.name}: pool: expected a share of at most 1, got {pool!r}")
        if self.tau is not None and self.tau[1] < self.tau[0]:
            raise InputError(
                f"{self.name}: tau: expected a temperature that rises or stays, got "
                f"{self.tau[0]:g}..{self.tau[1]:g}: a falling one would forget the smallest margins"
            )
        if self.lengths[1] > self.lengths[0]:
            raise InputError(
                f"{self.name}: {self.length}: expected a step that falls or stays, got "
                f"{self.lengths[0]:g}..{self.lengths[1]:g}"
            )

    def hard_share(self, progress: float) -> float:
        """The share of a batch that is drawn from the hardest examples.

        Args:
            progress: the share of all steps that is done, in [0, 1].
        """
        return self.hard * min(1.0, progress / _HARD_FROM)

    @property
    def spec(self) -> str:
        """The specification that builds this method again."""
        options = {self.length: _written(self.lengths)}
        if self.tau is not None:
            options["tau"] = _written(self.tau)
        options |= {"hard": repr(self.hard), "pool": repr(self.pool), **self.own()}
        return f"{self.name}:" + ",".join(f"{key}={value}" for key, value in options.items())

    def own(self) -> Mapping[str, str]:
        """The options that only this method has, as in :attr:`spec`."""
        return {}

    def warmed(self) -> Method:
        """The method to begin with where the data are not separated yet: itself if it needs no such thing."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What the method remembers beyond the velocities; saved in every checkpoint.

        Returns:
            by name, each of the shape of what it belongs to.
        """
        return {}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what :meth:`tensors` gave.

        Args:
            tensors: by name, of the same shapes.
        """

    def check_layers(self, model: nn.Module, homogeneity: Homogeneity) -> list[float]:
        """The layers' norms, of which none may be 0.

        Args:
            model: the network.
            homogeneity: its layers.

        Returns:
            ρ_k = ``‖W_k‖_F``, one a layer.

        Raises:
            ModelError: a layer that is 0, infinite or NaN.
        """
        norms: list[float] = homogeneity.norms(model).tolist()
        for layer, norm in zip(homogeneity.layers, norms, strict=True):
            if norm == 0 or not math.isfinite(norm):
                raise ModelError(
                    f"{self.name}: layer {layer.name!r} has norm {norm:g}, and a step relative to it "
                    "leads nowhere: initialise it anew"
                )
        return norms

    def measured(self, trainer: Ascent, margin: float) -> dict[str, float]:
        """What a record of the measurements has besides, given ``min_i m_i``.

        Args:
            trainer: the ascent.
            margin: ``min_i m_i``.
        """
        return {}

    def check(self, trainer: Trainer) -> None:
        """Refuse an ordinary training.

        Args:
            trainer: the training.

        Raises:
            InputError: a trainer that is no :class:`Ascent`.
        """
        as_ascent(trainer)

    def check_margins(self, ascent: Ascent) -> None:
        """Refuse a network that is dead on half of the examples, before anything is written.

        Args:
            ascent: the ascent, before its first step; it looks at every example once.

        Raises:
            ModelError: half of the margins are 0.
        """
        if self.tau is not None:
            ascent.look()
            self._rescale(ascent)
            self.state = {}

    def begin(self, trainer: Trainer) -> None:
        """Bring every layer to norm 1, which changes no decision, and meet every example once.

        Raises:
            InputError: a trainer that is no :class:`Ascent`.
            ModelError: a layer whose norm is 0 or not finite; half of the margins 0 (a dead
                network).
        """
        ascent = as_ascent(trainer)
        self.state = {}  # a method may serve several ascents, one after the other
        self.take({})
        norms = self.check_layers(ascent.model, ascent.homogeneity)
        with torch.no_grad():
            for weights, norm in zip(ascent.layers, norms, strict=True):
                for weight in weights:
                    weight.div_(norm)
        ascent.look()
        if self.tau is not None:
            self._rescale(ascent)

    def rate(self, trainer: Trainer) -> float:
        """The length of the next step, between the first and the last of ``lengths``.

        In radians for ``spheres`` and ``polish``, relative to ‖W‖ for the others.

        Raises:
            InputError: a trainer that is no :class:`Ascent`.
        """
        return geometric(self.lengths, as_ascent(trainer).progress)

    def temperature(self, trainer: Ascent) -> float:
        """``τ = c/median |m_i|`` of the next step.

        Args:
            trainer: the ascent.

        Raises:
            ModelError: half of the margins are 0 at the start.
        """
        if self.tau is None:
            return 1.0
        if trainer.step % _SCALE_STEPS == 0:
            self._rescale(trainer)
        tau = geometric(self.tau, trainer.progress) / self.state["scale"]
        self.state["temperature"] = tau
        return tau

    @abstractmethod
    def move(self, trainer: Ascent, gradients: Sequence[Tensor], log_loss: float) -> None:
        """Change the weights.

        Args:
            trainer: whose weights, layers and velocities they are; ``learning_rate`` is the length.
            gradients: ``∇ ln L_τ``, one tensor a parameter, each of its shape.
            log_loss: ``ln L_τ`` of the batch.
        """

    def _rescale(self, trainer: Ascent) -> None:
        scale = float(trainer.seen.abs().median())
        if scale > 0 and math.isfinite(scale):
            self.state["scale"] = scale
        elif "scale" not in self.state:
            raise ModelError(
                f"{self.name}: half of the margins are 0 at the start: a dead network; "
                "initialise it anew"
            )


def as_ascent(trainer: Trainer) -> Ascent:
    """The trainer, which must be an ascent.

    Raises:
        InputError: an ordinary training.
    """
    from marginflow.ascent._ascent import Ascent

    if not isinstance(trainer, Ascent):
        raise InputError("a method of margin maximisation is no learning rate; use mf.maximize")
    return trainer


def velocities_of(trainer: Ascent) -> list[Tensor]:
    """The trainer's velocities, one per trainable parameter, zeros at first."""
    found = []
    for index, parameter in enumerate(trainer.engine.parameters):
        velocity = trainer.velocities[index]
        if velocity is None:
            velocity = trainer.velocities[index] = torch.zeros_like(parameter)
        found.append(velocity)
    return found


def geometric(span: Range, progress: float) -> float:
    """From the first to the last value of a schedule, by equal factors."""
    first, last = span
    return float(first * (last / first) ** min(progress, 1.0))


def checked_range(name: str, span: Range) -> Range:
    """Two positive numbers.

    Raises:
        InputError: anything else.
    """
    try:
        first, last = span
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected a pair (first, last), got {span!r}") from None
    return real(name, first, above=0.0), real(name, last, above=0.0)


def checked_share(name: str, value: float) -> float:
    """A number in [0, 1).

    Raises:
        InputError: anything else.
    """
    share = real(name, value, least=0.0)
    if share >= 1:
        raise InputError(f"{name}: expected a number below 1, got {value!r}")
    return share


def _written(span: Range) -> str:
    return "..".join(map(repr, span))
