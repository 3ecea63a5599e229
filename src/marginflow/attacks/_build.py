"""Attacks from specification strings, and the check of a budget against the data.

Source: marginflow; each attack names its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marginflow._checks import unknown
from marginflow._reading import open_file
from marginflow._specs import Spec, flag, integer, interval, number, parse, word
from marginflow.attacks._art import build_art
from marginflow.attacks._autoattack import AutoAttack
from marginflow.attacks._base import Attack, describe_norm
from marginflow.attacks._exact import ExactLinear, FiniteSet
from marginflow.attacks._foolbox import build_foolbox
from marginflow.attacks._gradient import FGM, FGSM, PGD
from marginflow.attacks._torchattacks import build_torchattacks
from marginflow.errors import InputError, SpecificationError

_COMMON: dict[str, Callable[[str, str], Any]] = {
    "bounds": interval,
    "eps": number,
    "objective": word,
}


def build(spec: str | Attack | None) -> Attack | None:
    """An attack from its specification; an attack or None is passed on.

    ``none``, ``fgm:eps=1.5``, ``fgsm:eps=16/255``, ``pgd-linf:eps=16/255,steps=5,step=6/255``,
    ``pgd-l2:…,random=true``, ``exact-linear:p=2,eps=0.05``, ``finite-set:deltas.npy``; all but the last two
    also take ``bounds=0..1`` and ``objective=loss``.

    Of other libraries, by the names and options of their classes: ``foolbox:LinfPGD,eps=8/255,steps=20``,
    ``torchattacks:PGDL2,eps=1.5,alpha=0.375``, ``art:FastGradientMethod,eps=1.5,norm=2``, and
    ``autoattack-linf:eps=8/255``. They also take ``p=…`` and ``bounds=…``, by default 0..1.

    Args:
        spec: the specification; an attack or None is passed on.

    Raises:
        SpecificationError: malformed, an unknown name or option (the nearest is given),
            a missing ``eps``; an attack object of another library.
        InputError: a number out of range, a file that cannot be read.
        MissingDependencyError: the library of the attack is not installed.
    """
    if spec is None or isinstance(spec, Attack):
        return spec
    kind = spec if isinstance(spec, type) else type(spec)
    if (library := kind.__module__.partition(".")[0]) in _LIBRARIES:
        raise SpecificationError(
            f"attack: expected a specification or an attack of marginflow, got {library}'s "
            f"{kind.__name__}; give mf.attacks.from_{library}({kind.__name__}, eps=…)"
        )
    parsed = parse(spec, "attack")
    if any(parsed.name.startswith(f"{kind}(") for kind in _NAMED):
        raise SpecificationError(
            f"attack {spec!r}: this describes an attack that no string builds; "
            "give the attack itself, as attack=…"
        )
    if parsed.name not in _KINDS:
        raise unknown("attack", parsed.name, _KINDS)
    if parsed.args and parsed.name not in _NAMED:
        raise SpecificationError(
            f"attack {spec!r}: {parsed.args[0]!r} has no name; write eps={parsed.args[0]}"
        )
    return _KINDS[parsed.name](parsed)


def check_budget(
    attack: Attack | None, shape: Sequence[int], bounds: tuple[float, float] | None
) -> None:
    """Refuse an ε with which any example becomes any other one of the pixel range.

    Args:
        attack: the attack, or None.
        shape: shape of one example.
        bounds: the range of the data's pixels, or None if it has none.

    Raises:
        InputError: ε exceeds ``(high − low) d^{1/p}``, the diameter of the range.
    """
    if attack is None or bounds is None:
        return
    features = math.prod(shape)
    diameter = (bounds[1] - bounds[0]) * (1 if math.isinf(attack.p) else features ** (1 / attack.p))
    if attack.eps > diameter:
        raise InputError(
            f"eps: expected at most {diameter:g}, the {describe_norm(attack.p)} size of the pixel range "
            f"[{bounds[0]:g}, {bounds[1]:g}] in {features} pixels, got {attack.eps:g}; "
            "is it in units of 1/255? Write eps=16/255"
        )


def _options(spec: Spec, **more: Callable[[str, str], Any]) -> dict[str, Any]:
    options = spec.parsed({**_COMMON, **more})
    if "eps" not in options:
        raise SpecificationError(
            f"attack {spec.text!r}: expected eps=…, as in {spec.name}:eps=16/255"
        )
    return options


def _pgd(norm: str) -> Callable[[Spec], Attack]:
    def make(spec: Spec) -> Attack:
        options = _options(spec, steps=integer, step=number, random=flag)
        if "step" in options:
            options["step_size"] = options.pop("step")
        return PGD(norm, random_start=options.pop("random", False), **options)

    return make


def _exact_linear(spec: Spec) -> Attack:
    options = spec.parsed({"eps": number, "p": word})
    for key in ("eps", "p"):
        if key not in options:
            raise SpecificationError(
                f"attack {spec.text!r}: expected {key}=…, as in exact-linear:p=2,eps=0.05"
            )
    return ExactLinear(**options)


def _finite_set(spec: Spec) -> Attack:
    path = Path(spec.rest)
    try:
        with open_file(path) as file:
            deltas = np.load(file, allow_pickle=False)
    except Exception as error:
        # Whatever NumPy may raise on a forged file: see marginflow.datasets on .npz files.
        reason = getattr(error, "strerror", None) or str(error)
        if "pickle" in reason:  # NumPy's advice would be to load it all the same
            reason = "it is no .npy file of numbers; save an array with numpy.save"
        raise InputError(
            f"finite-set: cannot read perturbations from {str(path)!r}: {reason}"
        ) from None
    if not isinstance(deltas, np.ndarray) or deltas.dtype.kind != "f":
        raise InputError(f"finite-set: expected one .npy array of floats in {str(path)!r}")
    return FiniteSet(torch.as_tensor(deltas.astype(np.float64)))


def _foreign(make: Callable[..., Attack]) -> Callable[[Spec], Attack]:
    def made(spec: Spec) -> Attack:
        example = f"{spec.name}:NAME,eps=8/255"
        if len(spec.args) != 1:
            raise SpecificationError(
                f"attack {spec.text!r}: expected the name of one attack first, as in {example}"
            )
        texts = dict(spec.options)
        common: dict[str, Any] = {}
        for key, read in (("eps", number), ("p", word), ("bounds", _bounds)):
            if key in texts:
                common[key] = read(texts.pop(key), f"{spec.text!r}: {key}")
        if "eps" not in common:
            raise SpecificationError(f"attack {spec.text!r}: expected eps=…, as in {example}")
        return make(spec.args[0], texts, repr(spec.text), **common)

    return made


def _autoattack(norm: str) -> Callable[[Spec], Attack]:
    def make(spec: Spec) -> Attack:
        known = {"eps": number, "steps": integer, "queries": integer, "bounds": _bounds}
        options = spec.parsed(known)
        if "eps" not in options:
            raise SpecificationError(
                f"attack {spec.text!r}: expected eps=…, as in {spec.name}:eps=8/255"
            )
        return AutoAttack(norm, **options)

    return make


def _bounds(value: str, where: str) -> tuple[float, float] | None:
    return None if value.lower() == "none" else interval(value, where)


def _none(spec: Spec) -> Attack | None:
    spec.parsed({})
    return None


_KINDS: dict[str, Callable[[Spec], Attack | None]] = {
    "art": _foreign(build_art),
    "autoattack-l2": _autoattack("l2"),
    "autoattack-linf": _autoattack("linf"),
    "exact-linear": _exact_linear,
    "fgm": lambda spec: FGM(**_options(spec)),
    "fgsm": lambda spec: FGSM(**_options(spec)),
    "finite-set": _finite_set,
    "foolbox": _foreign(build_foolbox),
    "none": _none,
    "pgd-l2": _pgd("l2"),
    "pgd-linf": _pgd("linf"),
    "torchattacks": _foreign(build_torchattacks),
}
_LIBRARIES = frozenset({"art", "foolbox", "torchattacks"})
"""Modules of which an attack object is made one of ours by ``from_…``."""
_NAMED = frozenset({"art", "finite-set", "foolbox", "torchattacks"})
"""Kinds whose first argument is a name; some of them are described as ``kind(…)``, which builds none."""
