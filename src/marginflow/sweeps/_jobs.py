"""The kinds of jobs that a trial can be, and the options that a file may give each of them.

Source: marginflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marginflow._checks import unknown
from marginflow.errors import InputError

OptionTypes = Mapping[str, type | tuple[type, ...]]
"""The types that a TOML file may give the options of a command."""

_NUMBER = (int, float)
_SHARED: OptionTypes = {
    "data": str,
    "model": str,
    "attack": str,
    "loss": str,
    "seed": int,
    "threads": int,
    "data_dir": str,
    "log": (str, list),
}
_TRAINERS: OptionTypes = {
    "measure_with": str,
    "batch_size": int,
    "epochs": int,
    "dtype": str,
    "device": str,
    "engine": str,
}
JOBS: Mapping[str, OptionTypes] = {
    "train": {
        **_SHARED,
        **_TRAINERS,
        "lr": (int, float, str),
        "momentum": _NUMBER,
        "derivative": str,
        "perturbation_precision": str,
        "shrink": bool,
        "shards": int,
        "keep_weights": bool,
    },
    "maximize": {**_SHARED, **_TRAINERS, "method": str, "strict": bool, "from": str},
    "flow": {
        **_SHARED,
        "derivative": str,
        "log_time": _NUMBER,
        "log_norm": _NUMBER,
        "loss_below": _NUMBER,
        "method": str,
        "rtol": _NUMBER,
        "patience": _NUMBER,
        "max_evaluations": int,
        "keep_weights": bool,
    },
}
"""The options of each kind of job, named as on the command line, with ``_`` or ``-`` between words."""


def _words(kinds: type | tuple[type, ...]) -> str:
    names = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    # A number may be whole.
    told = [kind for kind in several if kind is not int or float not in several]
    return " or ".join(names.get(kind, "a list") for kind in told)


def take_options(content: Mapping[str, Any], types: OptionTypes, where: str) -> dict[str, Any]:
    """The options in a table of a TOML file, with ``_`` in their names.

    Args:
        content: the table.
        types: the options that there are.
        where: the table's name, for messages.

    Raises:
        SpecificationError: an unknown option; the message names the nearest one.
        InputError: a value of the wrong type.
    """
    options = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in types:
            raise unknown(f"option in {where}", key, types)
        if isinstance(value, bool) != (types[name] is bool) or not isinstance(value, types[name]):
            raise InputError(
                f"{where}: {key}: got {value!r} of the wrong type; expected {_words(types[name])}"
            )
        options[name] = value
    return options
