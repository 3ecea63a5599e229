"""Attacks of other libraries under the promises of ours, and their options as text."""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from marginflow._checks import optional, unknown
from marginflow._specs import flag, integer, number, word
from marginflow.attacks._base import Attack, Query, is_zero
from marginflow.attacks._logits import TwoLogits
from marginflow.errors import InputError, MarginflowError, MissingDependencyError
from marginflow.losses import check_labels
from marginflow.norms import as_exponent

EXTRA = "attack-libraries"
BOUNDS = (0.0, 1.0)
"""The range of pixels where nobody says another, as the libraries have it."""


@dataclass(frozen=True, eq=False, init=False)
class ForeignAttack(Attack):
    """An attack of another library, with the promises of :class:`Attack`.

    The library's perturbation is projected on the ball and clamped to the bounds. The library sees
    at least two logits (:class:`TwoLogits`) and labels 0 … C − 1. Its random numbers come from a
    seed drawn from the caller's generator, and the global random states of PyTorch, NumPy and
    Python are put back, as are modes, buffers and the parameters' ``requires_grad`` and ``.grad``, on
    which no gradient is accumulated meanwhile. ``derivative="total"`` is refused: nothing here is
    differentiated through.

    Attributes:
        title: the name of the attack in its library.
        options: what it is given there beside ε.
        sayable: whether a specification string builds it again.
        draws: whether it draws random numbers.
    """

    differentiable: ClassVar[bool] = False

    title: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    sayable: bool = False
    draws: bool = True

    def __init__(
        self,
        title: str,
        eps: float,
        p: float | str,
        bounds: tuple[float, float] | None,
        options: Mapping[str, Any],
        *,
        sayable: bool,
        draws: bool,
    ) -> None:
        # Cross-entropy it is for nearly all of them, and none promises to be scale invariant.
        super().__init__(eps, as_exponent(p), bounds, "loss")
        object.__setattr__(self, "title", title)
        object.__setattr__(self, "options", dict(options))
        object.__setattr__(self, "sayable", sayable and all(map(_sayable, options.values())))
        object.__setattr__(self, "draws", draws)

    @property
    def random(self) -> bool:
        """Whether the attack draws random numbers and so needs a generator."""
        return self.draws

    @property
    def spec(self) -> str:
        """The specification string that builds this attack again, or a description if none does."""
        if not self.sayable:
            said = ", ".join(f"{key}={value}" for key, value in self._said().items())
            return f"{self.name}({self.title}{', ' * bool(said)}{said})"
        said = ",".join(f"{key}={value}" for key, value in self._said().items())
        return f"{self.name}:{self.title},{said}"

    def _said(self) -> dict[str, str]:
        said = {
            key: _say(value) for key, value in sorted(self.options.items()) if value is not None
        }
        said["eps"] = repr(self.eps)
        if self._own_p() != self.p:
            said["p"] = "inf" if math.isinf(self.p) else repr(self.p)
        if self.bounds != BOUNDS:
            low_high = self.bounds
            said["bounds"] = "none" if low_high is None else f"{low_high[0]!r}..{low_high[1]!r}"
        return said

    def _own_p(self) -> float | None:
        """The norm that the library itself has for this attack, or None."""
        return None

    def _perturb(self, query: Query, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        if query.total:
            raise InputError(
                f"{self.spec}: expected derivative='detached', got 'total'; "
                "another library's perturbation cannot be differentiated through"
            )
        x, y = query.x, query.y
        with torch.no_grad():
            outputs = query.outputs(x)
        binary = check_labels(outputs, y)
        labels = (y > 0).long() if binary else y.clone()
        classes = 2 if binary else outputs.shape[1]
        with left_as_found(query.model, x.device, _seed(generator)):
            moved = self._guarded(TwoLogits(query.model), x.clone(), labels, classes)
        delta = moved.detach().to(x) - x
        return delta, _dead(query, delta)

    def _guarded(self, victim: nn.Module, x: Tensor, labels: Tensor, classes: int) -> Tensor:
        """``x + δ`` of the library, whose own errors say which attack it was."""
        try:
            with warnings.catch_warnings():
                # Of what NumPy and others deprecate in the libraries' code.
                warnings.simplefilter("ignore")
                moved = self._adversarial(victim, x, labels, classes)
        except (MarginflowError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(
                f"{self.spec}: {self.name} refused: {type(error).__name__}: {error}"
            ) from error
        finite = bool(torch.isfinite(moved).all())
        if moved.shape != x.shape or not finite:
            got = f"shape {tuple(moved.shape)}" if finite else "NaN or infinity"
            raise InputError(
                f"{self.spec}: expected finite examples of shape {tuple(x.shape)} from {self.name}, got "
                f"{got}; does it take such examples, these bounds and options?"
            )
        return moved

    @abstractmethod
    def _adversarial(self, victim: nn.Module, x: Tensor, labels: Tensor, classes: int) -> Tensor:
        """``x + δ``, shape of x, for logits (n, classes) of ``victim`` and labels 0 … classes − 1."""


def library(module: str, package: str) -> Any:
    """Import a library of attacks, without the warnings that its own imports raise.

    Raises:
        MissingDependencyError: with the exact install command.
    """
    with random_as_found(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return optional(module, package, "this attack", EXTRA)
        except ModuleNotFoundError as error:
            # The package is there without what it needs, as torchattacks is without torchvision.
            raise MissingDependencyError(error.name or package, package, EXTRA) from error


@contextlib.contextmanager
def random_as_found() -> Iterator[None]:
    """Put the global random states of PyTorch, NumPy and Python back afterwards."""
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = list(range(torch.cuda.device_count())) if started else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


@contextlib.contextmanager
def left_as_found(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` and no gradients of parameters inside; all as it was after."""
    leaves = [parameter for parameter in model.parameters() if parameter.is_leaf]
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in leaves]
    modes = [(module, module.training) for module in model.modules()]
    # Running means move where a library switches to training mode.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        for parameter in leaves:
            parameter.requires_grad_(False)
            parameter.grad = None
        with random_as_found(), on_device:
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, wanted, gradient in kept:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    draw = torch.randint(2**31 - 1, (), generator=generator, device=generator.device)
    return int(draw)


def _dead(query: Query, delta: Tensor) -> Tensor:
    """Which examples did not move because their margin has no gradient, (n,) bool."""
    still = is_zero(delta)
    if not bool(still.any()):
        return still
    z = query.x.detach().clone().requires_grad_()
    margins = query.margins(z)
    if not margins.requires_grad:
        return still
    (gradient,) = torch.autograd.grad(margins.sum(), z, materialize_grads=True)
    return still & is_zero(gradient)


def signature(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a class or function, by name, without the model that comes first."""
    named = {
        name: parameter
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    for model in ("model", "estimator", "classifier"):
        named.pop(model, None)
    return named


def check_options(
    kind: str, options: Mapping[str, Any], known: Mapping[str, inspect.Parameter]
) -> None:
    """Refuse options that an attack does not know, naming the nearest.

    Raises:
        SpecificationError: such an option.
    """
    for name in options:
        if name not in known:
            raise unknown(f"option of {kind}", name, known)


def named(kind: str, name: str, valid: Mapping[str, Any]) -> Any:
    """The entry of ``valid`` under ``name``, in any case of letters.

    Raises:
        SpecificationError: an unknown name; the nearest is given.
    """
    found = {key.lower(): value for key, value in valid.items()}.get(name.lower())
    if found is None:
        raise unknown(kind, name, valid)
    return found


def said_norm(
    title: str, p: float | str | None, options: Mapping[str, Any]
) -> tuple[float | str | None, dict[str, Any]]:
    """The norm by p or by the library's own ``norm``, and the options without the latter.

    Raises:
        InputError: two norms.
    """
    others = {key: value for key, value in options.items() if key != "norm"}
    if options.get("norm") is None:
        return p, others
    said = as_exponent(options["norm"])
    if p is not None and as_exponent(p) != said:
        raise InputError(f"{title}: expected one norm, got p={p} and norm={options['norm']}")
    return said, others


def norm_of(title: str, p: float | str | None, own: float | None) -> float:
    """The exponent of the ball: p, or else the attack's own.

    Raises:
        InputError: neither is known.
    """
    if p is None and own is None:
        raise InputError(f"{title}: expected the norm of its ball, as in p=2")
    return as_exponent(p if p is not None else own)  # type: ignore[arg-type]


def read_options(
    texts: Mapping[str, str], known: Mapping[str, inspect.Parameter], where: str
) -> dict[str, Any]:
    """Options from text, by the types of their defaults; unknown names are left as text.

    Raises:
        SpecificationError: a value that is not of its option's type.
    """
    read = {}
    for name, text in texts.items():
        default = known[name].default if name in known else None
        read[name] = _read(text, default, f"{where}: {name}")
    return read


def _read(text: str, default: Any, where: str) -> Any:
    if isinstance(default, bool):
        return flag(text, where)
    if isinstance(default, str):
        return word(text, where)
    if text.lower() == "none":
        return None
    if text.lower() in ("true", "false") and not isinstance(default, int | float):
        return flag(text, where)
    if text.lower() == "inf":
        return math.inf
    if text.lstrip("+-").isdigit():
        return integer(text, where)
    if isinstance(default, int | float):
        return number(text, where)
    return number(text, where) if "/" in text or _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _say(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str) else repr(value)


def _sayable(value: Any) -> bool:
    if isinstance(value, str):
        return value == value.strip() != "" and not set(value) & set(",=")
    return value is None or (isinstance(value, bool | int | float) and value == value)
