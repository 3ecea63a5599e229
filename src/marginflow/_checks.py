"""Argument checks shared by every floor: *expected …, got …, do …*."""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from marginflow.errors import InputError, MissingDependencyError, SpecificationError

_LARGEST = 2**63 - 1  # what PyTorch takes as an integer


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
    """``value`` as a finite float with ``value >= least`` and ``value > above``; NumPy's numbers too.

    Raises:
        InputError: not a number, NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
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


def whole(name: str, value: object, *, least: int, most: int = _LARGEST) -> int:
    """``value`` as an integer from ``least`` to ``most``; NumPy's integers too.

    Raises:
        InputError: not an integer, too small or too large.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name}: expected a whole number, got {value!r}")
    number = int(value)
    if number < least:
        raise InputError(f"{name}: expected a whole number of at least {least}, got {number}")
    if number > most:
        raise InputError(f"{name}: expected a whole number of at most {most}, got {number}")
    return number


def instance(name: str, value: object, kind: Any, expected: str) -> None:
    """Refuse a ``value`` that is not of the type ``kind``, or of one of several.

    Raises:
        InputError: the message says what was ``expected``.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name}: expected {expected}, got {_shown(value)}")


def place(name: str, value: object) -> Path:
    """``value`` as a path.

    Raises:
        InputError: neither text nor a path, or one with a NUL character.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise InputError(f"{name}: expected a path without NUL characters, got {_shown(value)}")
    return Path(text)


def _shown(value: object) -> str:
    """A short text as it is, of other things the type."""
    return repr(value) if isinstance(value, str | int | float) else type(value).__name__


def choice(name: str, value: object, valid: Iterable[str]) -> str:
    """``value`` if it is one of ``valid``.

    Raises:
        SpecificationError: it is not; the message names the nearest valid one.
    """
    options = tuple(valid)
    if not isinstance(value, str) or value not in options:
        raise unknown(name, str(value), options)
    return value
