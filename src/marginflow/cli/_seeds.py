"""What ``marginflow train --seeds`` adds: the seeds, the folders of their runs, what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marginflow.errors import InputError, RunError

if TYPE_CHECKING:
    from marginflow.runs import Run

_ALIKE = ("trained against", "measured with", "epochs")
"""Columns in which seeds do not differ."""


def take_seeds(options: dict[str, Any]) -> int | list[int] | None:
    """Take ``seeds`` out of the options: how many, or which ones; None if one seed is trained.

    Raises:
        InputError: no numbers, or ``seed`` beside it.
    """
    given = options.pop("seeds", None)
    if given is None:
        return None
    if "seed" in options:
        raise InputError("--seed and --seeds exclude each other; --seeds 0,3,5 names the seeds")
    try:
        numbers = [int(part) for part in str(given).split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"--seeds: expected a number such as 8, or seeds as 0,3,5, got {given!r}")
    return numbers if "," in str(given) else numbers[0]


def run_with_options(out: Path, seeds: int | list[int] | None) -> Path:
    """The run directory in which the options of a training to be resumed are found.

    Raises:
        RunError: runs of several seeds where one is continued.
    """
    runs = sorted(out.glob("seed-*/run.json"))
    if seeds is None:
        if runs and not (out / "run.json").exists():
            raise RunError(
                f"{str(out)!r} holds runs of several seeds; continue all of them with "
                f"--seeds {len(runs)}, or one: --resume --out {runs[0].parent}"
            )
        return out
    return runs[0].parent if runs else out


def way_back(out: Path, seeds: int | list[int] | None) -> str | None:
    """How an interrupted training is continued, or None if nothing of it is on disk."""
    if (out / "run.json").exists():
        return f"a checkpoint is written; continue with: marginflow train --resume --out {out}"
    if seeds is None or not any(out.glob("seed-*/run.json")):
        return None
    # "5," is the seed 5, "5" is five seeds.
    named = str(seeds) if isinstance(seeds, int) else ",".join(map(str, seeds))
    named += "," if isinstance(seeds, list) and len(seeds) == 1 else ""
    return (
        "checkpoints are written; continue with: marginflow train --resume "
        f"--seeds {named} --out {out}"
    )


def print_seeds(runs: Sequence[Run], out: Path, seconds: float) -> None:
    """What came out, one line a seed."""
    epochs = runs[0].config["epochs"]
    print(f"{len(runs)} seeds, {epochs} epochs each, in {seconds:.1f} s; the runs are in {out}")
    if all(run.metrics for run in runs):
        from marginflow.cli._tables import print_table
        from marginflow.report import comparison_table

        headers, rows = comparison_table(runs)
        shown = [k for k, header in enumerate(headers) if header not in _ALIKE]
        print_table([headers[k] for k in shown], [[row[k] for k in shown] for row in rows])
        print(f"next: marginflow report {out}/seed-* --out {out}/report.html")
