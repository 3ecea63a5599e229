"""How margins were maximised, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marginflow._specs import parse
from marginflow.errors import SpecificationError
from marginflow.report._clock import method_name
from marginflow.report._text import MISSING, format_percent, format_short, number
from marginflow.runs import Run

_LENGTHS = {"angle": "angles", "step": "relative steps"}


def ascent_settings(run: Run, line: Mapping[str, str]) -> dict[str, str]:
    """What was asked of an ascent: a method with its schedules in place of a learning rate.

    Args:
        run: a margin maximisation.
        line: the settings that it shares with a training.
    """
    config = run.config
    found = {t: text for t, text in line.items() if t not in ("learning rate", "momentum")}
    found |= {
        "derivative": line["derivative"]
        if config.get("derivative")
        else "detached (perturbation held fixed)"
    }
    found["method"] = method_name(run)
    origin = config.get("from")
    found["begins with"] = "its initial weights"
    if isinstance(origin, Mapping):
        found["begins with"] = f"the weights of {origin.get('run')} at step {origin.get('step')}"
    options = _options(config.get("method"))
    if config.get("warm_up"):
        found["warm-up"] = "the schedules of spheres: the data were not separated at the start"
    for key, words in _LENGTHS.items():
        if key in options:
            found["step length"] = f"{words} {_span(options[key])}, falling by equal factors"
    if "tau" in options:
        found["temperature"] = f"{_span(options['tau'])} in units of 1/median |margin|, rising"
    if "norm" in options:
        found["method"] += f", norm {options['norm']}"
    if "hard" in options:
        found["hard examples"] = (
            f"{_share(options['hard'])} of a batch, of the hardest {_share(options.get('pool'))}"
        )
    if "momentum" in options:
        found["momentum"] = options["momentum"]
    if "gap" in options:
        found["duality gap"] = f"at most {_number(options['gap'])} of the bound"
        found["steps at most"] = found.pop("epochs")
        del found["batch size"], found["derivative"]
    return found


def _options(spec: object) -> Mapping[str, str]:
    try:
        return parse(str(spec), "method").options
    except SpecificationError:
        return {}


def _span(text: str) -> str:
    return " to ".join(_number(part) for part in text.split(".."))


def _number(text: str) -> str:
    value = _value(text)
    return text if value is None else format_short(value)


def _share(text: Any) -> str:
    return format_percent(_value(text)) if text is not None else MISSING


def _value(text: Any) -> float | None:
    try:
        return number({"value": float(text)}, "value")
    except (TypeError, ValueError):
        return None
