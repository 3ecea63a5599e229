"""foolbox: its attacks as ours, our networks and attacks in its conventions.

Source: foolbox, Rauber et al. (2020).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
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
    signature,
)
from marginflow.attacks._logits import TwoLogits
from marginflow.errors import InputError

_WITHOUT_DRAWS = frozenset(
    {
        *("DDNAttack", "EADAttack", "L2CarliniWagnerAttack", "L2ContrastReductionAttack"),
        *("L2DeepFoolAttack", "LinfDeepFoolAttack", "NewtonFoolAttack"),
    }
)
"""Attacks that draw nothing, of those that do not say so by ``random_start``."""


@dataclass(frozen=True, eq=False, init=False)
class FoolboxAttack(ForeignAttack):
    """An attack of foolbox; see :func:`from_foolbox`."""

    attack: Any = None

    name: ClassVar[str] = "foolbox"

    def _own_p(self) -> float | None:
        return _distance_p(self.attack)

    def _adversarial(self, victim: nn.Module, x: Tensor, labels: Tensor, classes: int) -> Tensor:
        seen = to_foolbox_model(victim, self.bounds, like=x)
        raw, clipped, _ = self.attack(seen, x, labels, epsilons=self.eps)
        # Where foolbox means another norm than we do, its clip to ε is none of ours.
        moved: Tensor = clipped if self._own_p() == self.p else raw
        return moved


@random_as_found()
def from_foolbox(
    attack: Any,
    eps: float,
    p: float | str | None = None,
    *,
    bounds: tuple[float, float] | None = BOUNDS,
    **options: Any,
) -> Attack:
    """An attack of foolbox as one of ours.

    ::

        attack = mf.attacks.from_foolbox("LinfPGD", eps=8/255, steps=20)
        attack = mf.attacks.from_foolbox(foolbox.attacks.LinfPGD(steps=20), eps=8/255)

    An attack that seeks the smallest perturbation is clipped to ε, as foolbox does. Other promises
    as for :class:`ForeignAttack`.

    Args:
        attack: an attack of foolbox, its class, or the name of one in ``foolbox.attacks``.
        eps: the budget ε ≥ 0, in the units of x, foolbox's ``epsilons``.
        p: the norm of the ball; by default the attack's own distance.
        bounds: the range of x + δ and the model's bounds in foolbox; None for unbounded inputs.
        options: of the class, if it is not yet an attack.

    Raises:
        MissingDependencyError: foolbox is not installed.
        SpecificationError: an unknown name or option; the nearest is given.
        InputError: options that foolbox refuses, a norm that must be said.
    """
    module = library("foolbox", "foolbox")
    base = module.attacks.base.Attack
    if isinstance(attack, str):
        attack = named("attack of foolbox", attack, _attacks(module))
    if isinstance(attack, base):
        if options:
            raise InputError(
                f"from_foolbox: expected no options with an attack, got {', '.join(options)}; "
                "give them to the attack"
            )
        found: Mapping[str, Any] | None = _options_of(attack)
    elif inspect.isclass(attack) and issubclass(attack, base):
        check_options(attack.__name__, options, signature(attack))
        try:
            attack = attack(**options)
        except Exception as error:
            raise InputError(f"foolbox: {attack.__name__}: {error}") from error
        found = options
    else:
        raise InputError(
            f"from_foolbox: expected an attack of foolbox, its class or name, got {attack!r}"
        )
    kind = type(attack)
    starts = getattr(attack, "random_start", None)
    made = FoolboxAttack(
        kind.__name__,
        eps,
        norm_of(kind.__name__, p, _distance_p(attack)),
        bounds,
        found or {},
        sayable=found is not None and getattr(module.attacks, kind.__name__, None) is kind,
        draws=bool(starts) if starts is not None else kind.__name__ not in _WITHOUT_DRAWS,
    )
    object.__setattr__(made, "attack", attack)
    return made


def build_foolbox(title: str, texts: Mapping[str, str], where: str, **common: Any) -> Attack:
    """The attack of a specification string."""
    kind = named("attack of foolbox", title, _attacks(library("foolbox", "foolbox")))
    return from_foolbox(kind, **common, **read_options(texts, signature(kind), where))


def to_foolbox_model(
    model: nn.Module, bounds: tuple[float, float] | None = BOUNDS, *, like: Tensor | None = None
) -> Any:
    """A ``foolbox.PyTorchModel`` of the network, with two logits if it has one output.

    ::

        fmodel = mf.attacks.to_foolbox_model(model, bounds=(0, 1))
        foolbox.accuracy(fmodel, images, labels)          # labels 0 … C − 1

    Args:
        model: the network, in evaluation mode; it is not copied and not moved.
        bounds: the range of the inputs; None for unbounded ones.
        like: inputs, (n, …), if the network has no parameters that tell device and dtype.

    Raises:
        MissingDependencyError: foolbox is not installed.
    """
    module = library("foolbox", "foolbox")
    like = next(model.parameters(), torch.empty(0)) if like is None else like
    # foolbox compares numbers of the inputs with the bounds as Python floats.
    low, high = (-math.inf, math.inf) if bounds is None else map(float, like.new_tensor(bounds))
    return module.PyTorchModel(TwoLogits.of(model), bounds=(low, high), device=like.device)


def to_foolbox(attack: Attack, *, seed: int = 0) -> Any:
    """One of our attacks as a foolbox attack, ``raw, clipped, success = attack(fmodel, x, y, epsilons=…)``.

    Each of ``epsilons`` takes the place of the attack's own ε, by :meth:`Attack.with_eps`: steps of
    PGD shrink and grow with it. Where the attack has no bounds, it takes the model's.

    Args:
        attack: our attack.
        seed: of random starts; they go on from call to call, so that foolbox's ``repeat`` restarts.

    Raises:
        MissingDependencyError: foolbox is not installed.
        InputError: on the call: a targeted criterion, a model that is not of PyTorch.
    """
    module = library("foolbox", "foolbox")
    generator = torch.Generator().manual_seed(seed)

    base: Any = module.attacks.base.FixedEpsilonAttack

    class Marginflow(base):  # type: ignore[misc]
        """Our attack in foolbox's convention."""

        distance = module.distances.LpDistance(attack.p)

        def __repr__(self) -> str:
            return f"Marginflow({attack.spec})"

        def run(
            self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any
        ) -> Any:
            """``x + δ`` with budget ``epsilon``."""
            module.attacks.base.raise_if_kwargs(kwargs)
            criterion = module.attacks.base.get_criterion(criterion)
            if not isinstance(criterion, module.criteria.Misclassification):
                raise InputError(
                    "expected labels or foolbox.Misclassification, got "
                    f"{type(criterion).__name__}: our attacks are untargeted"
                )
            x, labels = (getattr(tensor, "raw", tensor) for tensor in (inputs, criterion.labels))
            if not isinstance(x, Tensor):
                raise InputError(f"expected inputs of PyTorch, got {type(x).__name__}")
            own = attack.with_eps(float(epsilon))
            bounds = (float(model.bounds[0]), float(model.bounds[1]))
            if own.bounds is None and all(map(math.isfinite, bounds)):
                own = own.with_bounds(bounds)
            moved = x + own(_Called(model), x, labels, generator=generator).delta
            return type(inputs)(moved) if hasattr(inputs, "raw") else moved

    return Marginflow()


class _Called(nn.Module):
    """A foolbox model as a network."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.called = model
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.called(x)
        return outputs


def _attacks(module: Any) -> dict[str, Any]:
    """The attacks of foolbox by name, aliases such as ``LinfPGD`` among them."""
    base = module.attacks.base.AttackWithDistance
    return {
        name: kind
        for name, kind in vars(module.attacks).items()
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
    }


def _distance_p(attack: Any) -> float | None:
    """The exponent of the attack's distance, if it is one of ours."""
    try:
        p = float(attack.distance.p)
    except (AttributeError, TypeError, ValueError):
        return None
    return p if p >= 1 else None


def _options_of(attack: Any) -> dict[str, Any] | None:
    """What an attack was made with, where its class differs from that; None if it does not tell."""
    options = {}
    for name, parameter in signature(type(attack)).items():
        if not hasattr(attack, name):
            return None
        if (value := getattr(attack, name)) is not parameter.default and value != parameter.default:
            options[name] = value
    try:
        again = type(attack)(**options)
    except Exception:
        return None
    return options if repr(again) == repr(attack) else None
