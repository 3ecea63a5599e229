"""A sweep as its file says it: the options, what is swept, and the trials that follow.

[sweep]          name, out, job (train, maximize, flow), retries, certify
[options]        what all trials share, named as on the command line
[grid]           option or variable = [values]; every combination is a trial
[[trials]]       instead of a grid: one table a trial
[resources]      cpus and gpus of a trial

A name in the grid that is no option is a variable: ``{eps}`` in an option's text stands for it.

Source: marginflow.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marginflow._checks import choice, place, real, unknown, whole
from marginflow._reading import read_toml
from marginflow.errors import InputError, SpecificationError
from marginflow.sweeps._jobs import JOBS, OptionTypes, take_options

_TABLES = ("sweep", "options", "grid", "trials", "resources")
_SWEEP = {"name": str, "out": str, "job": str, "retries": int, "certify": bool}
_RESOURCES: OptionTypes = {"cpus": (int, float), "gpus": (int, float)}
_LONGEST = 80  # letters of a trial's name
_VARIABLE = re.compile(r"\{([^{}]*)\}")

Value = str | int | float | bool
"""What an option or a variable can be."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: made of what is swept; of its folder too.
        swept: the values of the swept options and variables.
        options: all options of the job, the variables put in.
    """

    name: str
    swept: Mapping[str, Value]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A sweep before it is carried out.

    Attributes:
        name: its title.
        out: its folder.
        job: ``train``, ``maximize`` or ``flow``.
        retries: further attempts at a trial that failed.
        certify: whether each trial gets a KKT certificate.
        cpus, gpus: what a trial needs, ≥ 0, in units of one processor or device.
        options: what all trials share, as the file says it, with its variables.
        swept: the names of the swept options and variables.
        trials: in the order of the grid, whose last line varies fastest, or of the list.
    """

    name: str
    out: Path
    job: str
    retries: int
    certify: bool
    cpus: float
    gpus: float
    options: Mapping[str, Any]
    swept: Sequence[str]
    trials: Sequence[Trial]


def read_plan(source: str | os.PathLike[str] | Mapping[str, Any]) -> Plan:
    """The trials of a sweep file, or of its content as a mapping.

    Nothing is built or loaded: that the options fit each other is for
    :func:`marginflow.sweeps.check_trials` to see.

    Args:
        source: the file, or its content.

    Raises:
        SpecificationError: an unknown table, option or variable; the message names the nearest.
        InputError: no such file, no TOML, a value of the wrong type, neither a grid nor trials or
            both, no values, a trial twice, a trial without data or model.
    """
    if isinstance(source, Mapping):
        content, where, name = source, "the sweep", "sweep"
    else:
        content, where, name = _read(place("source", source)), str(source), Path(source).stem
    for key in content:
        if key not in _TABLES:
            raise unknown(f"table in {where}", key, _TABLES)
    for key in ("sweep", "options", "grid", "resources"):
        if not isinstance(content.get(key, {}), Mapping):
            raise InputError(f"{where}: expected a table [{key}], got {content[key]!r}")
    own = take_options(content.get("sweep", {}), _SWEEP, f"{where} [sweep]")
    job = choice("job", own.get("job", "train"), JOBS)
    name = str(own.get("name", name))
    if not _slug(name):
        raise InputError(f"{where}: name: expected letters or digits, got {name!r}")
    needs = take_options(content.get("resources", {}), _RESOURCES, f"{where} [resources]")
    swept, choices = _choices(content, where)
    shared = {key.replace("-", "_"): value for key, value in content.get("options", {}).items()}
    _check_names(shared, swept, JOBS[job], where, job)
    for values in choices:
        twice = sorted(set(values) & shared.keys())
        if twice:
            raise InputError(f"{where}: {twice[0]!r} is swept and in [options] as well; leave one")
    trials = [_trial(shared, values, JOBS[job], where) for values in choices]
    return Plan(
        name=name,
        out=Path(str(own.get("out", f"runs/{_slug(name)}"))),
        job=job,
        retries=whole("retries", own.get("retries", 1), least=0),
        certify=bool(own.get("certify", True)),
        cpus=real("cpus", needs.get("cpus", 1), above=0.0),
        gpus=real("gpus", needs.get("gpus", 0), least=0.0),
        options=shared,
        swept=tuple(swept),
        trials=tuple(_named(trials, where)),
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return read_toml(path)
    except OSError as error:
        raise InputError(f"cannot read the sweep file {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{str(path)!r} is no TOML file: {error}") from None


def _choices(content: Mapping[str, Any], where: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The swept names, and the values that each trial has for them."""
    grid, listed = content.get("grid"), content.get("trials")
    if (grid is None) == (listed is None):
        found = "neither" if grid is None else "both"
        raise InputError(f"{where}: expected a table [grid] or tables [[trials]], got {found}")
    if grid is not None:
        for key, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise InputError(f"{where} [grid]: {key}: expected a list, got {values!r}")
            if not values:
                raise InputError(f"{where} [grid]: {key}: expected at least one value, got none")
        if not grid:
            raise InputError(f"{where} [grid]: expected at least one option, got an empty grid")
        names = [key.replace("-", "_") for key in grid]
        tables = [dict(zip(names, v, strict=True)) for v in itertools.product(*grid.values())]
    else:
        if not isinstance(listed, Sequence) or not listed:
            raise InputError(f"{where}: expected tables [[trials]], got {listed!r}")
        if not all(isinstance(table, Mapping) and table for table in listed):
            raise InputError(f"{where} [[trials]]: expected one option at least in each of them")
        tables = [{key.replace("-", "_"): v for key, v in table.items()} for table in listed]
        names = list(dict.fromkeys(key for table in tables for key in table))
    for table in tables:
        for key, value in table.items():
            if not isinstance(value, str | int | float):
                raise InputError(
                    f"{where}: {key}: expected text, a number, true or false, got {value!r}"
                )
    return names, tables


def _check_names(
    shared: Mapping[str, Any], swept: Sequence[str], types: OptionTypes, where: str, job: str
) -> None:
    """Every swept name is an option, or a variable that an option's text holds."""
    text = " ".join(value for value in shared.values() if isinstance(value, str))
    used = set(_VARIABLE.findall(text))
    for name in swept:
        if name not in types and name not in used:
            error = unknown(f"option of {job} in {where}", name, types)
            raise SpecificationError(
                f"{error}; a variable would stand as {{{name}}} in [options]"
            ) from None


def _trial(
    shared: Mapping[str, Any], values: Mapping[str, Value], types: OptionTypes, where: str
) -> Trial:
    variables = {name: str(value) for name, value in values.items()}

    def filled(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise InputError(
                f"{where}: {match[0]} stands for a variable that a trial gives no value; give one in "
                "[grid] or [[trials]]"
            )
        return variables[match[1]]

    named = {name: value for name, value in values.items() if name in types}
    given = {
        key: _VARIABLE.sub(filled, value) if isinstance(value, str) else value
        for key, value in {**shared, **named}.items()
    }
    options = take_options(given, types, where)
    for name, example in (("data", "digits:3,8"), ("model", "mlp:256,32")):
        if name not in options:
            raise InputError(f"{where}: {name} is missing; for example {name} = {example!r}")
    return Trial("", dict(values), options)


def _named(trials: Sequence[Trial], where: str) -> list[Trial]:
    """The trials with their names: what is swept, and a hash where that alone is ambiguous."""
    seen: dict[str, Trial] = {}
    for trial in trials:
        key = json.dumps(trial.options, sort_keys=True, default=str)
        if key in seen:
            both = ", ".join(f"{name} = {value!r}" for name, value in trial.swept.items())
            raise InputError(f"{where}: the trial with {both} is there twice")
        seen[key] = trial
    names = ["_".join(f"{k}-{_slug(str(v))}" for k, v in t.swept.items()) for t in trials]
    # Some file systems do not tell A from a.
    count = Counter(name.lower() for name in names)
    found = []
    for name, trial in zip(names, trials, strict=True):
        if count[name.lower()] > 1 or len(name) > _LONGEST:
            digest = hashlib.sha256(json.dumps(dict(trial.swept), sort_keys=True).encode())
            name = f"{name[:_LONGEST]}-{digest.hexdigest()[:8]}"
        found.append(Trial(name, trial.swept, trial.options))
    return found


def _slug(text: str) -> str:
    """``text`` with nothing in it that a file system or a shell could take amiss."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")
