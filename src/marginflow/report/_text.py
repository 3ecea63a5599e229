"""Numbers and names as people read them, in one place: report, figures and terminal agree."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from marginflow._specs import parse
from marginflow.errors import InputError, RunError, SpecificationError
from marginflow.runs import Run

MISSING = "–"
"""What stands for a number that was not measured or is not finite."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NAMES = {
    "fgm": "ℓ2-FGM",
    "fgsm": "FGSM",
    "pgd-l2": "ℓ2-PGD",
    "pgd-linf": "ℓ∞-PGD",
}


def number(record: Mapping[str, Any], key: str) -> float | None:
    """The finite number at ``key``, or None: absent, not measured, not finite, not a number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def format_number(value: float | None, digits: int = 4) -> str:
    """``value`` to ``digits`` significant digits: 1,234, 0.5000, −2.5 × 10⁻⁷, or –."""
    if value is None or not math.isfinite(value):
        return MISSING
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    exponent = int(power)
    if value == 0:
        text = "0"
    elif -4 <= exponent < 6:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    else:
        text = f"{mantissa}{times_power_of_ten(exponent)}"
    return text.replace("-", "−")


def format_short(value: float | None) -> str:
    """``value`` to four digits without idle zeros: −3, 0.05, 12.59, 1,000, 10⁶, 2.5 × 10⁻⁷, or –."""
    mantissa, times, power = format_number(value).partition(" × ")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return power if mantissa == "1" and times else mantissa + times + power


def times_power_of_ten(exponent: int) -> str:
    """`` × 10⁻³``."""
    return f" × 10{str(exponent).translate(_SUPERSCRIPTS)}"


def unbroken(text: str) -> str:
    """``text`` with spaces that do not break around = and ×, or in ln t: no line ends in ``n =``."""
    text = re.sub(r" ([=×]) ", "\u00a0\\1\u00a0", text)
    return re.sub(r"(?<=\bln) (?=t\b)|(?<=\(W,) (?=∇L\))", "\u00a0", text)


def margin_exponent(values: Sequence[float | None]) -> int:
    """The power of ten, 0 or −3, −6 …, in which to show margins that belong together.

    Normalised margins of deep networks are of order 1e-3. The unit is that of the smallest
    of them, so that no comparison begins with counting zeros.
    """
    sizes = [abs(v) for v in values if v is not None and math.isfinite(v) and v != 0]
    if not sizes or min(sizes) >= 0.01:
        return 0
    return 3 * math.floor(math.log10(min(sizes) * 10) / 3)


def format_margin(value: float | None, exponent: int = 0, digits: int = 4) -> str:
    """A normalised margin in units of ``10^exponent`` (without the unit itself)."""
    return format_number(None if value is None else value * 10.0**-exponent, digits)


def margin_unit(exponent: int) -> str:
    """The unit behind a column title or an axis label: `` (×10⁻³)``, or nothing."""
    return f" (×10{str(exponent).translate(_SUPERSCRIPTS)})" if exponent else ""


def format_percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage. Only exactly 1 is 100%, only exactly 0 is 0%."""
    if share is None or not math.isfinite(share):
        return MISSING
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    for decimals in (1, 2, 3, 4):
        text = f"{share:.{decimals}%}"
        if float(text[:-1]) not in (0.0, 100.0):
            return text
    return ">99.9999%" if share > 0.5 else "<0.0001%"


def format_ticks(values: Sequence[float], *, together: bool, crowded: bool = False) -> list[str]:
    """Tick labels: ordinary numbers, but powers of ten on an axis that leaves 0.001 to 10,000.

    Args:
        values: the ticks of one axis.
        together: whether all show the same number of decimals, as on a linear axis.
        crowded: powers from 1,000 on, since there is no room for 10,000.
    """
    if together:
        decimals = max((len(f"{v:.6g}".partition(".")[2]) for v in values), default=0)
        return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]
    most = 1e3 if crowded else 1.1e4
    wide = any(value and not 1e-3 <= abs(value) * (1 + 1e-9) < most for value in values)
    return [_power(v) if wide and not 0.1 <= abs(v) <= 100 and v else _tick(v) for v in values]


def _tick(value: float) -> str:
    return f"{value:,.8g}".replace("-", "−")


def _power(value: float) -> str:
    mantissa, power = f"{value:.6e}".split("e")
    factor = float(mantissa)
    lead = "" if abs(factor) == 1 else f"{abs(factor):g}×"
    return f"{'−' if factor < 0 else ''}{lead}10{str(int(power)).translate(_SUPERSCRIPTS)}"


def attack_words(spec: object) -> str:
    """An attack's specification in words: ``FGSM, ε = 16/255``; unknown ones stay as they are."""
    text = str(spec) if spec else "none"
    try:
        parsed = parse(text, "attack")
    except SpecificationError:
        return text
    if parsed.name not in _NAMES and parsed.name != "exact-linear":
        return text
    options = dict(parsed.options)
    if "eps" not in options or parsed.args:
        return text
    norm = {"inf": "∞", "2.0": "2", "1.0": "1"}
    kind = _NAMES.get(parsed.name) or (
        f"exact ℓ{norm.get(p := options.pop('p', '?'), p)} adversary"
    )
    parts = [kind, f"ε = {fraction(options.pop('eps'))}"]
    if "steps" in options and "step" in options:
        parts.append(f"{options.pop('steps')} steps of {fraction(options.pop('step'))}")
    if options.pop("random", "false") == "true":
        parts.append("random start")
    return ", ".join(parts + [f"{key} {value}" for key, value in options.items()])


def fraction(text: str) -> str:
    """0.06274509803921569 as 16/255: the paper's unit, lost in a float's repr."""
    try:
        levels = float(text) * 255
    except ValueError:
        return text
    whole = round(levels)
    if len(text) <= 6:
        return text
    if whole and abs(levels - whole) < 1e-9:
        return f"{whole}/255"
    return f"{levels / 255:.4g}"


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names, made distinct by their folders, or by numbers where that is not enough."""
    plain = [" ".join(run.name.split()) or "run" for run in runs]
    names = [
        name
        if run.path is None or plain.count(name) == 1
        else f"{run.path.resolve().parent.name}/{name}"
        for name, run in zip(plain, runs, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: k + 1].count(name)})"
        for k, name in enumerate(names)
    ]


def sentence_of(error: Exception, file: str, again: str) -> str:
    """What is wrong with a file that stands beside a run, as the end of a sentence.

    Args:
        error: what reading or showing it has raised.
        file: its name.
        again: how it is made again.
    """
    if isinstance(error, RunError):
        return f"{error}."
    return f"{file} is damaged ({type(error).__name__}: {error}); {again}."


def check_runs(runs: Sequence[Run]) -> None:
    """Refuse what cannot be shown.

    Raises:
        InputError: no runs, or something else than runs.
        RunError: a run without measurements.
    """
    if not isinstance(runs, Sequence) or not all(isinstance(run, Run) for run in runs):
        raise InputError(
            "runs: expected a list of runs, as mf.load_run and mf.train return them; give a flow's .run"
        )
    if not runs:
        raise InputError("runs: expected at least one run, got none")
    for run in runs:
        if not run.metrics:
            advice = "train it with measure=True, or wait for its first epoch"
            if run.config.get("kind") == "flow":
                advice = "wait for its start to be measured"
            raise RunError(f"the run {run.name!r} has no measurements to show; {advice}")


def epoch_of(record: Mapping[str, Any]) -> float | None:
    """The epoch of a measurement, or its step where a foreign loop counts steps only."""
    epoch = number(record, "epoch")
    return number(record, "step") if epoch is None else epoch


def format_count(value: float | None) -> str:
    """A whole number with separators: 10,000."""
    return MISSING if value is None else f"{value:,.0f}"
