"""Scales, ticks and labels of one pair of axes: no offset text, no tick that must be decoded."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from marginflow.experiments import Panel, Scale
from marginflow.report._text import format_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DECADES = 4  # how many of them a symlog axis shows on either side of zero, at most
_TICKS = 7
_SYMBOL = re.compile(
    r"(?:(?<!\w)(?P<letter>[α-ωΑ-ΩGLPVWcmx])|(?P<bar>‖))(?P<accent>[\u0302\u0303]?)(?:_(?P<sub>\w))?(?!\w)"
)
_ACCENTS = {"\u0302": r"\hat", "\u0303": r"\tilde"}


def label_text(text: str) -> str:
    """``text`` as matplotlib shall read it: literally, but our symbols (γ̂_m, ρ_k) set as such.

    Names of runs come from files: a ``$`` in them must not start a formula, and what the
    font cannot show becomes a box here, rather than a warning there.
    """
    known = _known_characters()
    shown = "".join(c if ord(c) in known else "□" for c in " ".join(text.split()))
    return _SYMBOL.sub(_as_formula, shown.replace("$", r"\$"))


@functools.cache
def _known_characters() -> frozenset[int]:
    """What DejaVu Sans, the font that comes with matplotlib, can show."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def _as_formula(match: re.Match[str]) -> str:
    if not (match["accent"] or match["sub"]):
        return match[0]
    letter = match["letter"] or match["bar"]
    accented = f"{_ACCENTS[match['accent']]}{{{letter}}}" if match["accent"] else letter
    below = f"_{{{match['sub']}}}" if match["sub"] else ""
    return f"${accented}{below}$"


def finite(values: Sequence[float | None]) -> list[float]:
    """``values`` with NaN for None and for infinity, which cannot be drawn."""
    return [v if v is not None and math.isfinite(v) else math.nan for v in values]


def unit_exponent(values: Sequence[float], scale: Scale) -> int:
    """The power of ten, a multiple of 3, in which an axis is labelled; 0 for ordinary numbers.

    Logarithmic axes carry powers of ten at their ticks and need no unit.
    """
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if scale == "log" or largest == 0 or 0.01 <= largest < 1e6:
        return 0
    return 3 * math.floor(math.log10(largest) / 3)


def set_scales(axes: Axes, panel: Panel, x: Sequence[float], y: Sequence[float]) -> None:
    """Scales, limits, ticks and the zero line, for the drawn values ``x`` and ``y``."""
    _set_axis(axes, "x", panel.xscale, x, panel.xthreshold)
    if panel.ylabel.rstrip().endswith(("%", "(%)")):
        _percent_limits(axes, y)
    _set_axis(axes, "y", panel.yscale, y)
    if any(v < 0 for v in y) and any(v > 0 for v in y):
        axes.axhline(0, color=axes.xaxis.label.get_color(), linewidth=0.9, zorder=2.5)


def _set_axis(
    axes: Axes,
    which: Literal["x", "y"],
    scale: Scale,
    values: Sequence[float],
    threshold: float | None = None,
) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    change, limits, axis = (
        (axes.set_xscale, axes.get_xlim, axes.xaxis)
        if which == "x"
        else (axes.set_yscale, axes.get_ylim, axes.yaxis)
    )
    if scale == "log" and not any(v > 0 for v in values):
        scale = "linear"  # nothing that a logarithmic axis could show
    whole = which == "x" and all(v == round(v) for v in values if math.isfinite(v))
    few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
    if scale == "log":
        change("log", nonpositive="mask")
        axes.autoscale_view(scalex=which == "x", scaley=which == "y")
        ticks = _log_ticks(*limits()) or list(few.tick_values(*limits()))
    elif scale == "symlog":
        threshold = threshold or _threshold(values)
        # From 0 to the threshold takes half of a decade: the place of epoch 0, before epoch 1.
        change("symlog", linthresh=threshold, linscale=0.5)
        axes.autoscale_view(scalex=which == "x", scaley=which == "y")
        if which == "x" and all(v >= 0 for v in values):
            axes.set_xlim(left=-0.1 * threshold)
        ticks = _symlog_ticks(threshold, *limits())
    else:
        ticks = list(few.tick_values(*limits()))
    low, high = limits()
    slack = 1e-9 * (high - low)
    ticks = [float(tick) for tick in ticks if low - slack <= tick <= high + slack]
    crowded = which == "x" and len(ticks) > 6
    axis.set_ticks(ticks, labels=format_ticks(ticks, together=scale == "linear", crowded=crowded))
    axis.set_minor_locator(NullLocator())


def _threshold(values: Sequence[float]) -> float:
    """Where a symlog axis turns linear: at the decade of its smallest values, at 1 for counts."""
    sizes = sorted(abs(v) for v in values if math.isfinite(v) and v != 0)
    if not sizes or all(v == round(v) >= 0 for v in values if math.isfinite(v)):
        return 1.0
    # One value in fifty may be as small as it likes: curves that cross zero have such.
    least = sizes[len(sizes) // 50]
    return max(_decade(least), _decade(sizes[-1]) * 10.0 ** (1 - _DECADES))


def _decade(value: float) -> float:
    return float(f"1e{math.floor(math.log10(value))}")


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 … or as many of these as there is room for; none in less than such a step."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**k for k in decades for s in steps if low <= s * 10.0**k <= high]
        if len(ticks) <= _TICKS:
            break
    return ticks[:: -(-len(ticks) // _TICKS)] if len(ticks) > 1 else []


def _symlog_ticks(threshold: float, low: float, high: float) -> list[float]:
    ticks = [0.0]
    for sign, limit in ((-1, -low), (1, high)):
        decades = max(0, math.floor(math.log10(limit / threshold) + 1e-9) + 1) if limit > 0 else 0
        stride = -(-decades // _TICKS) or 1
        ticks += [sign * threshold * 10.0**k for k in range(0, decades, stride)]
        if sign < 0 and decades == 1 and limit >= 3 * threshold:
            ticks[-1] = -3 * threshold  # the farther one tells the scale; there is no room for both
    return sorted(ticks)


def _percent_limits(axes: Axes, y: Sequence[float]) -> None:
    """Keep an axis of percentages from promising more than 100 % or less than 0 %."""
    values = [v for v in y if math.isfinite(v)]
    if not values or min(values) < 0 or max(values) > 100:
        return
    low, high = axes.get_ylim()
    if high - low < 10:  # a curve that hardly moves: no axis of tenths of a percent
        low, high = low - 5, high + 5
    slack = 0.03 * (high - low)
    axes.set_ylim(max(low, -slack), min(high, 100 + slack))
