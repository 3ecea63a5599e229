"""The Adversarial Robustness Toolbox (ART): its attacks as ours, ours in its conventions.

Source: adversarial-robustness-toolbox, Nicolae et al. (2018).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from marginflow._checks import whole
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
from marginflow.errors import DataError, InputError
from marginflow.norms import as_exponent

_PACKAGE = "adversarial-robustness-toolbox"
_OWN_NORM = {
    **dict.fromkeys(("CarliniL2Method", "DeepFool", "NewtonFool"), 2.0),
    **dict.fromkeys(("BasicIterativeMethod", "CarliniLInfMethod"), math.inf),
}
_WITHOUT_DRAWS = frozenset(
    {"BasicIterativeMethod", "CarliniL2Method", "CarliniLInfMethod", "DeepFool", "NewtonFool"}
)


@dataclass(frozen=True, eq=False, init=False)
class ArtAttack(ForeignAttack):
    """An evasion attack of ART; see :func:`from_art`."""

    make: Any = None

    name: ClassVar[str] = "art"

    def _own_p(self) -> float | None:
        return _own_norm(self.title, signature(self.make))

    def _adversarial(self, victim: nn.Module, x: Tensor, labels: Tensor, classes: int) -> Tensor:
        # ART computes in float32, whatever the network does.
        seen = Layout(victim, x.shape[1:], x, as_images=False)
        estimator = _estimator(seen, x, classes, self.bounds)
        made = _made(self.make, estimator, self.eps, self.p, self.options)
        found = made.generate(x.float().cpu().numpy(), y=labels.cpu().numpy())
        return torch.from_numpy(found).to(x)


@random_as_found()
def from_art(
    attack: Any,
    eps: float,
    p: float | str | None = None,
    *,
    bounds: tuple[float, float] | None = BOUNDS,
    **options: Any,
) -> Attack:
    """An evasion attack of ART as one of ours.

    ::

        attack = mf.attacks.from_art("ProjectedGradientDescent", eps=8/255, eps_step=2/255, max_iter=20)
        attack = mf.attacks.from_art(art.attacks.evasion.FastGradientMethod, eps=1.5, norm=2)

    ART computes in float32. Its BoundaryAttack, BrendelBethge and HopSkipJump take seeds of the operating
    system, so these alone differ from call to call. Attacks that seek the smallest perturbation are
    clipped to ε. Other promises as for :class:`ForeignAttack`.

    Args:
        attack: a class of ``art.attacks.evasion``, the name of one, or a function of the estimator that
            makes an attack.
        eps: the budget ε ≥ 0, in the units of x, given to the attack if it takes an ``eps``.
        p: the norm of the ball, given as ``norm`` if that is taken; by default the attack's own.
        bounds: the range of x + δ, ART's ``clip_values``.
        options: of the class.

    Raises:
        MissingDependencyError: ART is not installed.
        SpecificationError: an unknown name or option; the nearest is given.
        InputError: options that ART refuses, a norm that must be said.
    """
    module = library("art.attacks.evasion", _PACKAGE)
    base = library("art.attacks.attack", _PACKAGE).EvasionAttack
    if isinstance(attack, str):
        attack = named("attack of ART", attack, _attacks(module, base))
    if not callable(attack):
        raise InputError(
            "from_art: expected a class of art.attacks.evasion, its name or a function of the "
            f"estimator, got {attack!r}; an attack that has its estimator already fits no other"
        )
    title = getattr(attack, "__name__", type(attack).__name__)
    is_class = inspect.isclass(attack) and issubclass(attack, base)
    if not is_class and options:
        raise InputError(f"from_art: expected no options with a function, got {options}")
    known = signature(attack) if is_class else {}
    check_options(title, options, known)
    # Said by p alone, which the specification string carries.
    p, options = said_norm(title, p, options)
    made = ArtAttack(
        title,
        eps,
        norm_of(title, p, _own_norm(title, known)),
        bounds,
        options,
        sayable=is_class and _attacks(module, base).get(title) is attack,
        draws=_draws(title, known, options),
    )
    object.__setattr__(made, "make", attack)
    if is_class:
        # Refuses before the first step what it would refuse in it.
        try:
            tiny = _estimator(TwoLogits(nn.Linear(1, 1)), torch.zeros(1, 1), 2, made.bounds)
            _made(attack, tiny, made.eps, made.p, options)
        except Exception as error:
            raise InputError(f"art: {title}: {error}") from error
    return made


def build_art(title: str, texts: Mapping[str, str], where: str, **common: Any) -> Attack:
    """The attack of a specification string."""
    module = library("art.attacks.evasion", _PACKAGE)
    base = library("art.attacks.attack", _PACKAGE).EvasionAttack
    kind = named("attack of ART", title, _attacks(module, base))
    return from_art(kind, **common, **read_options(texts, signature(kind), where))


def to_art(
    model: nn.Module,
    x: Tensor,
    bounds: tuple[float, float] | None = BOUNDS,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """An ART ``PyTorchClassifier`` of the network, with two logits if it has one output.

    ::

        estimator = mf.attacks.to_art(model, x)
        accuracy = (estimator.predict(x.numpy()).argmax(1) == labels.numpy()).mean()

    ART takes and gives float32 and labels 0 … C − 1. It leaves the network in evaluation mode and
    its gradients cleared: give it a copy where that matters.

    Args:
        model: the network; it is not copied.
        x: examples, (n, …), of which shape and number of classes are taken.
        bounds: ART's ``clip_values``.
        optimizer: for ART's ``fit``.

    Raises:
        MissingDependencyError: ART is not installed.
    """
    library("art", _PACKAGE)
    like = next(model.parameters(), x)
    seen = Layout(_NeverAbstaining(model), x.shape[1:], like, as_images=False)
    with torch.no_grad():
        classes = seen(x[:1].to(like)).shape[1]
    return _estimator(seen, like, classes, bounds, tuple(x.shape[1:]), optimizer)


def to_art_attack(attack: Attack, estimator: Any, *, batch_size: int = 1024, seed: int = 0) -> Any:
    """One of our attacks as an ART evasion attack, with ``generate(x, y)``.

    Without labels the estimator's predictions take their place, as in ART's own attacks. Where the
    attack has no bounds, it takes the estimator's ``clip_values``. ``set_params(eps=…)`` changes ε as
    :meth:`Attack.with_eps` does.

    Args:
        attack: our attack.
        estimator: of :func:`to_art`, or any ``PyTorchClassifier`` without preprocessing.
        batch_size: examples at a time.
        seed: of random starts, which go on from call to call.

    Raises:
        MissingDependencyError: ART is not installed.
        InputError: an estimator that is no ``PyTorchClassifier``, or one with defences.
    """
    base: Any = library("art.attacks.attack", _PACKAGE).EvasionAttack
    estimators = library("art.estimators.classification", _PACKAGE)
    utils = library("art.utils", _PACKAGE)
    if not isinstance(estimator, estimators.PyTorchClassifier):
        raise InputError(
            f"to_art_attack: expected a PyTorchClassifier, got {type(estimator).__name__}; "
            "mf.attacks.to_art(model, x) makes one"
        )
    if estimator.preprocessing_defences or estimator.postprocessing_defences:
        raise InputError(
            "to_art_attack: expected an estimator without defences; the attack sees its network only"
        )
    clip = estimator.clip_values
    if attack.bounds is None and clip is not None:
        attack = attack.with_bounds((float(clip[0]), float(clip[1])))
    generator = torch.Generator().manual_seed(seed)

    class Marginflow(base):  # type: ignore[misc]
        """Our attack in ART's convention."""

        attack_params = (*base.attack_params, "norm", "eps", "batch_size")
        _estimator_requirements = (estimators.PyTorchClassifier,)

        def __init__(self) -> None:
            super().__init__(estimator=estimator)
            self.norm, self.eps, self.batch_size = attack.p, attack.eps, batch_size

        def _check_params(self) -> None:
            super()._check_params()
            whole("batch_size", getattr(self, "batch_size", batch_size), least=1)
            if getattr(self, "norm", attack.p) != attack.p:
                raise InputError(f"norm: expected {attack.p:g}, got {self.norm}")

        def generate(self, x: Any, y: Any = None, **kwargs: Any) -> Any:
            """``x + δ`` as an array; labels as numbers or one-hot."""
            if kwargs:
                raise InputError(f"generate: expected x and y, got {', '.join(kwargs)} too")
            if y is None:
                y = estimator.predict(x, batch_size=self.batch_size)
            one_hot = utils.check_and_transform_label_format(y, nb_classes=estimator.nb_classes)
            labels = torch.from_numpy(one_hot).argmax(dim=1).to(estimator.device)
            inputs: Tensor = torch.from_numpy(x).to(estimator.device)
            if len(labels) != len(inputs):
                raise DataError(f"expected as many labels as examples, got {len(labels)}")
            own = attack.with_eps(float(self.eps))
            size = int(self.batch_size)
            batches = zip(torch.split(inputs, size), torch.split(labels, size), strict=True)
            moved = [
                some + own(estimator.model, some, of, generator=generator).delta
                for some, of in batches
            ]
            return torch.cat(moved).cpu().numpy()

    return Marginflow()


class _NeverAbstaining(TwoLogits):
    """Two logits whose sum is not 0, which ART's ``compute_accuracy`` takes for an abstention."""

    def forward(self, x: Tensor) -> Tensor:
        """``[max(−f, 0), max(f, 0)]``: ``[−f/2, f/2]`` shifted, with the same derivatives."""
        logits = super().forward(x)
        if logits.shape[1] > 2:
            return logits
        return logits - logits.detach().amin(dim=1, keepdim=True)


def _estimator(
    model: nn.Module,
    like: Tensor,
    classes: int,
    bounds: tuple[float, float] | None,
    shape: tuple[int, ...] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    classification = library("art.estimators.classification", _PACKAGE)
    return classification.PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        tuple(like.shape[1:]) if shape is None else shape,
        classes,
        optimizer=optimizer,
        clip_values=bounds,
        device_type="gpu" if like.is_cuda else "cpu",
    )


def _attacks(module: Any, base: Any) -> dict[str, Any]:
    return {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
    }


def _own_norm(title: str, known: Mapping[str, inspect.Parameter]) -> float | None:
    if "norm" in known:
        return as_exponent(known["norm"].default)
    return _OWN_NORM.get(title)


def _draws(title: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> bool:
    if "num_random_init" not in known:
        return title not in _WITHOUT_DRAWS
    starts = options.get("num_random_init", known["num_random_init"].default)
    return bool(starts) or bool(options.get("random_eps", False))


def _made(
    make: Callable[..., Any], estimator: Any, eps: float, p: float, options: Mapping[str, Any]
) -> Any:
    known, given = signature(make), dict(options)
    for name, value in (("eps", eps), ("norm", p), ("verbose", False)):
        if name in known:
            given.setdefault(name, value)
    return make(estimator, **given)
