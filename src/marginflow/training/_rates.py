"""Learning rates: constant, that of Lemma 2, and the loss-based one of Lyu & Li.

A rate is asked before each step and told of each step and epoch; it may refuse an
epoch, which is then undone. Its numbers are part of every checkpoint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from marginflow._checks import choice, real, unknown
from marginflow._specs import Spec, number, parse, word
from marginflow.errors import InputError, SpecificationError
from marginflow.models import linear_layers
from marginflow.training._smoothness import printed_smoothness, smoothness

if TYPE_CHECKING:
    from marginflow.training._trainer import Trainer

_GROW = 2 ** (1 / 5)
_SHRINK = 2 ** (1 / 10)


class Rate(ABC):
    """A learning rate η(t). Subclasses keep their changing numbers in :attr:`state`.

    Attributes:
        name: the word that its :attr:`spec` begins with.
    """

    name: ClassVar[str]
    undoes: ClassVar[bool] = False
    """Whether an epoch may be refused; its initial weights are then kept."""
    known: ClassVar[bool] = False
    """Whether η is known before the gradient, and the gradient is that of L."""

    def __init__(self) -> None:
        self.state: dict[str, float] = {}
        """The numbers that change in training; saved in every checkpoint."""

    @property
    @abstractmethod
    def spec(self) -> float | str:
        """The number or specification that builds this rate again.

        A number is η itself.
        """

    @property
    def log_reference(self) -> float | None:
        """A number r, such as ln L, if η multiplies the gradient of L/e^r; None if that of L."""
        return None

    def check(self, trainer: Trainer) -> None:  # noqa: B027 - most rates fit every training
        """Refuse a training that the rate is not made for, before step 0.

        Args:
            trainer: the training.

        Raises:
            InputError: what is missing.
        """

    def begin(self, trainer: Trainer) -> None:  # noqa: B027 - a constant has nothing to set up
        """Set up :attr:`state` at the initial weights; not called when a run is resumed.

        Args:
            trainer: the training.
        """

    @abstractmethod
    def rate(self, trainer: Trainer) -> float:
        """η for the next step.

        Args:
            trainer: the training.
        """

    def after_step(self, trainer: Trainer) -> None:  # noqa: B027 - likewise
        """Take note of the weights after a step.

        Args:
            trainer: the training.
        """

    def accept_epoch(self, trainer: Trainer) -> bool:
        """Whether to keep the epoch just done; if not, its weights are undone.

        Args:
            trainer: the training.
        """
        return True


class Constant(Rate):
    """A constant learning rate: η(t) = η.

    Attributes:
        lr: η > 0.

    Raises:
        InputError: η not a positive finite number.
    """

    name = "constant"
    known = True

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = real("lr", lr, above=0.0)

    @property
    def spec(self) -> float:
        """The number itself, η."""
        return self.lr

    def rate(self, trainer: Trainer) -> float:
        """The same η at every step."""
        return self.lr


class Lemma2(Rate):
    """``η = min{1, 1/β(r, r̄, ε)}`` with a growing radius r(t) (Lemma 2).

    ``r ← r + μ`` when W(t+1) leaves S(r − μ), ``μ = r^{L−1}(R+ε)α η`` the longest a step can
    be. For full-batch gradient descent on a deep linear network with the logistic loss and
    the exact ℓ2 perturbation (or none). The loss then never increases (Eq. 30).

    Args:
        constant: ``corrected`` (:func:`smoothness`) or ``printed`` (Eq. 12), which makes η
            so small that it is a check and not a schedule.
        floor: r̄; by default half of ‖W_Π‖₂ at the start. Whether the run keeps above it
            is recorded: ``state["below_floor"]`` counts the steps that did not.

    Raises:
        InputError: a floor that is not a positive number.
        SpecificationError: an unknown constant.
    """

    name = "lemma2"

    def __init__(self, constant: str = "corrected", floor: float | None = None) -> None:
        super().__init__()
        self.constant = choice("constant", constant, ("corrected", "printed"))
        self.floor = None if floor is None else real("floor", floor, above=0.0)

    @property
    def spec(self) -> str:
        """``lemma2:constant=…``."""
        end = "" if self.floor is None else f",floor={self.floor!r}"
        return f"lemma2:constant={self.constant}{end}"

    def check(self, trainer: Trainer) -> None:
        """Refuse all but Lemma 2's setting.

        Raises:
            InputError: batches, momentum, another loss or attack.
            ModelError: a network that is not deep linear.
        """
        linear_layers(trainer.model)
        attack = trainer.engine.attack
        wrong = None
        if trainer.steps_per_epoch != 1:
            wrong = "full-batch gradient descent (no batch_size)"
        elif trainer.momentum:
            wrong = "no momentum"
        elif trainer.engine.loss.name != "logistic":
            wrong = "the logistic loss"
        elif attack is not None and (attack.name != "exact-linear" or attack.p != 2):
            wrong = "the attack exact-linear:p=2, or none"
        if wrong:
            raise InputError(f"lr lemma2: expected {wrong}; the bound of Lemma 2 needs it")

    def begin(self, trainer: Trainer) -> None:
        """Choose r̄, R and the first radius.

        Raises:
            InputError: layers whose product is 0.
        """
        norms, product = _norms(trainer.model)
        rows = trainer.data.x.reshape(trainer.data.n, -1).double()
        self.state = {
            "radius": max(1.0, max(norms)),
            "floor": product / 2 if self.floor is None else self.floor,
            # A bound on the examples' norms: of examples that are all 0 any will do.
            "data_norm": float(torch.linalg.vector_norm(rows, dim=1).max()) or 1.0,
            "below_floor": 0.0,
        }
        if not self.state["floor"] > 0:
            raise InputError("lr lemma2: the product of the layers is 0; begin elsewhere")
        # The start lies in S(r − μ) once r exceeds it by a step's length.
        while max(norms) > self.state["radius"] - self._reach(trainer):
            self.state["radius"] += self._reach(trainer)

    def rate(self, trainer: Trainer) -> float:
        """``min{1, 1/β(r, r̄, ε)}`` at the present radius."""
        depth = len(linear_layers(trainer.model))
        eps = 0.0 if trainer.engine.attack is None else trainer.engine.attack.eps
        r, low = self.state["radius"], self.state["floor"]
        if self.constant == "printed":
            bound = printed_smoothness(depth, r, low, eps)
        else:
            bound = smoothness(depth, r, low, eps, data_norm=self.state["data_norm"])
        return min(1.0, 1 / bound)

    def after_step(self, trainer: Trainer) -> None:
        """Let the radius grow when the weights leave S(r − μ)."""
        norms, product = _norms(trainer.model)
        reach = self._reach(trainer)
        if max(norms) > self.state["radius"] - reach:
            self.state["radius"] += reach
        if product < self.state["floor"]:
            self.state["below_floor"] += 1

    def _reach(self, trainer: Trainer) -> float:
        depth = len(linear_layers(trainer.model))
        eps = 0.0 if trainer.engine.attack is None else trainer.engine.attack.eps
        longest = self.state["radius"] ** (depth - 1) * (self.state["data_norm"] + eps)
        return longest * self.rate(trainer)


class LossBased(Rate):
    """``η = a/L`` (Lyu & Li 2020, Appendix): steps of constant size in ln L.

    L is the adversarial loss of the whole training set at the last accepted epoch. After an epoch
    that lowered it, a grows by 2^{1/5}; else the epoch is undone and a shrinks by
    2^{1/10}. Nothing goes through 1/L: gradients are taken of L_batch/L in the log domain.

    Where all signed examples lie in an acute cone, every step lowers the loss however long it is:
    a would grow without bound and the direction would never settle. So where ln L fell by
    more than ``fall`` per step, a is divided by the excess instead.

    Args:
        a: the first a > 0.
        fall: the largest fall of ln L per step after which a may still grow, above 0.

    Raises:
        InputError: a number out of range.
    """

    name = "loss-based"
    undoes = True

    def __init__(self, a: float = 0.1, fall: float = 10.0) -> None:
        super().__init__()
        self.a = real("loss-based: a", a, above=0.0)
        self.fall = real("loss-based: fall", fall, above=0.0)

    @property
    def spec(self) -> str:
        """``loss-based:a=…,fall=…``."""
        return f"loss-based:a={self.a!r},fall={self.fall!r}"

    def check(self, trainer: Trainer) -> None:
        """Refuse momentum, which an undone epoch would carry on.

        Raises:
            InputError: momentum.
        """
        if trainer.momentum:
            raise InputError("lr loss-based: expected no momentum")

    def begin(self, trainer: Trainer) -> None:
        """Take the loss at the initial weights."""
        self.state = {"a": self.a, "log_loss": trainer.log_loss(), "undone": 0.0}

    @property
    def log_reference(self) -> float:
        """The loss at the last accepted epoch, as ln L."""
        return self.state["log_loss"]

    def rate(self, trainer: Trainer) -> float:
        """The present a, for gradients of L_batch/L."""
        return self.state["a"]

    def accept_epoch(self, trainer: Trainer) -> bool:
        """Keep the epoch if the loss of the whole training set fell."""
        log_loss = trainer.log_loss()
        fell = self.state["log_loss"] - log_loss
        if math.isfinite(log_loss) and fell > 0:
            self.state["log_loss"] = log_loss
            self.state["a"] *= min(_GROW, self.fall * trainer.steps_per_epoch / fell)
            return True
        self.state["a"] /= _SHRINK
        self.state["undone"] += 1
        return False


def build_rate(lr: float | str | Rate) -> Rate:
    """A rate from a number, a specification (``lemma2``, ``loss-based:a=0.1``, ``0.1``) or itself.

    Args:
        lr: η > 0, its specification, or the rate itself.

    Raises:
        SpecificationError: an unknown name or option.
        InputError: a number out of range.
    """
    if isinstance(lr, Rate):
        return lr
    if not isinstance(lr, str):
        return Constant(lr)
    try:
        constant = float(lr)
    except ValueError:
        if not lr.strip() or not lr.strip()[0].isalpha():
            constant = number(lr, "lr")
        else:
            spec = parse(lr, "lr")
            return _build_named(spec)
    return Constant(constant)


def _build_named(spec: Spec) -> Rate:
    lr = spec.text
    if spec.args:
        raise SpecificationError(f"lr {lr!r}: {spec.args[0]!r} has no name")
    if spec.name == "lemma2":
        return Lemma2(**spec.parsed({"constant": word, "floor": number}))
    if spec.name == "loss-based":
        return LossBased(**spec.parsed({"a": number, "fall": number}))
    raise unknown("lr", spec.name, ("lemma2", "loss-based"))


def _norms(model: nn.Module) -> tuple[list[float], float]:
    """``‖W_k‖_F`` and ``‖W_Π‖₂``."""
    matrices = linear_layers(model)
    product: Tensor = matrices[0]
    for w in matrices[1:]:
        product = w @ product
    return [float(torch.linalg.matrix_norm(w)) for w in matrices], float(
        torch.linalg.matrix_norm(product, ord=2)
    )
