"""How time and memory grow with n, width, depth, PGD steps and the number of weights.

One thing is varied at a time, the rest stays at 784-256-256-1, n = 2400, batches of 80, FGSM, on random
examples in [0, 1]; the number of weights P is varied with all widths in proportion. Timed is a training epoch
(engine fused) and a pass of margins over all examples, in turns of random order. Peak memory is that of the
whole job, examples and network included, in a process of its own, above what Python, PyTorch and
marginflow take.

Fitted is `ln t = a + b ln size` by least squares; b is the exponent. The residual says by how much (root mean
square) the values lie off the line: where a fixed cost or a change of regime shows, it is large. "At the
end" is the exponent between the two largest sizes, where fixed costs matter least.

How to run:

    .venv/bin/python benchmarks/growth.py

docs/performance.md explains the result.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import _common
import numpy as np
import torch
from _loops import Case, OursFused
from _memory import peak
from _timing import add_clock, imitate, in_turns, machine, seconds, set_clock, setting, table

import marginflow as mf


@dataclass(frozen=True)
class Size:
    """One problem: n, width and number of hidden layers, steps of the attack, features."""

    n: int = 2400
    width: int = 256
    depth: int = 2
    steps: int = 1
    features: int = 784

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the network."""
        return (self.features, *(self.width,) * self.depth, 1)

    @property
    def weights(self) -> int:
        """P."""
        return sum(a * b for a, b in zip(self.widths[1:], self.widths, strict=False))

    def case(self) -> Case:
        """The training; drawing the examples is part of the job."""
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(self.n, self.features, generator=draw)
        y = torch.arange(self.n) % 2 * 2 - 1
        return Case("growth", mf.Dataset(x, y, bounds=(0, 1)), self.widths, self.steps, 80)


BASE = Size()


def sweeps(short: bool) -> dict[str, tuple[list[float], list[Size]]]:
    """By the name of what varies: its values and the problems."""
    kept = slice(3 if short else None)
    n = [600, 1200, 2400, 4800, 9600][kept]
    width = [64, 128, 256, 512, 1024][kept]
    depth = [1, 2, 4, 8, 16][kept]
    steps = [1, 2, 4, 8, 16][kept]
    scaled = [replace(BASE, features=m, width=m) for m in [128, 256, 512, 1024, 2048][kept]]
    return {
        "n": ([*n], [replace(BASE, n=v) for v in n]),
        "width": ([*width], [replace(BASE, width=v) for v in width]),
        "depth (hidden layers)": ([*depth], [replace(BASE, depth=v) for v in depth]),
        "PGD steps": ([*steps], [replace(BASE, steps=v) for v in steps]),
        "weights P": ([size.weights for size in scaled], scaled),
    }


def epoch(size: Size) -> Callable[[], float]:
    """A training epoch."""
    return OursFused(size.case())


def margins(size: Size) -> Callable[[], float]:
    """A pass of margins over all examples."""
    case = size.case()
    model = mf.models.mlp(*case.widths, seed=0)
    data = case.data
    homogeneity = mf.Monitor(model, data).homogeneity  # measured once in a training
    return lambda: seconds(
        lambda: mf.adversarial_margins(model, data.x, data.y, case.attack, homogeneity=homogeneity)
    )


JOBS = {"epoch": epoch, "margins": margins}


def whole_job(name: str, size: Size, threads: int) -> Callable[[], object]:
    """Everything from drawing the examples on, for a process of its own."""
    torch.set_num_threads(threads)
    JOBS[name](Size(n=80, width=8, depth=1, features=8))()  # what is loaded on first use
    return lambda: JOBS[name](size)()


def fit(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Exponent b of ``values ∝ sizes^b`` and the root mean square of the residuals of the logarithms."""
    logs = np.log(np.array(sizes, dtype=float)), np.log(np.array(values, dtype=float))
    exponent, constant = np.polyfit(*logs, 1)
    off = logs[1] - exponent * logs[0] - constant
    return float(exponent), float(np.sqrt(np.mean(off**2)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="the three smallest sizes, 3 rounds")
    parser.add_argument("--rounds", type=int, help="default 7, with --short 3")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--seed", type=int, default=0, help="of the turns' order")
    add_clock(parser)
    asked = parser.parse_args()
    asked.rounds = asked.rounds or (3 if asked.short else 7)
    set_clock(parser, asked)
    return asked


def main() -> None:
    asked = arguments()
    imitate(asked)
    print(
        f"machine   {machine()}\n"
        f"versions  {_common.versions(('marginflow', 'torch'), asked.threads)}\n"
        f"rounds    {asked.rounds}, order by seed {asked.seed}; minima\n"
    )
    plans = sweeps(asked.short)
    problems = {size for _, sizes in plans.values() for size in sizes}
    ordered = sorted(problems, key=lambda s: (s.n, s.width, s.depth, s.steps, s.features))
    jobs: dict[tuple[str, Size], Callable[[], float]] = {}
    with setting(asked.threads):
        for name, make in JOBS.items():
            for size in ordered:
                jobs[name, size] = make(size)
        times = in_turns(jobs, asked.rounds, asked.seed)
    memory = {key: peak(whole_job, *key, asked.threads) for key in jobs}

    for name, what in (("epoch", "A training epoch"), ("margins", "A pass of margins")):
        rows = []
        for varied, (values, sizes) in plans.items():
            took = [min(times[name, size]) for size in sizes]
            held = [memory[name, size] for size in sizes]
            row = [varied, f"{values[0]:.0f} … {values[-1]:.0f}"]
            for unit, numbers in (("s", took), ("MiB", held)):
                row.append(f"{numbers[0]:.3g} … {numbers[-1]:.3g} {unit}")
                if math.isnan(sum(numbers)):
                    row += ["", ""]
                    continue
                exponent, off = fit(values, numbers)
                last, size = numbers[-1] / numbers[-2], values[-1] / values[-2]
                end = round(math.log(last) / math.log(size), 2) + 0.0  # no −0.00
                row += [f"{exponent:.2f} ({off:.0%})", f"{end:.2f}"]
            rows.append(row)
        print(f"**{what}**\n")
        fitted = ["exponent (residual)", "at the end"]
        head = ["varied", "from … to", "time", *fitted, "peak memory", *fitted]
        print(table(head, rows), end="\n\n")


if __name__ == "__main__":
    main()
