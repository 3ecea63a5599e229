"""How long marginflow takes to start: its import beyond torch's, and each command's help.

    python benchmarks/startup.py            # ten runs of each command, about a minute
    python benchmarks/startup.py --short    # three runs of some of them, about ten seconds

Each command is a process of its own, timed from outside. They run in turns, once through before
anything is timed, so that files are in memory and bytecode is compiled, as pip does when it
installs. Given are the median and the quartiles. What marginflow adds to `import torch` is the
difference of the two runs of a turn.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from marginflow.cli._app import app

HELP_TARGET = 0.4
IMPORT_TARGET = 0.3

TORCH = "import torch"
USE = "import torch, marginflow; marginflow.train"
TRAINING = "import torch, marginflow as mf; mf.train('mlp:8', 'separable:n=8,d=2', epochs=1)"
SHORT = ("pass", TORCH, USE, "marginflow --help", "marginflow train --help")


def commands() -> dict[str, list[str]]:
    """What is timed: name, and arguments of the interpreter."""
    code = ("pass", TORCH, "import marginflow", USE, TRAINING)
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    options = ("--version", "--help", *(f"{name} --help" for name in names))
    return {line: ["-c", line] for line in code} | {
        f"marginflow {line}": ["-m", "marginflow", *line.split()] for line in options
    }


def seconds(arguments: Sequence[str]) -> float:
    """The time of one process."""
    # Without bytecode each run would compile the library again; no installed package does.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    return time.perf_counter() - began


def row(name: str, times: Sequence[float], target: float | None = None) -> str:
    """A line of the table."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    verdict = "–"
    if target is not None:
        verdict = f"≤ {target} s: {'reached' if median <= target else 'not reached'}"
    return f"| {name} | {median:.3f} s | {low:.3f} … {high:.3f} s | {verdict} |"


def target_of(name: str) -> float | None:
    return HELP_TARGET if name.endswith("--help") else None


def report(times: Mapping[str, Sequence[float]]) -> None:
    """Print the table of all commands and of the difference."""
    print("| command | median | quartiles | target |\n| -- | --: | --: | -- |")
    for name, found in times.items():
        shown = name if name.startswith("marginflow") else f'python -c "{name}"'
        print(row(f"`{shown}`", found, target_of(name)))
    added = [use - torch for use, torch in zip(times[USE], times[TORCH], strict=True)]
    print(row("marginflow.train beyond torch", added, IMPORT_TARGET))
    if TRAINING in times:
        first = [done - use for done, use in zip(times[TRAINING], times[USE], strict=True)]
        print(row("a first training beyond that", first))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="three runs of some commands")
    parser.add_argument("--runs", type=int, help="of each command (default 10)")
    asked = parser.parse_args()
    runs = asked.runs or (3 if asked.short else 10)
    if runs < 2:
        parser.error(f"--runs: expected at least 2, for quartiles, got {runs}")
    timed = {n: line for n, line in commands().items() if not asked.short or n in SHORT}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(runs + 1):
        for name, arguments in timed.items():
            found = seconds(arguments)
            if turn > 0:
                times[name].append(found)
    packages = ("marginflow", "torch", "typer", "rich")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"versions  {versions}, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"runs      {runs} of each command, in turns\n")
    report(times)


if __name__ == "__main__":
    main()
