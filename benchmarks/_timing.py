"""What the timing benchmarks share: settings, turns in random order, ceilings, the machine on one line."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

DEFAULT = "highest"
ONEDNN = "medium"
"""The settings of ``torch.set_float32_matmul_precision``: PyTorch's own, and oneDNN for everybody."""


@contextlib.contextmanager
def setting(threads: int, precision: str = DEFAULT) -> Iterator[None]:
    """PyTorch with so many threads and this precision of float32 products inside the block."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


_clocks = {"wall": time.perf_counter, "processor": time.process_time}
_clock = "wall"


IMITATION = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""Both libraries read these once, when they are loaded."""


def imitate(asked: argparse.Namespace) -> None:
    """With ``--imitate-slow-mkl``: the script again, from its start, in that environment."""
    if not asked.imitate_slow_mkl:
        return
    if any(os.environ.get(name) != value for name, value in IMITATION.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | IMITATION)
    held = ", ".join(f"{name}={value}" for name, value in IMITATION.items())
    print(f"**An imitation of a processor with a slow MKL: {held}**\n", flush=True)


def add_clock(parser: argparse.ArgumentParser) -> None:
    """The arguments ``--clock``, which :func:`set_clock` reads, and ``--imitate-slow-mkl``."""
    parser.add_argument(
        "--clock",
        choices=list(_clocks),
        default="wall",
        help="processor: time without that of other processes, for busy machines; one thread only",
    )
    parser.add_argument(
        "--imitate-slow-mkl",
        action="store_true",
        help="MKL held to AVX2, oneDNN to AVX-512: a processor on which MKL is much the slower",
    )


def set_clock(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Measure by the clock asked for from now on."""
    global _clock
    if asked.clock == "processor" and asked.threads not in (1, [1]):
        parser.error("--clock processor adds up the time of all threads; use it with --threads 1")
    _clock = asked.clock


def now() -> float:
    """Seconds on the clock in use."""
    return _clocks[_clock]()


def seconds(job: Callable[[], object]) -> float:
    """The time of one call."""
    began = now()
    job()
    return now() - began


def in_turns(
    jobs: Mapping[Key, Callable[[], float]],
    rounds: int,
    seed: int,
    after_round: Callable[[int], None] | None = None,
) -> dict[Key, list[float]]:
    """Every job once a round, in a new random order each round; the seconds that each returned.

    What slows the machine for a while then slows all of them, and ratios are taken within a round.
    """
    shuffler = random.Random(seed)
    found: dict[Key, list[float]] = {key: [] for key in jobs}
    for turn in range(rounds):
        order = list(jobs)
        shuffler.shuffle(order)
        for key in order:
            found[key].append(jobs[key]())
        if after_round is not None:
            after_round(turn)
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Ratio of the minima, then the quartiles of the ratios within a round."""
    low, middle, high = quartiles([a / b for a, b in zip(ours, theirs, strict=True)])
    return f"{min(ours) / min(theirs):.2f} ({low:.2f}, {middle:.2f}, {high:.2f})"


def counted(threads: int) -> str:
    """``1 thread``, ``2 threads`` …."""
    return f"{threads} thread{'' if threads == 1 else 's'}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of few values the interpolated ones."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [list(head), ["--"] + ["--:"] * (len(head) - 1), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Date, processor and load, on one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    date = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{date}, {model} ({capability}), {os.cpu_count()} cores, load average {load}"
    return found if _clock == "wall" else f"{found}; processor time, not wall time"


FORWARD, INPUT, WEIGHTS = "x Wᵀ", "d W", "dᵀ x"
"""The three products of a layer: forward, gradient by the input, gradient by the weights."""


@dataclass
class Ceiling:
    """The best rates seen of the layer's products (rows · fan_in · fan_out), by each library.

    Measured again in every round of a benchmark, so that the best is from the same hour.

    Attributes:
        rows, fan_in, fan_out: of the products.
        threads: of PyTorch.
    """

    rows: int
    threads: int
    fan_in: int = 784
    fan_out: int = 1024
    best: dict[tuple[str, str], float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def measure(self, repeats: int = 20) -> None:
        """Look for shorter times; note each library's error against float64."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.fan_in, generator=draw)
        d = torch.randn(self.rows, self.fan_out, generator=draw)
        w = torch.randn(self.fan_out, self.fan_in, generator=draw)
        for library, (precision, multiply) in _libraries().items():
            dtype = torch.bfloat16 if library == "bfloat16" else torch.float32
            pairs = {FORWARD: (x, w.mT), INPUT: (d, w), WEIGHTS: (d.mT, x)}
            with setting(self.threads, precision):
                for name, (a, b) in pairs.items():
                    job = functools.partial(multiply, a.to(dtype), b.to(dtype))
                    took = min(seconds(job) for _ in range(repeats))
                    self.best[library, name] = min(took, self.best.get((library, name), took))
                product = multiply(x.to(dtype), w.mT.to(dtype)).double()
            exact = x.double() @ w.double().mT
            self.errors[library] = float((product - exact).norm() / exact.norm())

    @property
    def exact(self) -> list[str]:
        """The libraries with float32's accuracy: lower precision errs by thousands of times more."""
        return [name for name, error in self.errors.items() if error < 4 * self.errors["MKL"]]

    def rate(self, uses: Mapping[str, int], libraries: Sequence[str] | None = None) -> float:
        """Floating-point operations a second where each product is as fast as the fastest library has it.

        Args:
            uses: how often each of the products is needed.
            libraries: by default those of float32's accuracy.
        """
        chosen = self.exact if libraries is None else libraries
        total = sum(
            times * min(self.best[library, name] for library in chosen)
            for name, times in uses.items()
        )
        return 2 * self.rows * self.fan_in * self.fan_out * sum(uses.values()) / total

    def lines(self) -> list[list[str]]:
        """A row of the table of ceilings for each library."""
        flops = 2 * self.rows * self.fan_in * self.fan_out / 1e9
        return [
            [
                f"{library}, {self.rows} rows, {counted(self.threads)}",
                *(f"{flops / self.best[library, name]:.0f}" for name in (FORWARD, INPUT, WEIGHTS)),
                f"{error:.1e}",
            ]
            for library, error in self.errors.items()
        ]


def _libraries() -> dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """By name: the precision to set and the product."""
    found: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "MKL": (DEFAULT, torch.mm),
        'oneDNN by "medium"': (ONEDNN, torch.mm),
        "bfloat16": (DEFAULT, torch.mm),
    }
    # oneDNN in strict float32 has no public call where "medium" lowers the precision.
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["oneDNN, strict"] = (
            DEFAULT,
            lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], ""),
        )
    return found
