"""What ``marginflow verify`` found of runs, for a page: the audit and the verdicts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marginflow._reading import read_json
from marginflow.report._clock import is_ascent
from marginflow.report._command import reproduction
from marginflow.report._tables import Table, run_columns
from marginflow.report._text import MISSING, number, run_names
from marginflow.runs import Run

_OUTCOMES = {
    "holds": ("✓ holds", "hold", "holds"),
    "fails": ("✗ fails", "fail", "fails"),
    "not reached": ("… not reached", "not reached", "not reached"),
    "does not apply": ("– does not apply", "do not apply", "does not apply"),
}
"""By the outcome: as a mark, and in the plural and the singular of a count."""

_UNJUDGED = "Not judged yet. This adds the verdicts to the next report:"
_NO_FLOW = (
    "The statements speak of gradient flow and of training; steps that maximise margins follow neither. "
    "What applies is the distance from a KKT point (Theorem 5)."
)
_CERTIFY = " This adds it to the next report:"
_LATER = 1.0  # seconds; a copied folder has all its times within one


@dataclass(frozen=True)
class Judged:
    """One statement that was decided, or not reached yet.

    Attributes:
        statement: its name in the paper.
        claim: what it says.
        mark: the verdict with its sign.
        kind: the verdict as a class of the style sheet.
        measured: what came out.
        details: lines below it: of what, what is predicted, what is not met, advice.
    """

    statement: str
    claim: str
    mark: str
    kind: str
    measured: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Theory:
    """What a page says of one run and the theory.

    Attributes:
        name: of the run.
        counts: ``9 hold, 2 do not apply``; empty if nothing was judged.
        remark: what has to be known or done; often nothing.
        command: the command that judges the run; empty if nothing can, or has to.
        judged: the statements that apply.
        hypotheses: what the audit found, or None.
        others: the statements that do not apply, and why; or None.
    """

    name: str
    counts: str
    remark: str
    command: str
    judged: tuple[Judged, ...] = ()
    hypotheses: Table | None = None
    others: Table | None = None


def theories(runs: Sequence[Run]) -> list[Theory]:
    """The verdicts of each run, as ``verdicts.json`` and ``audit.json`` in its folder have them."""
    return [_theory(run, name) for run, name in zip(runs, run_names(runs), strict=True)]


def outcomes_table(runs: Sequence[Run]) -> Table | None:
    """The verdicts of several runs beside each other; None if there are none, or one run only."""
    found = [_verdicts(run) or [] for run in runs]
    if len(runs) < 2 or not any(found):
        return None
    by_run = [{_text(v, "statement"): _mark(v) for v in verdicts} for verdicts in found]
    names = list(dict.fromkeys(name for verdicts in by_run for name in verdicts))
    rows = [[name, *(verdicts.get(name, MISSING) for verdicts in by_run)] for name in names]
    header = ["statement", *run_names(runs)]
    return Table("The verdicts", header, rows, numbers=False, colors=run_columns(runs))


def _theory(run: Run, name: str) -> Theory:
    if is_ascent(run):
        certified = run.path is None or (run.path / "certificate.json").exists()
        return Theory(
            name,
            "",
            _NO_FLOW + _CERTIFY * (not certified),
            f"marginflow certify {shlex.quote(f'runs/{run.name}')}" * (not certified),
        )
    if run.path is None:
        return Theory(name, "", "The run was kept in memory: mf.verify(run) judges it.", "")
    verdicts = _verdicts(run)
    if verdicts is None and not reproduction(run)[0]:
        return Theory(
            name, "", f"Not judged: mf.verify, given what {name} was made of, does it.", ""
        )
    command = f"marginflow verify {shlex.quote(f'runs/{run.name}')}"
    if verdicts is None:
        damaged = (run.path / "verdicts.json").exists()
        remark = "verdicts.json cannot be read; write it again:" if damaged else _UNJUDGED
        return Theory(name, "", remark, command)
    old = _is_old(run, run.path)
    return Theory(
        name,
        _counts(verdicts),
        "The run has measurements that are younger than these verdicts; judge it again:" * old,
        command * old,
        tuple(_judged(v) for v in verdicts if v.get("outcome") != "does not apply"),
        _hypotheses(run.path),
        _others(verdicts),
    )


def _verdicts(run: Run) -> list[Mapping[str, Any]] | None:
    content = None if run.path is None else _read(run.path / "verdicts.json")
    if not isinstance(content, list) or not all(isinstance(v, dict) for v in content):
        return None
    return content


def _read(path: Path) -> Any:
    """The content of a JSON file; None where there is none, or none that can be read."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _is_old(run: Run, folder: Path) -> bool:
    """Whether something was measured after the run was judged: by steps, or else by the files' times."""
    audited = _read(folder / "audit.json")
    judged, last = (
        number(entry, "step") if isinstance(entry, dict) else None for entry in (audited, run.final)
    )
    if judged is not None and last is not None:
        return last > judged
    try:
        measured, written = (
            (folder / name).stat().st_mtime for name in ("metrics.jsonl", "verdicts.json")
        )
    except OSError:
        return False
    return measured > written + _LATER


def _counts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """``9 hold, 1 fails, 2 do not apply``."""
    parts = []
    for outcome, (_, many, one) in _OUTCOMES.items():
        if count := sum(v.get("outcome") == outcome for v in verdicts):
            parts.append(f"{count} {one if count == 1 else many}")
    return ", ".join(parts)


def _judged(verdict: Mapping[str, Any]) -> Judged:
    details = [
        f"Of: {_text(verdict, 'quantity')}.",
        f"Predicted: {_text(verdict, 'prediction')} (tolerance {_text(verdict, 'tolerance')}).",
    ]
    details += [
        f"Although not met: {_text(h, 'name')}" + (f" ({h['detail']})." if h.get("detail") else ".")
        for h in _hypotheses_of(verdict)
        if h.get("met") is False
    ]
    if verdict.get("advice"):
        details.append(f"Advice: {verdict['advice']}.")
    outcome = _text(verdict, "outcome")
    return Judged(
        _text(verdict, "statement"),
        _text(verdict, "claim"),
        _mark(verdict),
        outcome.replace(" ", "-") if outcome in _OUTCOMES else "unknown",
        _text(verdict, "measured"),
        tuple(details),
    )


def _hypotheses_of(verdict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    listed = verdict.get("hypotheses")
    return [h for h in listed if isinstance(h, dict)] if isinstance(listed, list) else []


def _others(verdicts: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = [
        [_text(v, "statement"), _text(v, "claim"), _text(v, "measured")]
        for v in verdicts
        if v.get("outcome") == "does not apply"
    ]
    header = ["statement", "claim", "why"]
    return Table("Statements that do not apply", header, rows, False, prose=True) if rows else None


def _hypotheses(folder: Path) -> Table | None:
    content = _read(folder / "audit.json")
    answers = content.get("answers") if isinstance(content, dict) else None
    if not isinstance(answers, list):
        return None
    rows = [
        [_text(a, key) for key in ("question", "answer", "meaning")]
        for a in answers
        if isinstance(a, dict)
    ]
    header = ["hypothesis", "found", "that is"]
    return Table("Hypotheses of the paper, each measured", header, rows, False, prose=True)


def _mark(verdict: Mapping[str, Any]) -> str:
    outcome = _text(verdict, "outcome")
    return _OUTCOMES[outcome][0] if outcome in _OUTCOMES else outcome


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return MISSING if value is None or value == "" else str(value)
