"""The settings of runs in words, and what they ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marginflow.report._ascent_words import ascent_settings
from marginflow.report._clock import is_ascent, is_flow, is_monitored
from marginflow.report._flow_words import goal_words, integrator_words, integrators
from marginflow.report._statement import declares_attack
from marginflow.report._tables import Table, run_columns
from marginflow.report._text import (
    MISSING,
    attack_words,
    format_count,
    format_short,
    number,
    run_names,
)
from marginflow.runs import Run

_ORDER = (
    "data",
    "training examples",
    "classes",
    "range of inputs",
    "network",
    "architecture",
    "trained against",
    "measured with",
    "loss",
    "begins with",
    "method",
    "warm-up",
    "step length",
    "temperature",
    "hard examples",
    "learning rate",
    "batch size",
    "epochs",
    "steps at most",
    "duality gap",
    "momentum",
    "derivative",
    "goal",
    "integrator",
    "tolerance of a step",
    "patience",
    "evaluations at most",
    "seed",
    "precision",
    "device",
)


def settings_table(runs: Sequence[Run]) -> Table:
    """What was asked of each run, in words."""
    lines = [_lines(run) for run in runs]
    titles = [title for title in _ORDER if any(title in line for line in lines)]
    if all(map(is_flow, runs)):  # one perturbation, of the flow and of its measurements
        titles.remove("measured with")
    rows = [
        [
            "perturbation" if title == "trained against" and all(map(is_flow, runs)) else title,
            *(line.get(title, MISSING) for line in lines),
        ]
        for title in titles
    ]
    header = ["setting", *run_names(runs)]
    return Table("What was asked for", header, rows, numbers=False, colors=run_columns(runs))


def _lines(run: Run) -> dict[str, str]:
    if is_monitored(run):
        return _monitored_settings(run)
    if is_flow(run):
        return _flow_settings(run)
    return ascent_settings(run, _settings(run.config)) if is_ascent(run) else _settings(run.config)


def _monitored_settings(run: Run) -> dict[str, str]:
    """What a loop says of itself, and how it was measured."""
    config = run.config
    line = _settings(config)
    if config.get("batch_size") is None:
        line["batch size"] = MISSING
    if not declares_attack(run):
        line["trained against"] = "not said"
    sample, schedule = config.get("sample"), config.get("schedule")
    if isinstance(sample, Mapping):
        line["measured examples"] = (
            f"a sample of {_text(sample.get('size'))}, seed {_text(sample.get('seed'))}"
        )
    line["measured at"] = {"log": "logarithmically spaced steps", "every": "every step"}.get(
        str(schedule), "chosen steps"
    )
    line["measured beside it"] = attack_words(config.get("strong"))
    return line


def _flow_settings(run: Run) -> dict[str, str]:
    """What was asked of a flow: a goal and a tolerance in place of a learning rate and epochs."""
    config = run.config
    line = _settings(config)
    for title in ("learning rate", "batch size", "epochs", "momentum"):
        del line[title]
    asked = config.get("method")
    patience = number(config, "patience")
    rtol = number(config, "rtol")
    return line | {
        "goal": goal_words(config) or MISSING,
        "integrator": f"chosen by the field: {integrators(run)}"
        if asked == "auto"
        else integrator_words(asked),
        "tolerance of a step": "the integrator’s default" if rtol is None else format_short(rtol),
        "patience": MISSING
        if patience is None
        else f"until ln t = {format_short(patience)}, if the data are not separated",
        "evaluations at most": format_count(number(config, "max_evaluations")),
    }


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    classes = config.get("classes")
    bounds = config.get("data_bounds")
    examples, batch = number(config, "examples"), number(config, "batch_size")
    full = batch is None or batch == examples
    return {
        "data": _text(config.get("data")),
        "training examples": format_count(examples),
        "classes": ", ".join(map(str, classes)) if isinstance(classes, list) else MISSING,
        "range of inputs": " to ".join(map(_text, bounds))
        if isinstance(bounds, list)
        else "unknown",
        "network": _text(config.get("model_spec")),
        "architecture": _architecture(config.get("model")),
        "trained against": attack_words(config.get("attack")),
        "measured with": attack_words(config.get("measure_with")),
        "loss": _text(config.get("loss")),
        "learning rate": _text(config.get("lr")),
        "batch size": f"{format_count(examples)} (all)" if full else format_count(batch),
        "epochs": format_count(number(config, "epochs")),
        "momentum": _text(config.get("momentum")),
        "derivative": {
            "detached": "detached (perturbation held fixed)",
            "total": "total (through the perturbation)",
        }.get(_text(config.get("derivative")), _text(config.get("derivative"))),
        "seed": _text(config.get("seed")),
        "precision": _text(config.get("dtype")),
        "device": _text(config.get("device")),
    }


def _architecture(model: object) -> str:
    """``mlp; widths 64, 128, 1; activation relu``."""
    if not isinstance(model, Mapping):
        return "built in Python"
    parts = [
        _text(value) if key == "kind" else f"{key} {_text(value)}" for key, value in model.items()
    ]
    return "; ".join(parts)


def versions_table(runs: Sequence[Run]) -> Table:
    """What each run ran on; – for what a run in memory does not record."""
    packages = sorted({name for run in runs for name in _versions(run)})
    rows = [[name, *(_text(_versions(run).get(name)) for run in runs)] for name in packages]
    for title, key in (
        ("source revision", "git_revision"),
        ("machine", "machine"),
        ("threads", "threads"),
        ("float32 products", "float32_matmul_precision"),
    ):
        rows.append([title, *(_text(run.config.get(key)) for run in runs)])
    hashes = [_text(run.config.get("data_sha256")) for run in runs]
    rows.append(["SHA-256 of the data", *(f"{h[:16]}…" if len(h) > 17 else h for h in hashes)])
    header = ["part", *run_names(runs)]
    return Table("What it ran on", header, rows, numbers=False, colors=run_columns(runs))


def _versions(run: Run) -> Mapping[str, Any]:
    versions = run.config.get("versions")
    return versions if isinstance(versions, Mapping) else {}


def _text(value: Any) -> str:
    if value is None or value == "":
        return MISSING
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)
