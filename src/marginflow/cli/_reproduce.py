"""``marginflow reproduce``."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marginflow._checks import choice, whole
from marginflow.errors import InputError, RunError

if TYPE_CHECKING:
    from marginflow.experiments import Reproduction, Stored
    from marginflow.theorems import Verdict

_WIDTH = 80


def run_reproduction(
    figures: Sequence[str],
    *,
    scale: str,
    out: Path | None,
    seed: int,
    seeds: int,
    form: str,
    data_dir: Path | None,
    jobs: int | None,
    threads: int,
    force: bool,
    progress: bool,
) -> None:
    """Train what the figures need, draw them, print their statements and verdicts, write the page."""
    choice("--format", form, ("svg", "png", "pdf"))
    for name, value, least in (
        ("--seed", seed, 0),
        ("--seeds", seeds, 1),
        ("--threads", threads, 1),
    ):
        whole(name, value, least=least)
    jobs = _cores() if jobs is None else whole("--jobs", jobs, least=1)

    from marginflow.experiments import EXPERIMENTS, SCALES, reproduce, results_of
    from marginflow.report import save_figure, write_figures
    from marginflow.runs import write_atomically

    size = next(name for name in SCALES if name == choice("--scale", scale, SCALES))
    names = _chosen(figures)
    folder = Path("runs") / "figures" / scale if out is None else out
    for place in (folder, *folder.parents):
        if os.path.lexists(place) and not os.path.isdir(place):
            raise InputError(f"--out: expected a folder, got the file {str(place)!r}")
    began = time.monotonic()
    done: list[Reproduction] = []
    for part in reproduce(
        [EXPERIMENTS[name][size] for name in names],
        folder,
        seed=seed,
        seeds=seeds,
        jobs=jobs,
        threads=threads,
        data_dir=data_dir,
        force=force,
        tell=_tell if progress else None,
    ):
        path = save_figure(part.figure, folder / f"{part.figure.name}.{form}")
        content = json.dumps(results_of(part, size), indent=2, ensure_ascii=False)
        write_atomically(folder / f"{part.figure.name}.json", content + "\n")
        _print_figure(part, path)
        done.append(part)
    earlier = _earlier(folder, scale, names)
    shown = {part.figure.name: (part.figure, part.seconds) for part in done}
    shown |= {name: (stored.figure, stored.seconds) for name, stored in earlier.items()}
    origins: dict[tuple[int, int, int], list[str]] = {}
    for name, stored in earlier.items():
        origin = (stored.seeds[0], len(stored.seeds), stored.threads or 1)
        origins.setdefault(origin, []).append(name)
    commands = [_command(figures, scale, seed, seeds, threads, folder)]
    commands += [_command(group, scale, *origin, folder) for origin, group in origins.items()]
    page = write_figures(
        [shown[name] for name in EXPERIMENTS if name in shown],
        folder / "index.html",
        scale=scale,
        command="\n".join(commands),
    )
    counts: dict[str, int] = {}
    for part in done:
        for verdict in part.figure.verdicts:
            counts[verdict.outcome] = counts.get(verdict.outcome, 0) + 1
    print(
        f"{len(done)} figure{'s' * (len(done) != 1)} in {time.monotonic() - began:.0f} s; claims: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    )
    if earlier:
        print(
            _filled(f"beside them on the page, as they were made before: {', '.join(earlier)}", "")
        )
    print(f"all on one page: {page}")


def _earlier(folder: Path, scale: str, made: Sequence[str]) -> dict[str, Stored]:
    """The figures of the same scale that earlier calls left in the folder, by name, in their order."""
    from marginflow.experiments import EXPERIMENTS, stored_figure

    found = {}
    for name in EXPERIMENTS:
        if name in made:
            continue
        try:
            stored = stored_figure(folder / f"{name}.json")
        except RunError as error:
            _tell(f"warning: {name} is left out of the page: {error}; reproduce it again")
            continue
        if stored is not None and (stored.figure.name, stored.scale) == (name, scale):
            found[name] = stored
    return found


def _chosen(figures: Sequence[str]) -> list[str]:
    """The names of the experiments, each once, in their order."""
    from marginflow.experiments import EXPERIMENTS, OURS, PAPER

    groups = {"all": tuple(EXPERIMENTS), "paper": PAPER, "ours": OURS}
    wanted: set[str] = set()
    for figure in figures:
        choice("figure", figure, (*EXPERIMENTS, *groups))
        wanted |= set(groups.get(figure, (figure,)))
    return [name for name in EXPERIMENTS if name in wanted]


def _cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_figure(part: Reproduction, path: Path) -> None:
    from marginflow.experiments import course_lines

    print(f"\n{part.figure.title}")
    print(_filled(part.figure.statement, "  "))
    for verdict in part.figure.verdicts:
        print(verdict_lines(verdict))
    if part.figure.name in ("fig1", "fig2", "fig3", "fig4", "fig5"):
        print("  γ̂_m in units of 10⁻³, by epoch:")
        for line in course_lines(part):
            print(f"    {line}")
    for note in part.figure.notes:
        print(_filled(note, "  "))
    print(f"  drawn in {path}", flush=True)


def verdict_lines(verdict: Verdict) -> str:
    """``[holds] Figure 1(a): claim`` and the numbers below, in lines of at most 80 columns."""
    head = f"[{verdict.outcome}] {verdict.statement}: {verdict.claim}"
    lines = [_filled(head, "  "), _filled(verdict.measured, "      ")]
    if verdict.advice:
        lines.append(_filled(f"advice: {verdict.advice}", "      "))
    return "\n".join(lines)


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH - 2,  # combining accents (γ̂) count as letters there, but terminals differ
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _command(
    figures: Sequence[str], scale: str, seed: int, seeds: int, threads: int, folder: Path
) -> str:
    parts = ["marginflow reproduce", *figures, f"--scale {scale}"]
    parts += [f"--seed {seed}"] * (seed != 0) + [f"--seeds {seeds}"] * (seeds != 1)
    parts += [f"--threads {threads}"] * (threads != 1)
    return " ".join([*parts, f"--out {shlex.quote(str(folder))}"])
