"""The command line that trains a recorded run again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

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
_SPECIFICATION = re.compile(r"[a-z][a-z0-9-]*(:.*)?", re.DOTALL)


def reproduction(run: Run) -> tuple[list[str], str]:
    """The parts of a ``marginflow train …`` command line, and what it cannot do; either may be empty.

    A part is an option with its argument; spaces between them make the command line. Every
    argument is quoted for the shell: the configuration comes from a file.
    """
    config = {**run.config, "model": run.config.get("model_spec")}
    reason = _obstacle(run.config)
    if reason:
        return [], reason
    parts = ["marginflow train"]
    for name in _OPTIONS:
        value = config.get(name)
        if value is not None and not (name == "device" and value == "cpu"):
            parts.append(f"--{name.replace('_', '-')} {_argument(value)}")
    if run.path is not None:
        parts.append(f"--out {shlex.quote(f'runs/{run.name}')}")
    caveat = ""
    if config.get("schedule") is not None:
        caveat = "Measured at chosen epochs; the command measures at the default ones."
    return parts, caveat


def _obstacle(config: Mapping[str, Any]) -> str:
    """Why no command line gives this run; empty if one does."""
    missing = [name for name in ("data", "model_spec", "attack") if not config.get(name)]
    if missing:
        return f"The configuration lacks {', '.join(missing)}, so no command line is known."
    spec = str(config["model_spec"])
    if not config.get("model") or not _SPECIFICATION.fullmatch(spec):
        return f"The network ({spec}) was built in Python: train it again with mf.train."
    if config["data"] == "custom":
        return "The data were given in Python: train it again with mf.train."
    for key in ("attack", "measure_with"):
        if str(config.get(key)).startswith("finite-set"):
            return "The finite set of perturbations was given in Python: use mf.train."
    return ""


def _argument(value: object) -> str:
    return shlex.quote(repr(value) if isinstance(value, float) else str(value))
