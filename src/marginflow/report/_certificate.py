"""How far the networks of runs are from a KKT point: what their ``certificate.json`` says."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from marginflow.experiments import Curve, Panel
from marginflow.kkt import SavedCertificate, read_certificate
from marginflow.report._panels import Captioned
from marginflow.report._tables import Table
from marginflow.report._text import (
    attack_words,
    format_count,
    format_number,
    format_percent,
    format_short,
    number,
    run_names,
    sentence_of,
)
from marginflow.runs import Run

_PAIRS, _PAIRS_OF_SEVERAL = 24, 6
_LISTED = 64
_SMALLEST_SIDE = 8  # pixels: shorter vectors that happen to be squares are hardly images
_NEAR = 0.01  # residuals below this are drawn on a logarithmic axis


@dataclass(frozen=True)
class Pair:
    """An example of the support as a picture, clean and perturbed.

    Attributes:
        clean, perturbed: PNG files as ``data:`` addresses.
        words: which it is: ``no. 17, label 3``.
        margin, multiplier: its numbers, as text.
    """

    clean: str
    perturbed: str
    words: str
    margin: str
    multiplier: str


@dataclass(frozen=True)
class Support:
    """The support of one run's certificate.

    Attributes:
        name: the run.
        pairs: pictures of the examples with the largest multipliers; none where the inputs are no images.
        words: what is shown, and the examples by index where there are no pictures.
    """

    name: str
    pairs: Sequence[Pair]
    words: str


@dataclass(frozen=True)
class CertificateSection:
    """The part of the page about certificates.

    Attributes:
        sentences: one for each certified run.
        notes: what has to be said beside them; often nothing.
        curves: r against τ, one line a run.
        table: the numbers, one column a run.
        supports: the examples behind them, run by run.
    """

    sentences: Sequence[str]
    notes: Sequence[str]
    curves: Captioned
    table: Table
    supports: Sequence[Support]


@dataclass(frozen=True)
class _Certified:
    """A run with its certificate: the name it goes by, and the place that decides its colour."""

    run: Run
    name: str
    color: int
    saved: SavedCertificate

    @property
    def content(self) -> Mapping[str, Any]:
        return self.saved.content


def certificate_section(runs: Sequence[Run]) -> tuple[CertificateSection | None, list[str]]:
    """What the certificates in the run directories say, and what has to be said of damaged ones.

    Returns:
        None where there are none, and a sentence for each that cannot be shown: the page goes without.
    """
    found, damaged = [], []
    alone = len(runs) == 1
    for k, (run, name) in enumerate(zip(runs, run_names(runs), strict=True)):
        try:
            saved = None if run.path is None else read_certificate(run.path)
            if saved is not None:
                one = _Certified(run, name, k, saved)
                _section([one], alone)
                found.append(one)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            damaged.append(
                f"{name}: its certificate is left out: "
                + sentence_of(error, "certificate.json", "make it again with marginflow certify")
            )
    return _section(found, alone) if found else None, damaged


def _section(found: Sequence[_Certified], alone: bool) -> CertificateSection:
    return CertificateSection(
        [_sentence(one, alone) for one in found],
        [note for one in found for note in _notes(one)],
        _curves(found, alone),
        _table(found),
        [_support(one, _PAIRS if alone else _PAIRS_OF_SEVERAL) for one in found],
    )


def _sentence(one: _Certified, alone: bool) -> str:
    c = one.content
    residual, explained = number(c, "residual"), number(c, "explained")
    tau, used = number(c, "tau"), len(c["support"]["indices"])
    which = f"the {format_count(used)} of {format_count(number(c, 'examples'))} examples"
    if used == number(c, "examples"):
        which = f"all {format_count(used)} examples"
    if used == 1:
        which = "the one example"
    if tau is not None:
        which += f" whose margin is at most {format_short(1 + tau)} times the smallest"
    lead = "The network is" if alone else f"{one.name} is"
    return (
        f"{lead} {c['verdict']}: with the best multipliers on {which}, a share r = "
        f"{_short(residual)} of the weights’ norm remains that no gradient of these margins "
        f"accounts for; they explain {format_percent(explained)} of ‖W‖²." + _beside(c)
    )


def _beside(c: Mapping[str, Any]) -> str:
    """What ``--nearest`` found; nothing where it was not asked for."""
    nearest = c.get("nearest")
    if nearest is None:
        return ""
    residual, margin, before, gain, angle = (
        number(nearest, key) for key in ("residual", "margin", "margin_before", "gain", "angle")
    )
    if residual is None or margin is None or before is None or gain is None or angle is None:
        raise ValueError("the nearest KKT point lacks a number")
    left = format_percent(gain) if gain < 1 else f"a factor of {format_short(1 + gain)}"
    end = (
        f" The KKT point beside it, found to r = {format_number(residual)}, is"
        if nearest["converged"]
        else f" A KKT point beside it was not reached; the search ended at r = {format_number(residual)},"
    )
    least = "" if nearest["converged"] else "at least "
    return (
        f"{end} {format_number(angle)} rad away, with γ̂_m = {margin:.6g} in place of {before:.6g}: "
        f"{least}{left} left to gain."
    )


def _notes(one: _Certified) -> list[str]:
    c, name = one.content, one.name
    notes = []
    if left_out := number(c, "left_out"):
        every = format_count(left_out + (number(c, "examples") or 0))
        notes.append(
            f"{name}: {format_count(left_out)} of {every} examples have no positive margin and are left out; "
            "the certificate is that of the problem without them."
        )
    if c["truncated"]:
        notes.append(
            f"{name}: more examples are allowed multipliers than were given one (max_support): r is "
            "an upper bound."
        )
    if c["split"] != "train":
        notes.append(f"{name}: certified on the {c['split']} examples.")
    step = number(c, "step")
    last = number(one.run.final, "step")
    if step is not None and last is not None and last > step:
        notes.append(
            f"{name}: certified at step {format_count(step)}; the run has gone on to step "
            f"{format_count(last)} since. Run marginflow certify again."
        )
    return notes


def _curves(found: Sequence[_Certified], alone: bool) -> Captioned:
    curves = []
    for one in found:
        curve = one.content["curve"]
        points = [
            (float(tau), float(residual))
            for tau, residual in zip(curve["taus"], curve["residuals"], strict=True)
            if tau is not None
        ]
        x, y = ([p[k] for p in points] for k in (0, 1))
        curves.append(Curve("" if alone else one.name, x, y, color=one.color))
    positive = [x for curve in curves for x in curve.x if x > 0]
    close = any(y is not None and y < _NEAR for curve in curves for y in curve.y)
    panel = Panel(
        "Residual r(τ)",
        "τ",
        "r(τ)",
        tuple(curves),
        xscale="symlog" if positive else "linear",
        yscale="log" if close else "linear",
        xthreshold=_threshold(positive) if positive else None,
    )
    caption = (
        "The relative distance from W to the nearest combination, with multipliers ≥ 0, of the "
        "gradients of the margins m_i ≤ (1 + τ) m_min. 0 at τ = 0 means a KKT point; 1 means that "
        "these margins explain nothing of W."
    )
    if close:
        caption += " Logarithmic axis."
    return Captioned(panel, caption)


def _threshold(positive: Sequence[float]) -> float:
    """The decade at or below the smallest τ, at most six decades below the largest."""
    low, high = (math.floor(math.log10(v) + 1e-9) for v in (min(positive), max(positive)))
    return 10.0 ** max(low, high - 6)


def _table(found: Sequence[_Certified]) -> Table:
    lines = [_line(one.content) for one in found]
    rows = [[title, *(line[title] for line in lines)] for title in lines[0]]
    header = ["", *(one.name for one in found)]
    header[0] = "certificate"
    colors = {k + 1: one.color for k, one in enumerate(found)} if len(found) > 1 else None
    return Table("The certificate in numbers", header, rows, colors=colors)


def _line(c: Mapping[str, Any]) -> dict[str, str]:
    residuals, support = c["residuals"], c["support"]
    tau = number(c, "tau")
    used = sum(value > 0 for value in support["multipliers"])
    return {
        "perturbation": attack_words(c["attack"]),
        "derivative": str(c["derivative"]),
        "loss (paper’s multipliers)": str(c["loss"]),
        "examples n": format_count(number(c, "examples")),
        "τ": "∞" if tau is None else format_short(tau),
        "examples in the support": format_count(len(support["indices"])),
        "of them with λ_i > 0": format_count(used),
        "r, best multipliers on the support": _residual(number(c, "residual")),
        "r, best multipliers on all examples": _residual(number(residuals, "best")),
        "r, paper’s multipliers, best scale": _residual(number(residuals, "tangential")),
        "r, paper’s multipliers (130)": _residual(number(residuals, "paper")),
        "stationarity χ": format_number(number(c, "stationarity")),
        "complementarity ξ": format_number(number(c, "complementarity")),
        "1 − cos β": format_number(number(c, "cosine_gap")),
        "m_min": format_number(number(c, "smallest_margin")),
        "‖W‖": format_number(number(c, "norm")),
        "seed": format_count(number(c, "seed")),
    }


def _short(value: float | None) -> str:
    """Four digits, but where these would say 1.000."""
    return format_number(value) if value is None or value < 0.9995 else _residual(value)


def _residual(value: float | None) -> str:
    """Six decimals: residuals crowd near 1, where four digits say 1.000."""
    if value is None:
        return format_number(None)
    return f"{value:.6f}" if value > 1e-3 else format_number(value)


def _support(one: _Certified, most: int) -> Support:
    c, saved = one.content, one.saved
    support = c["support"]
    entries = sorted(
        zip(
            support["multipliers"],
            support["indices"],
            support["margins"],
            support["labels"],
            strict=True,
        ),
        key=lambda entry: -entry[0],
    )
    positive = [entry for entry in entries if entry[0] > 0]
    shown = [entry for entry in positive if entry[1] in saved.clean][:most]
    pictures = [(saved.clean[i], saved.adversarial[i]) for _, i, _, _ in shown]
    sides = _sides(pictures[0][0], c["bounds"]) if pictures else None
    total = format_count(len(positive))
    if sides is None:
        listed = ", ".join(f"{i}" for _, i, _, _ in positive[:_LISTED])
        more = " …" if len(positive) > _LISTED else ""
        gone = "" if saved.clean else " Their inputs are not there; run marginflow certify again."
        return Support(
            one.name,
            (),
            f"The examples with λ_i > 0, numbered from 0, the largest λ_i first ({total}): {listed}{more}."
            + gone,
        )
    low, high = _range(pictures, c["bounds"])
    pairs = [
        Pair(
            _picture(clean, sides, low, high),
            _picture(perturbed, sides, low, high),
            f"no. {format_count(i)}, label {_class(label, c['classes'])}",
            format_number(margin, 3),
            format_number(multiplier, 3),
        )
        for (multiplier, i, margin, label), (clean, perturbed) in zip(shown, pictures, strict=True)
    ]
    which = f"all {total}" if len(pairs) == len(positive) else f"{len(pairs)} of {total}"
    which = "one" if len(positive) == 1 else which
    return Support(
        one.name,
        pairs,
        f"The examples with λ_i > 0, the largest λ_i first ({which}), numbered from 0: as given on the left, "
        f"perturbed on the right, both in greys from {format_short(low)} (black) to "
        f"{format_short(high)} (white).",
    )


def _sides(x: Tensor, bounds: object) -> tuple[int, int] | None:
    """Height and width of an input that can be shown: one channel, or a square vector in [0, 1]."""
    if bounds != [0.0, 1.0]:
        return None
    if x.ndim == 2 or (x.ndim == 3 and x.shape[0] == 1):
        height, width = x.shape[-2:]
    else:
        height = width = math.isqrt(x.numel())
        if x.ndim != 1 or height * width != x.numel():
            return None
    return (height, width) if min(height, width) >= _SMALLEST_SIDE else None


def _range(
    pictures: Sequence[tuple[Tensor, Tensor]], bounds: Sequence[float]
) -> tuple[float, float]:
    """The data's range, widened where perturbations leave it: nothing is cut off."""
    values = [picture for pair in pictures for picture in pair]
    low = min(float(bounds[0]), *(float(v.min()) for v in values))
    high = max(float(bounds[1]), *(float(v.max()) for v in values))
    return low, high


def _picture(x: Tensor, sides: tuple[int, int], low: float, high: float) -> str:
    from matplotlib.image import imsave

    # Without the name of the program that wrote it: its version is no part of the picture.
    metadata: dict[str, Any] = {"Software": None}
    levels = ((x.reshape(*sides, 1) - low) * (255 / (high - low))).round().clamp(0, 255).byte()
    buffer = io.BytesIO()
    imsave(buffer, levels.expand(*sides, 3).numpy(), format="png", metadata=metadata)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _class(label: int, classes: Sequence[str]) -> str:
    """The name of a label: 0 … C − 1, or −1 and +1 of two classes."""
    return str(classes[max(0, label)])
