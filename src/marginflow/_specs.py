"""Specification strings: the one grammar of command line, config file and Python API.

    name                        fgsm
    name:arg,arg                mlp:1024,64
    name:key=value,key=value    pgd-linf:eps=16/255,steps=5,step=6/255
    name:arg,key=value          mnist:3,8,n=1000

Numbers may be fractions (``16/255``). This module knows the grammar only; what a
name means is decided by :mod:`marginflow.models`, :mod:`~marginflow.datasets`,
:mod:`~marginflow.attacks` and :mod:`~marginflow.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from marginflow._checks import unknown
from marginflow.errors import SpecificationError


@dataclass(frozen=True)
class Spec:
    """A parsed specification: ``name:args[0],args[1],key=value``; ``rest`` is all after the colon."""

    text: str
    name: str
    rest: str
    args: tuple[str, ...]
    options: Mapping[str, str]

    def parsed(self, parsers: Mapping[str, Callable[[str, str], Any]]) -> dict[str, Any]:
        """The options through their parsers, called as ``parser(value, where)``.

        Raises:
            SpecificationError: an option without a parser, or one that its parser refuses.
        """
        values = {}
        for key, value in self.options.items():
            if key not in parsers:
                raise unknown(f"option of {self.name!r}", key, parsers)
            values[key] = parsers[key](value, f"{self.text!r}: {key}")
        return values


def parse(text: str, kind: str) -> Spec:
    """Parse ``text`` as the specification of a ``kind`` (a word for error messages).

    Raises:
        SpecificationError: empty text, an empty part, an option given twice, an
            argument after an option.
    """
    if not isinstance(text, str) or not text.strip():
        raise SpecificationError(
            f"{kind}: expected a specification such as 'name:key=value', got {text!r}"
        )
    name, _, rest = text.strip().partition(":")
    args: list[str] = []
    options: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or (equals and not value):
            raise SpecificationError(f"{kind} {text!r}: empty part {part!r}")
        if not equals:
            if options:
                raise SpecificationError(
                    f"{kind} {text!r}: {key!r} stands after an option; put it first"
                )
            args.append(key)
        elif key in options:
            raise SpecificationError(f"{kind} {text!r}: {key!r} is given twice")
        else:
            options[key] = value
    return Spec(text, name.strip().lower(), rest, tuple(args), options)


def _plain(value: str) -> None:
    """Refuse what Python takes for a number, but nobody writes: ``1_000`` and digits of other scripts.

    Raises:
        ValueError: an underscore, or a character beyond ASCII.
    """
    if "_" in value or not value.isascii():
        raise ValueError


def number(value: str, where: str) -> float:
    """A finite decimal number or a fraction ``a/b``.

    Raises:
        SpecificationError: anything else.
    """
    top, slash, bottom = value.partition("/")
    try:
        _plain(value)
        result = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise SpecificationError(
            f"{where}: expected a number or a fraction like 16/255, got {value!r}"
        ) from None
    if not math.isfinite(result):
        raise SpecificationError(f"{where}: expected a finite number, got {value!r}")
    return result


def integer(value: str, where: str) -> int:
    """A whole number.

    Raises:
        SpecificationError: anything else.
    """
    try:
        _plain(value)
        return int(value)
    except ValueError:
        raise SpecificationError(f"{where}: expected a whole number, got {value!r}") from None


def word(value: str, where: str) -> str:
    """Any text: the identity, for option tables."""
    return value


def flag(value: str, where: str) -> bool:
    """``true`` or ``false``.

    Raises:
        SpecificationError: anything else.
    """
    if value.lower() not in ("true", "false"):
        raise SpecificationError(f"{where}: expected true or false, got {value!r}")
    return value.lower() == "true"


def interval(value: str, where: str) -> tuple[float, float]:
    """``low..high``, two numbers.

    Raises:
        SpecificationError: anything else.
    """
    low, dots, high = value.partition("..")
    if not dots:
        raise SpecificationError(f"{where}: expected an interval like 0..1, got {value!r}")
    return number(low, where), number(high, where)
