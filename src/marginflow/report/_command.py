"""The command line that trains, or follows, a recorded run again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from marginflow.report._clock import is_ascent, is_flow
from marginflow.runs import Run

_OPTIONS = (
    "data",
    "model",
    "attack",
    "measure_with",
    "loss",
    "lr",
    "batch_size",
    "epochs",
    "momentum",
    "derivative",
    "seed",
    "dtype",
    "device",
    "threads",
)
# What need not be said to marginflow flow. Of the losses each of these two is the default on the
# only kind of data that it fits.
_FLOW_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "loss": ("exponential", "cross-entropy"),
    "derivative": ("total",),
    "method": ("auto",),
    "patience": (30.0,),
    "max_evaluations": (2_000_000,),
    "seed": (0,),
}
_FLOW_OPTIONS = (
    "data",
    "model",
    "attack",
    "loss",
    "derivative",
    "log_time",
    "log_norm",
    "loss_below",
    "method",
    "rtol",
    "patience",
    "max_evaluations",
    "seed",
)
_ASCENT_OPTIONS = (
    "data",
    "model",
    "attack",
    "measure_with",
    "method",
    "epochs",
    "batch_size",
    "seed",
    "loss",
    "dtype",
    "device",
    "threads",
)
_COMMANDS = {"flow": "flow", "maximize": "maximize"}
_SPECIFICATION = re.compile(r"[a-z][a-z0-9-]*(:.*)?", re.DOTALL)


def reproduction(run: Run) -> tuple[list[str], str]:
    """The parts of a command line that gives the run again, and what it cannot do; either may be empty.

    ``marginflow train …`` or ``marginflow maximize …`` with all options, or ``marginflow flow …`` with
    those that differ from the defaults, and its goals.

    A part is an option with its argument; spaces between them make the command line. Every
    argument is quoted for the shell: the configuration comes from a file.
    """
    config = {**run.config, "model": run.config.get("model_spec")}
    reason = _obstacle(run.config)
    if reason:
        return [], reason
    names = _FLOW_OPTIONS if is_flow(run) else _ASCENT_OPTIONS if is_ascent(run) else _OPTIONS
    plain: Mapping[str, tuple[Any, ...]] = _FLOW_DEFAULTS if is_flow(run) else {"device": ("cpu",)}
    options = [name for name in names if config.get(name) not in plain.get(name, ())]
    parts = [f"marginflow {_COMMANDS.get(str(config.get('kind')), 'train')}"]
    origin = config.get("from")
    if isinstance(origin, Mapping):
        source = f"runs/{origin.get('run')}"
        parts.append(f"--from {shlex.quote(source)}")
    for name in options:
        if (value := config.get(name)) is not None:
            parts.append(f"--{name.replace('_', '-')} {_argument(value)}")
    if run.path is not None:
        parts.append(f"--out {shlex.quote(f'runs/{run.name}')}")
    caveat = ""
    if config.get("schedule") is not None:
        points = "values of ln t" if is_flow(run) else "epochs"
        caveat = f"Measured at chosen {points}; the command measures at the default ones."
    return parts, caveat


def _obstacle(config: Mapping[str, Any]) -> str:
    """Why no command line gives this run; empty if one does."""
    if config.get("kind") == "monitor":
        return (
            "The network was trained in a loop of its own, of which only the measurements are here."
        )
    again = "follow it again with mf.gradient_flow"
    if config.get("kind") != "flow":
        again = "train it again with mf.train"
    if config.get("kind") == "maximize":
        again = "maximise again with mf.maximize"
    missing = [name for name in ("data", "model_spec", "attack") if not config.get(name)]
    if missing:
        return f"The configuration lacks {', '.join(missing)}, so no command line is known."
    spec = str(config["model_spec"])
    if not config.get("model") or not _SPECIFICATION.fullmatch(spec):
        return f"The network ({spec}) was built in Python: {again}."
    if config["data"] == "custom":
        return f"The data were given in Python: {again}."
    for key in ("attack", "measure_with"):
        if str(config.get(key)).startswith("finite-set"):
            use = again.rpartition(" ")[2]
            return f"The finite set of perturbations was given in Python: use {use}."
    return ""


def _argument(value: object) -> str:
    return shlex.quote(repr(value) if isinstance(value, float) else str(value))
