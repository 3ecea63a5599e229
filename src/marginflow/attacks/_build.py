"""Attacks from specification strings, and the check of a budget against the data."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marginflow._checks import unknown
from marginflow._specs import Spec, flag, integer, interval, number, parse, word
from marginflow.attacks._base import Attack, describe_norm
from marginflow.attacks._exact import ExactLinear, FiniteSet
from marginflow.attacks._gradient import FGM, FGSM, PGD
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

    Raises:
        SpecificationError: malformed, an unknown name or option (the nearest is given),
            a missing ``eps``.
        InputError: a number out of range, a file that cannot be read.
    """
    if spec is None or isinstance(spec, Attack):
        return spec
    parsed = parse(spec, "attack")
    if parsed.name not in _KINDS:
        raise unknown("attack", parsed.name, _KINDS)
    if parsed.args and parsed.name != "finite-set":
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
        with path.open("rb") as file:
            deltas = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"finite-set: cannot read perturbations from {str(path)!r}: {error}"
        ) from None
    if not isinstance(deltas, np.ndarray) or deltas.dtype.kind != "f":
        raise InputError(f"finite-set: expected one .npy array of floats in {str(path)!r}")
    return FiniteSet(torch.as_tensor(deltas.astype(np.float64)))


def _none(spec: Spec) -> Attack | None:
    spec.parsed({})
    return None


_KINDS: dict[str, Callable[[Spec], Attack | None]] = {
    "exact-linear": _exact_linear,
    "fgm": lambda spec: FGM(**_options(spec)),
    "fgsm": lambda spec: FGSM(**_options(spec)),
    "finite-set": _finite_set,
    "none": _none,
    "pgd-l2": _pgd("l2"),
    "pgd-linf": _pgd("linf"),
}
