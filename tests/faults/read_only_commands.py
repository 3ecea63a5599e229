"""What is refused on a read-only file system, and what works there; a finished run ``run`` is on it."""

from __future__ import annotations

from pathlib import Path

from fault_runs import JOBS, READERS, of, sweep_words


def refused_words(fixed: Path, elsewhere: Path) -> list[list[str]]:
    """Commands that would write below ``fixed``: ten."""
    run = fixed / "run"
    new = [[*words, "--out", str(fixed / "new")] for words in JOBS.values()]
    again = [[*JOBS["train"], "--out", str(run), how] for how in ("--resume", "--force")]
    sweep = sweep_words(elsewhere, fixed / "sweep")
    return [*new, *again, sweep, *(of(words, run) for words in READERS.values())]


def working_words(fixed: Path, elsewhere: Path) -> list[list[str]]:
    """Commands that read the run there: five."""
    run = str(fixed / "run")
    return [
        ["measure", run],
        ["measure", run, "--json"],
        ["compare", run, run],
        ["report", run, "--out", str(elsewhere / "page.html")],
        ["export", run, "--csv", str(elsewhere / "numbers.csv")],
    ]
