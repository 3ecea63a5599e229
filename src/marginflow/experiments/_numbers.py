"""The numbers of a reproduction, for ``results.json`` and for the terminal.

Source: marginflow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from marginflow._reading import read_json
from marginflow.errors import RunError
from marginflow.experiments._claims import separation
from marginflow.experiments._curves import ACCURACY, MARGIN, Records, path_of
from marginflow.experiments._experiment import MILESTONES, ScaleName
from marginflow.experiments._figure import Curve, FigureData, Matrix, Panel
from marginflow.experiments._reproduce import Reproduction
from marginflow.theorems import Hypothesis, Verdict

_KEPT = ("versions", "git_revision", "machine", "threads", "data_sha256")


def results_of(done: Reproduction, scale: ScaleName) -> dict[str, Any]:
    """All that a figure says, as JSON: settings, courses, claims, drawn data, origin.

    Args:
        done: a finished reproduction.
        scale: at which it was made.
    """
    figure, results = done.figure, done.results
    first = next(iter(results.trained.values()))[0].run.config
    return {
        "figure": figure.name,
        "scale": scale,
        "seeds": list(results.seeds),
        "title": figure.title,
        "statement": figure.statement,
        "notes": list(figure.notes),
        "verdicts": [verdict.as_dict() for verdict in figure.verdicts],
        "settings": asdict(done.experiment),
        "trainings": [asdict(training) for training in done.experiment.trainings()],
        "courses": courses(done),
        "panels": [asdict(panel) for panel in figure.panels],
        "training_seconds": round(done.seconds, 1),
        "origin": {key: first[key] for key in _KEPT if key in first},
    }


@dataclass(frozen=True, eq=False)
class Stored:
    """A figure that an earlier call left.

    Attributes:
        figure: what was drawn.
        scale: at which scale.
        seeds: of its trainings.
        threads: of each training; None where it is not known.
        seconds: what its trainings took, in seconds.
    """

    figure: FigureData
    scale: str
    seeds: tuple[int, ...]
    threads: int | None
    seconds: float


def stored_figure(path: str | os.PathLike[str]) -> Stored | None:
    """The figure of a file that holds :func:`results_of`; None where there is no such file.

    Args:
        path: a ``results.json``.

    Raises:
        RunError: a damaged file.
    """
    try:
        content = read_json(path)
        figure = FigureData(
            content["figure"],
            content["title"],
            content["statement"],
            tuple(map(_panel, content["panels"])),
            tuple(content["notes"]),
            tuple(map(_verdict, content["verdicts"])),
        )
        first, *more = (int(seed) for seed in content["seeds"])
        threads = content["origin"].get("threads")
        seconds = float(content["training_seconds"])
        return Stored(figure, str(content["scale"]), (first, *more), threads, seconds)
    except FileNotFoundError:
        return None
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RunError(f"{os.fspath(path)!r} is damaged ({error!r})") from None


def _panel(content: Mapping[str, Any]) -> Panel | Matrix:
    if "values" in content:
        return Matrix(**content)
    return Panel(**{**content, "curves": tuple(Curve(**curve) for curve in content["curves"])})


def _verdict(content: Mapping[str, Any]) -> Verdict:
    hypotheses = tuple(Hypothesis(**one) for one in content["hypotheses"])
    return Verdict(**{**content, "hypotheses": hypotheses})


def courses(done: Reproduction) -> list[dict[str, Any]]:
    """γ̂_m and accuracy at the milestones and the end, and the epoch of 100 %, of every run."""
    found = []
    for seeds in done.results.trained.values():
        for t in seeds:
            own = t.training.measure_with or t.training.attack
            for attack in (own, *t.training.also):
                records = t.records(attack)
                found.append(
                    {
                        "training": t.training.name,
                        "label": t.training.label,
                        "seed": t.seed,
                        "trained_against": t.training.attack or "none",
                        "measured_under": attack or "none",
                        "epochs": t.training.epochs,
                        "normalized_margin": _at_milestones(records, MARGIN),
                        "adversarial_accuracy": _at_milestones(records, ACCURACY),
                        "first_measured_epoch_all_fitted": separation(records),
                    }
                )
    return found


def course_lines(done: Reproduction) -> list[str]:
    """The courses of γ̂_m in units of 10⁻³ as lines of at most 80 columns.

    Args:
        done: a finished reproduction.
    """
    lines = []
    for course in courses(done):
        margins: dict[str, float] = course["normalized_margin"]
        fitted = course["first_measured_epoch_all_fitted"]
        under = "" if course["measured_under"] == course["trained_against"] else " under "
        if under:
            under += course["measured_under"].partition(":")[0]
        seed = f", seed {course['seed']}" if len(done.results.seeds) > 1 else ""
        lines.append(
            f"{course['label']}{seed}{under}: 100 % "
            + ("not reached" if fitted is None else f"at epoch {fitted:,.0f}")
        )
        lines += _wrapped([f"{int(epoch):,}: {1e3 * m:.3g}" for epoch, m in margins.items()])
    return [line.replace(": -", ": −") for line in lines]


def _wrapped(parts: Sequence[str], width: int = 74) -> list[str]:
    lines, line = [], ""
    for part in parts:
        if line and len(line) + len(part) + 3 > width:
            lines.append(line)
            line = ""
        line += ("   " if line else "") + part
    return [f"    {text}" for text in (*lines, line) if text]


def _at_milestones(records: Records, key: str) -> dict[str, float]:
    path = path_of(records, key)
    last = max(path, default=0.0)
    return {str(int(epoch)): path[epoch] for epoch in (*MILESTONES, last) if epoch in path}
