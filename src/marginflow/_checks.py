"""Argument checks shared by every floor: *expected …, got …, do …*."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable
from typing import Any

from marginflow.errors import InputError, MissingDependencyError, SpecificationError


def optional(
    module: str, package: str, purpose: str, extra: str | None = None, command: str | None = None
) -> Any:
    """Import ``module``, or say how to install the package that brings it.

    The command is ``command``, or pip with the extra or the package.

    Raises:
        MissingDependencyError: with the exact install command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there, but something that it needs is not
        raise MissingDependencyError(package, purpose, extra, command) from None


def unknown(kind: str, name: str, valid: Iterable[str]) -> SpecificationError:
    """The error for an unknown name, with the nearest valid one."""
    names = sorted(valid)
    lowered = {valid_name.lower(): valid_name for valid_name in names}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.4)
    hint = f"; did you mean {lowered[near[0]]!r}?" if near else ""
    return SpecificationError(f"unknown {kind} {name!r}{hint} (valid: {', '.join(names)})")


def real(name: str, value: object, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """``value`` as a finite float with ``value >= least`` and ``value > above``.

    Raises:
        InputError: not a number, NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer above 1e308
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name}: expected a finite number, got {value!r}")
    if number < least:
        raise InputError(f"{name}: expected a number of at least {least:g}, got {value!r}")
    if number <= above:
        raise InputError(f"{name}: expected a number above {above:g}, got {value!r}")
    return number


def whole(name: str, value: object, *, least: int) -> int:
    """``value`` as an integer of at least ``least``.

    Raises:
        InputError: not an integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise InputError(f"{name}: expected a whole number of at least {least}, got {value}")
    return value


def choice(name: str, value: object, valid: Iterable[str]) -> str:
    """``value`` if it is one of ``valid``.

    Raises:
        SpecificationError: it is not; the message names the nearest valid one.
    """
    options = tuple(valid)
    if not isinstance(value, str) or value not in options:
        raise unknown(name, str(value), options)
    return value
