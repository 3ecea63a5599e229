"""What ``run.json`` and ``metrics.jsonl`` may hold: a file that says otherwise is damaged.

Source: marginflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from marginflow.errors import RunError

KINDS = ("flow", "maximize", "monitor", "train")
"""Of runs."""

_Check = tuple[str, Callable[[Any], bool]]


class Config(dict[str, Any]):
    """The content of a ``run.json``; asking for a setting that it lacks is a :class:`RunError`."""

    def __missing__(self, key: str) -> Any:
        raise RunError(f"the run.json lacks {key!r}; it is damaged, or of another version")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a ``run.json`` of which a known setting has another type. All may be missing or null.

    Args:
        config: its content.
        where: the file, for the message.

    Raises:
        RunError: such a setting, which the message names.
    """
    for key, (expected, fits) in _CONFIG.items():
        value = config.get(key)
        if value is not None and not fits(value):
            raise RunError(f"{where} is damaged: {key}: expected {expected}, got {_short(value)}")


def check_record(record: object) -> str | None:
    """Why ``record`` is no measurement; None if it is one.

    Args:
        record: a line of ``metrics.jsonl``.
    """
    if not isinstance(record, dict):
        return "expected one measurement in braces"
    if not _whole(record.get("step")):
        return "it has no step"
    for key, value in record.items():
        if value is None:
            continue
        if key in _LISTS or key.endswith("_quantiles"):
            if not (isinstance(value, list) and all(v is None or _number(v) for v in value)):
                return f"{key}: expected a list of numbers, got {_short(value)}"
        elif key in _NUMBERS and not _number(value):
            return f"{key}: expected a number, got {_short(value)}"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _layer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _text(value.get("name"))
        and _list_of(_text)(value.get("parameters"))
        and (value.get("degree") is None or _number(value["degree"]))
    )


def _sample(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _whole(value.get(key)) and value[key] >= 0 for key in ("size", "seed")
    )


_TEXT: _Check = ("text", _text)
_WHOLE: _Check = ("a whole number of at least 0", lambda value: _whole(value) and value >= 0)
_NUMBER: _Check = ("a number", _number)
_TRUTH: _Check = ("true or false", lambda value: isinstance(value, bool))
_RATE: _Check = ("a number or text", lambda value: _text(value) or _number(value))

_CONFIG: dict[str, _Check] = {
    **dict.fromkeys(
        (
            "data", "data_sha256", "model_spec", "attack", "measure_with", "strong", "loss", "method",
            "device", "engine", "perturbation_precision", "ended", "advice", "machine", "git_revision",
            "left_out", "float32_matmul_precision",
        ),
        _TEXT,
    ),
    **dict.fromkeys(("examples", "batch_size", "seed", "shards", "threads", "processes"), _WHOLE),
    **dict.fromkeys(
        ("epochs", "momentum", "log_time", "log_norm", "loss_below", "rtol", "patience"), _NUMBER
    ),
    "max_evaluations": _WHOLE,
    **dict.fromkeys(("shrink", "measure", "keep_weights", "warm_up"), _TRUTH),
    "kind": (f"one of {', '.join(KINDS)}", lambda value: value in KINDS),
    "derivative": ("detached or total", lambda value: value in ("detached", "total")),
    "dtype": ("float32 or float64", lambda value: value in ("float32", "float64")),
    "lr": _RATE,
    "model": ("a table", lambda value: isinstance(value, dict)),
    "versions": (
        "versions by name",
        lambda value: isinstance(value, dict) and all(map(_text, value.values())),
    ),
    "classes": ("a list of names", _list_of(_text)),
    "declared": ("a list of names", _list_of(_text)),
    "notes": ("a list of texts", _list_of(_text)),
    "data_bounds": (
        "two numbers", lambda value: _list_of(_number)(value) and len(value) == 2,
    ),
    "layers": ("layers with a name, parameters and a degree", _list_of(_layer)),
    "sample": ("a size and a seed", _sample),
    "schedule": (
        "text or a list of steps", lambda value: _text(value) or _list_of(_whole)(value),
    ),
}  # fmt: skip

_LISTS = frozenset({"layer_norms"})
_NUMBERS = frozenset(
    (
        "epoch", "log_time", "learning_rate", "epoch_loss", "epoch_accuracy", "normalized_margin",
        "normalized_margin_by_total", "margin", "smoothed_margin", "adversarial_accuracy", "dead_inputs",
        "log_loss", "clean_normalized_margin", "clean_accuracy", "norm_product", "total_norm",
        "test_normalized_margin", "test_clean_accuracy", "test_adversarial_accuracy", "scale",
        "temperature", "best_epoch", "log_norm", "log_tl", "one_plus_cosine", "evaluations", "jacobians",
        "tolerance", "separated_steps", "falls", "largest_fall", "falls_by_total",
        "largest_fall_by_total", "margin_falls", "combined", "jumps", "sliding", "sample_size",
        "sample_accuracy", "sample_margin", "strong_accuracy", "strong_margin", "norm_drift",
    )
)  # fmt: skip
