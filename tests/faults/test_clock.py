"""The clock set back: nothing is ordered by it, and no duration is negative."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from fault_runs import JOBS, READERS, bits, made, of, sweep_here, sweep_words

from marginflow.cli import main
from marginflow.sweeps import load_sweep


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds it an hour earlier; it began in the year 2100."""
    now = 4102444800.0

    def earlier() -> float:
        nonlocal now
        now -= 3600
        return now

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "time_ns", lambda: int(earlier() * 1e9))


def _elapsed(run: Path) -> list[float]:
    sides = sorted((run / "checkpoints").glob("*.json"))
    return [json.loads(p.read_text()).get("elapsed_seconds", 0.0) for p in sides]


@pytest.mark.usefixtures("backwards")
@pytest.mark.parametrize("kind", JOBS)
def test_jobs_and_what_reads_them(kind: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as right:
        right.undo()
        whole = made(kind, tmp_path / "whole")
    run = made(kind, tmp_path / "run")
    elapsed = _elapsed(run)
    assert elapsed == sorted(elapsed)
    assert elapsed[0] >= 0
    newest = sorted((run / "checkpoints").iterdir())[-2:]
    for path in newest:
        path.unlink()
    # What is left was written in the future, the newest of it the earliest.
    for place, path in enumerate(sorted(run.rglob("*"))):
        os.utime(path, (4102444800.0 - place, 4102444800.0 - place))
    made(kind, run, "--resume")
    assert bits(run) == bits(whole)
    assert min(_elapsed(run)) >= 0
    # What is certified and judged must be separated; a page is of anything.
    names = READERS if kind == "train" else ["report"]
    for name in names:
        assert main(of(READERS[name][:2], run)) == 0
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.usefixtures("backwards")
def test_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep_here(monkeypatch)
    out = tmp_path / "sweep"
    assert main(sweep_words(tmp_path, out)) == 0
    lines = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    assert all(line["seconds"] >= 0 for line in lines)
    assert load_sweep(out) is not None


def test_verdicts_are_old_by_their_step_and_not_by_their_date(tmp_path: Path) -> None:
    run = made("train", tmp_path / "run")
    assert main(["verify", str(run)]) == 0
    os.utime(run / "verdicts.json", (0, 0))  # judged with the clock set back
    assert main(["report", str(run)]) == 0
    fresh = (run / "report.html").read_text()
    os.utime(run / "verdicts.json", None)
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text() == fresh
