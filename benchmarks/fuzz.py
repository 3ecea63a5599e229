"""How much damage is survived: every kind of file that is parsed, damaged at random and read.

    python benchmarks/fuzz.py                            # 2,000 examples of each kind, an hour or two
    python benchmarks/fuzz.py --short                    # 3 examples of each kind, about a minute
    python benchmarks/fuzz.py --examples 300 --seed 1    # as many of each kind, another seed

The damage and the readers are those of ``tests/hostile``. An example fails if a command ends with anything
but success or one line that says what is wrong, takes longer than 10 seconds, or makes the process's peak
grow by more than 200 MB. Printed are counts, the slowest example and the largest growth, by kind; a failure
is printed with its seed and its traceback, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hostile"))

import torch
from hostile_runs import make_all, quiet
from hostile_targets import (
    SECONDS,
    SPECS,
    TARGETS,
    Tally,
    file_example,
    inside_folder,
    measured,
    spec_example,
)

MEMORY = 200 * 2**20


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=2000, help="of each kind")
    parser.add_argument("--seconds", type=float, help="stop the examples of a kind after as long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds whose names hold this")
    parser.add_argument("--short", action="store_true", help="3 examples of each kind")
    return parser.parse_args()


def campaign(
    name: str, example: Callable[[Random], None], count: int, seed: int, seconds: float | None
) -> Tally:
    """Examples of one kind; failures are printed and counted."""
    tally, began = Tally(), time.monotonic()
    for number in range(count):
        if seconds is not None and time.monotonic() - began > seconds:
            break
        random = Random(f"{seed}/{name}/{number}")
        slowest = tally.slowest
        tally.slowest = 0.0
        grown, tally.grown = tally.grown, 0
        try:
            measured(tally, lambda random=random: example(random))
            if tally.slowest > SECONDS or (tally.grown > MEMORY and number):
                raise AssertionError(f"{tally.slowest:.1f} s, {tally.grown / 2**20:.0f} MiB more")
        except Exception:
            tally.failures += 1
            print(
                f"FAILED: {name}, example {number} of seed {seed}\n{traceback.format_exc(limit=-3)}",
                flush=True,
            )
        tally.slowest, tally.grown = max(slowest, tally.slowest), max(grown, tally.grown)
    print(
        f"{name:26} {tally.count:7,d} {tally.slowest:8.2f} s {tally.grown / 2**20:7.0f} MiB "
        f"{tally.failures:5d} failed",
        flush=True,
    )
    return tally


def main() -> int:
    """Run the campaign; 1 if an example failed."""
    asked = arguments()
    count = 3 if asked.short else asked.examples
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("error")
    began, tallies = time.monotonic(), []
    with tempfile.TemporaryDirectory() as top:
        valid = Path(top) / "valid"
        valid.mkdir()
        make_all(valid)
        for warm in ("report", "verify"):
            quiet(warm, valid / "train")  # what is imported once is no example's memory
        print(f"{'kind':26} {'examples':>7} {'slowest':>9} {'growth':>11}")
        examples: dict[str, Callable[[Random], None]] = {
            f"specification: {kind}": lambda random, kind=kind: spec_example(kind, random)
            for kind in SPECS
        }
        for name, target in TARGETS.items():

            def example(random: Random, target: object = target) -> None:
                scratch = tempfile.TemporaryDirectory(dir=top)
                with scratch as folder, inside_folder(Path(folder)):
                    file_example(target, valid, Path(folder), random)  # type: ignore[arg-type]

            examples[name] = example
        for name, one in examples.items():
            if asked.only is None or asked.only in name:
                tallies.append(campaign(name, one, count, asked.seed, asked.seconds))
    total, failed = sum(t.count for t in tallies), sum(t.failures for t in tallies)
    slowest, grown = max(t.slowest for t in tallies), max(t.grown for t in tallies)
    print(
        f"{total:,} examples of {len(tallies)} kinds in {time.monotonic() - began:.0f} s: {failed} failed; "
        f"slowest {slowest:.2f} s; largest growth {grown / 2**20:.0f} MiB"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
