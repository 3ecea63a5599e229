"""torchattacks: its attacks as ours, and ours in its convention.

Source: torchattacks, Kim (2020).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from marginflow.attacks._base import Attack
from marginflow.attacks._foreign import (
    BOUNDS,
    ForeignAttack,
    check_options,
    library,
    named,
    norm_of,
    random_as_found,
    read_options,
    said_norm,
    signature,
)
from marginflow.attacks._logits import Layout, TwoLogits
from marginflow.errors import InputError, SpecificationError

_NORMS = {math.inf: "Linf", 2.0: "L2", 1.0: "L1"}
_L2 = ("CW", "DeepFool", "EADEN", "PGDL2", "PGDRSL2")
_LINF = (
    *("APGD", "APGDT", "BIM", "DIFGSM", "EOTPGD", "FAB", "FFGSM", "FGSM", "Jitter", "MIFGSM"),
    *("NIFGSM", "PGD", "PGDRS", "PIFGSM", "PIFGSMPP", "RFGSM", "SINIFGSM", "SPSA", "Square"),
    *("TIFGSM", "TPGD", "UPGD", "VMIFGSM", "VNIFGSM"),
)
_OWN_NORM = {"EADL1": 1.0, **dict.fromkeys(_L2, 2.0), **dict.fromkeys(_LINF, math.inf)}
_WITHOUT_DRAWS = frozenset(
    {
        *("BIM", "CW", "DeepFool", "EADEN", "EADL1", "FGSM", "MIFGSM", "NIFGSM", "PIFGSM"),
        *("PIFGSMPP", "SINIFGSM", "VANILA"),
    }
)

_FLOAT32 = frozenset({"EADEN", "EADL1", "FAB"})
"""Attacks that compute in float32 whatever they are given."""


@dataclass(frozen=True, eq=False, init=False)
class TorchattacksAttack(ForeignAttack):
    """An attack of torchattacks; see :func:`from_torchattacks`."""

    make: Any = None

    name: ClassVar[str] = "torchattacks"

    def _own_p(self) -> float | None:
        return _OWN_NORM.get(self.title)

    def _adversarial(self, victim: nn.Module, x: Tensor, labels: Tensor, classes: int) -> Tensor:
        seen = Layout(victim, x.shape[1:], x)
        images = seen.to_image(x)
        if self.title in _FLOAT32:
            images = images.float()
        given = dict(self.options)
        known = signature(self.make)
        if "n_classes" in known:
            given.setdefault("n_classes", classes)
        if "seed" in known:
            # Else these begin each batch at a seed of their own.
            given.setdefault("seed", torch.initial_seed() % 2**31)
        made = _made(self.make, seen, self.eps, given)
        made.set_device(x.device)
        return seen.from_image(made(images, labels).detach())


@random_as_found()
def from_torchattacks(
    attack: Any, eps: float, p: float | str | None = None, **options: Any
) -> Attack:
    """An attack of torchattacks as one of ours.

    ::

        attack = mf.attacks.from_torchattacks("PGDL2", eps=1.5, alpha=0.375, steps=10)
        attack = mf.attacks.from_torchattacks(torchattacks.PGDL2, eps=1.5, alpha=0.375, steps=10)
        attack = mf.attacks.from_torchattacks(lambda model: MyAttack(model), eps=1.5, p=2)

    torchattacks keeps examples in [0, 1], so these are the bounds. It knows images
    only: other examples are shown to it as the pixels of a square image. Attacks that seek the smallest
    perturbation are clipped to ε. Other promises as for :class:`ForeignAttack`.

    Args:
        attack: a class of torchattacks, the name of one, or a function of the model that makes an attack.
        eps: the budget ε ≥ 0, in the units of x, given to the attack if it takes an ``eps``.
        p: the norm of the ball; by default the attack's own.
        options: of the class. ``n_classes`` and ``seed`` are given where they are taken.

    Raises:
        MissingDependencyError: torchattacks is not installed.
        SpecificationError: an unknown name or option; the nearest is given.
        InputError: options that torchattacks refuses, a norm that must be said.
    """
    module = library("torchattacks", "torchattacks")
    if attack is module.AutoAttack or str(attack).lower() == "autoattack":
        raise SpecificationError(
            "torchattacks' AutoAttack needs four classes and takes 10 steps; use mf.attacks.AutoAttack, "
            "as autoattack-linf:eps=8/255, which runs its parts on any network"
        )
    if isinstance(attack, str):
        attack = named("attack of torchattacks", attack, _attacks(module))
    if not callable(attack) or isinstance(attack, module.attack.Attack):
        raise InputError(
            "from_torchattacks: expected a class of torchattacks, its name or a function of the "
            f"model, got {attack!r}; an attack that has its model already fits no other"
        )
    title = getattr(attack, "__name__", type(attack).__name__)
    is_class = inspect.isclass(attack) and issubclass(attack, module.attack.Attack)
    if not is_class and options:
        raise InputError(f"from_torchattacks: expected no options with a function, got {options}")
    known = signature(attack) if is_class else {}
    check_options(title, options, known)
    # Said by p alone, which the specification string carries.
    p, options = said_norm(title, p, options)
    exponent = norm_of(title, p, _OWN_NORM.get(title) if is_class else None)
    make = attack
    if "norm" in known:
        if exponent not in _NORMS:
            raise SpecificationError(f"{title}: expected the norm l1, l2 or linf, got {p}")
        make = _WithNorm(attack, _NORMS[exponent])
    made = TorchattacksAttack(
        title,
        eps,
        exponent,
        BOUNDS,
        options,
        sayable=is_class and _attacks(module).get(title) is attack,
        draws=_draws(attack, title, options),
    )
    object.__setattr__(made, "make", make)
    if is_class:
        # Refuses before the first step what it would refuse in it.
        try:
            _made(make, nn.Linear(1, 2), made.eps, {**options})
        except Exception as error:
            raise InputError(f"torchattacks: {title}: {error}") from error
    return made


@dataclass(frozen=True)
class _WithNorm:
    """A class of torchattacks with its ``norm`` given."""

    kind: Any
    norm: str

    def __call__(self, model: nn.Module, **options: Any) -> Any:
        return self.kind(model, norm=self.norm, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.kind)


def build_torchattacks(title: str, texts: Mapping[str, str], where: str, **common: Any) -> Attack:
    """The attack of a specification string."""
    if "bounds" in common:
        raise SpecificationError(
            f"{where}: torchattacks knows the bounds 0..1 only; leave them out"
        )
    kind = _attacks(library("torchattacks", "torchattacks"))
    known = {name.lower(): signature(each) for name, each in kind.items()}
    options = read_options(texts, known.get(title.lower(), {}), where)
    return from_torchattacks(title, **common, **options)


def to_torchattacks(attack: Attack, model: nn.Module, *, seed: int = 0) -> Any:
    """One of our attacks as a torchattacks attack: ``adversarial = found(images, labels)``.

    Its ``save``, ``MultiAttack`` and ``set_normalization_used`` work. The model that it holds
    has two logits if ``model`` has one output; MultiAttack wants its attacks to share it,
    which those made here for one network do. Theirs share it if made with ``found.model``.

    Args:
        attack: our attack.
        model: the network; it is not copied.
        seed: of random starts, which go on from call to call.

    Raises:
        MissingDependencyError: torchattacks is not installed.
    """
    module = library("torchattacks", "torchattacks")
    generator = torch.Generator().manual_seed(seed)

    base: Any = module.attack.Attack

    class Marginflow(base):  # type: ignore[misc]
        """Our attack in torchattacks' convention."""

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            """``x + δ`` for labels 0 … C − 1."""
            images = images.clone().detach().to(self.device)
            labels = labels.clone().detach().to(self.device).long()
            seen = _Normalized(self)
            return images + attack(seen, images, labels, generator=generator).delta

    # The attribute `attack` is the name that torchattacks prints.
    return Marginflow(f"marginflow {attack.spec}", TwoLogits.of(model))


class _Normalized(nn.Module):
    """The logits that a torchattacks attack sees, whether or not it normalises inputs."""

    def __init__(self, attack: Any) -> None:
        super().__init__()
        self.model = attack.model
        self.training = False
        self.logits = attack.get_logits

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(x)
        return logits


def _attacks(module: Any) -> dict[str, Any]:
    left_out = {*module.__wrapper__, "AutoAttack"}
    return {name: getattr(module, name) for name in module.__all__ if name not in left_out}


def _draws(attack: Any, title: str, options: Mapping[str, Any]) -> bool:
    if not inspect.isclass(attack):
        return True
    starts = signature(attack).get("random_start")
    if starts is not None and title in ("PGD", "PGDL2", "UPGD"):
        return bool(options.get("random_start", starts.default))
    return title not in _WITHOUT_DRAWS


def _made(make: Callable[..., Any], model: nn.Module, eps: float, options: dict[str, Any]) -> Any:
    if "eps" in signature(make):
        options.setdefault("eps", eps)
    return make(model, **options)
