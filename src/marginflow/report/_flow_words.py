"""How a gradient flow was followed and how it ended, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from marginflow.report._clock import at_start, format_log_time, is_flow, log_time_of, time_words
from marginflow.report._text import (
    format_count,
    format_number,
    format_percent,
    format_short,
    number,
)
from marginflow.runs import Run

_INTEGRATORS = {
    "stiff": "stiff (Radau, exact Jacobian)",
    "runge-kutta": "Runge–Kutta (RK45)",
    "steps": "explicit steps",
}
_GOALS = ("log_time", "log_norm", "loss_below")


def integrator_words(method: object) -> str:
    """An integrator's name with what it is: ``stiff (Radau, exact Jacobian)``."""
    return _INTEGRATORS.get(str(method), "unknown" if method is None else str(method))


def integrators(run: Run) -> str:
    """Which integrators were at work: ``explicit steps, from ln t = 12.59 on stiff (…)``.

    As far as the measurements tell: an integrator that came and went between two of them
    is not among them.
    """
    stretches: list[str] = []
    for method, group in groupby(run.metrics, key=lambda record: record.get("method")):
        first = next(iter(group))
        words = integrator_words(method)
        stretches.append(f"from {time_words(first)} on {words}" if stretches else words)
    return ", ".join(stretches)


def goal_words(config: Mapping[str, Any]) -> str:
    """What the flow was to reach: ``ln t = 100 or L < 10⁻⁶``; empty if nothing is recorded."""
    log_time, log_norm, below = (number(config, name) for name in _GOALS)
    parts = []
    if log_time is not None:
        parts.append(f"ln t = {format_log_time(log_time)}")
    if log_norm is not None:
        parts.append(f"ln ‖W‖ = {format_short(log_norm)}")
    if below is not None:
        parts.append(f"L < {format_short(below)}")
    return " or ".join(parts)


def reached_goal(run: Run) -> bool:
    """Whether the flow ended at one of its goals."""
    return run.config.get("ended") in _GOALS


def end_words(run: Run) -> str:
    """How a flow ended, in a word or two, for a table."""
    ended = run.config.get("ended")
    if reached_goal(run):
        return "goal reached"
    if ended == "work":
        return "out of evaluations"
    return "not finished" if ended is None else str(ended)


def followed(run: Run) -> str:
    """How the flow was followed: integrators, work, jumps of the field, falls of ℓ/ρ."""
    final = run.final
    work = [
        f"{format_count(number(final, key))} {title}"
        for key, title in (
            ("step", "steps"),
            ("evaluations", "evaluations of the field"),
            ("jacobians", "Jacobians"),
        )
        if number(final, key)
    ]
    text = "; ".join([f"integrator {integrators(run)}", *([", ".join(work)] if work else [])])
    sentences = [text, _jump_words(final)]
    steps, falls = number(final, "separated_steps"), number(final, "falls")
    if steps and falls is not None:
        largest = format_number(number(final, "largest_fall"), 2)
        sentences.append(
            f"Since the data are separated, ℓ/ρ fell on none of {format_count(steps)} steps"
            if falls == 0
            else f"Since the data are separated, ℓ/ρ fell on {format_count(falls)} of "
            f"{format_count(steps)} steps, by {largest} of itself at most"
        )
    return ". ".join(sentence for sentence in sentences if sentence) + "."


def _jump_words(final: Mapping[str, Any]) -> str:
    jumps, combined = number(final, "jumps"), number(final, "combined")
    if jumps is None:
        return ""
    if not jumps and not combined:
        return "No discontinuity of the field was found"
    text = "No discontinuity of the field was found"
    if jumps:
        times = "once" if jumps == 1 else f"{format_count(jumps)} times"
        text = f"Discontinuities of the field were searched for and found {times}"
    if combined:
        both = "the velocities on both sides of one"
        text += f"{';' if jumps else ' by bisection, but'} {format_count(combined)} steps combine {both}"
    return text


def flow_caveats(name: str, run: Run) -> list[str]:
    """What has to be known of a flow before its numbers are believed; often nothing."""
    config, final = run.config, run.final
    notes = []
    where, ended = time_words(final), config.get("ended")
    goal = goal_words(config) or "its goal"
    if ended is None:
        notes.append(
            f"{name} is not finished: it stands at {where} on its way to {goal}; continue it with "
            "resume."
        )
    elif ended == "not separated":
        share = format_percent(number(final, "adversarial_accuracy"))
        notes.append(
            f"{name} was given up at {where}, before {goal}, since it did not separate the data "
            f"({share} of the perturbed training examples have a positive margin): what theory says "
            "of late times does not apply to it. A wider or deeper network, a smaller ε or another "
            "seed may separate them."
        )
    elif ended == "work":
        limit = format_count(number(config, "max_evaluations"))
        notes.append(
            f"{name} ended at {where}, before {goal}: its {limit} evaluations of the field were "
            "used up; continue it with resume and a larger max_evaluations, or with a larger rtol."
        )
    elif not reached_goal(run):
        notes.append(f"{name} ended at {where}, before {goal}: {ended}.")
    sliding = next((record for record in run.metrics if record.get("sliding") is True), None)
    if sliding is not None:
        notes.append(
            f"{name} slides: by {time_words(sliding)} it runs along a surface on which its field jumps, "
            "such as where a sign of the perturbation or of a ReLU changes, within the integrator's "
            "tolerance. Theory assumes a field without jumps (Assumption 2), so ℓ/ρ may fall here."
        )
    elif number(final, "jumps"):
        notes.append(
            f"{name} has discontinuities of its field near its path, such as where a sign of the "
            "perturbation or of a ReLU changes: theory assumes a field without jumps (Assumption 2), so "
            "ℓ/ρ may fall."
        )
    return notes


def mixed_caveats(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """What to know of runs drawn on one axis of ln t, of which at least one is a flow."""
    named = list(zip(names, runs, strict=True))
    notes = []
    training = [(name, run) for name, run in named if not is_flow(run) and _timed(run)]
    if training:
        what = "are training runs" if len(training) > 1 else "is a training run"
        notes.append(
            f"{_and([name for name, _ in training])} {what}, drawn at t = Σ η, the sum of the learning "
            "rates: gradient descent is near the flow of the same loss only while its steps are small, "
            "and with batches only on average."
        )
        if any(number(run.config, "momentum") for _, run in training):
            notes[-1] += " Momentum β makes its time run faster, by 1/(1 − β)."
    for name, run in named:
        if not _timed(run):
            start = at_start(run.final)
            reason = "has no measurement after t = 0" if start else "does not record its time t"
            notes.append(
                f"{name} {reason}: it is not drawn against ln t; its numbers are in the tables."
            )
    ends = [(name, x) for name, run in named if (x := log_time_of(run.final)) is not None]
    places = [x for _, x in ends]
    if ends and max(places) - min(places) > 0.01 * max(1.0, *map(abs, places)):
        listed = "; ".join(f"{name}: ln t = {format_log_time(x)}" for name, x in ends)
        notes.append(
            f"The runs end at different times ({listed}), and margins change with time: compare them "
            "at the same ln t."
        )
    derivatives = [str(run.config.get("derivative") or "unknown") for _, run in named]
    if len(set(derivatives)) > 1:
        listed = "; ".join(f"{name}: {of}" for name, of in zip(names, derivatives, strict=True))
        notes.append(
            f"The derivatives differ ({listed}): they agree where the perturbation is the exact "
            "maximum, or none."
        )
    return notes


def _timed(run: Run) -> bool:
    return any(log_time_of(record) is not None for record in run.metrics)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
