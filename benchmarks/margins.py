"""A pass of margins over MNIST's digits 3 and 8: time, peak memory, and what measuring costs a training.

784-1024-64-1, FGSM with ε = 16/255, n = 11 982, the margins m_i at x_i + δ_i in float32. Side by side, in
turns of random order:

by hand         what autograd makes of it in one chunk: a forward pass, the gradient by the input,
                another forward pass
ours            `mf.adversarial_margins`, which normalises, too, with engine autograd and fused, in chunks
                of several sizes; 1024 is the default

Then the default schedule of measurements: what one measurement and one epoch take, and the share of
all measurements in a run of 1000 epochs. That share is extrapolated from both times and the number of points.

How to run (MNIST's four files lie in DATA/mnist):

    MARGINFLOW_DATA=DATA .venv/bin/python benchmarks/margins.py

docs/performance.md explains the result.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import _common
import torch
from _loops import Case, OursFused
from _memory import peak
from _timing import (
    FORWARD,
    INPUT,
    Ceiling,
    add_clock,
    counted,
    imitate,
    in_turns,
    machine,
    quartiles,
    ratio,
    seconds,
    set_clock,
    setting,
    table,
)
from torch import Tensor

import marginflow as mf
from marginflow.engine import EngineName
from marginflow.training import log_spaced

TASK = (784, 1024, 64, 1)
EPS = 16 / 255
BY_HAND = "by hand, one chunk"
OURS = "ours, fused, chunks of 1024"
AT_MOST, AT_MOST_SHARE = 0.40, 0.05
EPOCHS = 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="instead of $MARGINFLOW_DATA")
    parser.add_argument("--short", action="store_true", help="3 rounds, 1 thread, no PGD")
    parser.add_argument("--rounds", type=int, help="default 15, with --short 3")
    parser.add_argument("--threads", type=int, nargs="+", help="default 1 2, with --short 1")
    parser.add_argument("--seed", type=int, default=0, help="of the turns' order")
    add_clock(parser)
    asked = parser.parse_args()
    asked.rounds = asked.rounds or (3 if asked.short else 15)
    asked.threads = asked.threads or ([1] if asked.short else [1, 2])
    set_clock(parser, asked)
    return asked


def by_hand(model: torch.nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The margins at x + δ in one chunk, (n,)."""
    z = x.flatten(1).requires_grad_()
    (gradient,) = torch.autograd.grad((y * model(z).squeeze(1)).sum(), z)
    with torch.no_grad():
        moved = (x.flatten(1) - eps * gradient.sign()).clamp_(0, 1)
        margins: Tensor = y * model(moved).squeeze(1)
    return margins


def passes(data: mf.Dataset) -> dict[str, Callable[[], Tensor]]:
    """Each way to take the margins of all examples."""
    model = mf.models.mlp(*TASK, seed=0)
    homogeneity = mf.Monitor(model, data).homogeneity  # measured once in a training
    attack = mf.attacks.FGSM(EPS, bounds=(0, 1))

    def ours(engine: EngineName, chunk: int) -> Tensor:
        return mf.adversarial_margins(
            model,
            data.x,
            data.y,
            attack,
            batch_size=chunk,
            homogeneity=homogeneity,
            engine=engine,
        ).values

    found: dict[str, Callable[[], Tensor]] = {
        BY_HAND: functools.partial(by_hand, model, data.x, data.y, EPS)
    }
    engines: tuple[EngineName, ...] = ("autograd", "fused")
    for engine in engines:
        for chunk in (data.n, 1024, 256):
            size = "one chunk" if chunk == data.n else f"chunks of {chunk}"
            found[f"ours, {engine}, {size}"] = functools.partial(ours, engine, chunk)
    return found


def one_pass(name: str, folder: Path | None, threads: int) -> Callable[[], object]:
    """One of :func:`passes`, for a process of its own."""
    torch.set_num_threads(threads)
    return passes(mf.load("mnist:3,8", data_dir=folder))[name]


def compare_passes(asked: argparse.Namespace, data: mf.Dataset) -> None:
    """Times, peak memory, and that the margins agree."""
    jobs = passes(data)
    exact = jobs[BY_HAND]().double()
    apart = {
        name: float((job().double() - exact).abs().max() / exact.abs().max())
        for name, job in jobs.items()
    }
    timed = {}
    for threads in asked.threads:
        for name, job in jobs.items():

            def run(job: Callable[[], Tensor] = job, threads: int = threads) -> float:
                with setting(threads):
                    return seconds(job)

            timed[name, threads] = run
    ceilings = {threads: Ceiling(1000, threads) for threads in asked.threads}

    def measure_ceilings(turn: int) -> None:
        for ceiling in ceilings.values():
            ceiling.measure(4)

    times = in_turns(timed, asked.rounds, asked.seed, measure_ceilings)
    memory = {name: peak(one_pass, name, asked.data_dir, max(asked.threads)) for name in jobs}
    weights = sum(a * b for a, b in zip(TASK[1:], TASK, strict=False))
    flops = 6.0 * data.n * weights  # forward, backward by the input, forward
    for threads in reversed(asked.threads):
        rows = []
        ceiling = ceilings[threads].rate({FORWARD: 2, INPUT: 1})
        for name in jobs:
            values = times[name, threads]
            low, middle, high = quartiles(values)
            rows.append(
                [
                    name,
                    f"{min(values):.3f}",
                    f"{middle:.3f} ({low:.3f} … {high:.3f})",
                    ratio(values, times[BY_HAND, threads]),
                    f"{flops / min(values) / 1e9:.0f}",
                    f"{flops / ceiling / min(values):.0%}",
                    f"{memory[name]:.0f}",
                    f"{apart[name]:.0e}",
                ]
            )
        print(
            f"**Margins of {data.n} examples, {counted(threads)}** "
            f"({flops / 1e9:.1f} GFLOP, ceiling {ceiling / 1e9:.0f} GFLOP/s)\n"
        )
        head = ["pass", "min, s", "median (quartiles)", "× by hand", "GFLOP/s", "of ceiling"]
        print(table([*head, "peak, MiB", "difference"], rows), end="\n\n")
        got = min(times[OURS, threads]) / min(times[BY_HAND, threads])
        allowed = flops / ceiling / min(times[BY_HAND, threads])
        print(
            f"Aim: at most {AT_MOST:.2f} of the pass by hand. Measured {got:.2f}, "
            f"{'reached' if got <= AT_MOST else '**not reached**'}; "
            f"at 100 % of the ceiling {allowed:.2f}.\n"
        )


def measuring_share(asked: argparse.Namespace, data: mf.Dataset) -> None:
    """What the default schedule costs."""
    points = len(log_spaced(EPOCHS))
    rows = []
    for threads in reversed(asked.threads):
        for steps in (1,) if asked.short else (1, 5):
            case = Case("FGSM" if steps == 1 else "PGD-5", data, TASK, steps, 80)
            with setting(threads):
                loop = OursFused(case)
                monitor = mf.Monitor(loop.model, data, case.attack, loss="logistic")

            def epoch(loop: OursFused = loop, threads: int = threads) -> float:
                with setting(threads):
                    return loop()

            def measurement(monitor: mf.Monitor = monitor, threads: int = threads) -> float:
                with setting(threads):
                    return seconds(lambda: monitor.measure(0))

            times = in_turns(
                {"epoch": epoch, "measurement": measurement}, min(asked.rounds, 5), asked.seed
            )
            _, one, _ = quartiles(times["epoch"])
            _, measured, _ = quartiles(times["measurement"])
            share = points * measured / (points * measured + EPOCHS * one)
            rows.append(
                [
                    f"{case.name}, {counted(threads)}",
                    f"{one:.3f}",
                    f"{measured:.3f}",
                    str(points),
                    f"{share:.1%}",
                    "yes" if share < AT_MOST_SHARE else "**no**",
                ]
            )
    test = 0 if data.test is None else data.test.n
    print(
        f"**The default schedule in a run of {EPOCHS} epochs**, extrapolated from medians; a measurement "
        f"takes clean and adversarial margins of {data.n} training and {test} test examples\n"
    )
    head = ["training", "epoch, s", "measurement, s", "points", "share", f"< {AT_MOST_SHARE:.0%}"]
    print(table(head, rows))


def main() -> None:
    asked = arguments()
    imitate(asked)
    data = mf.load("mnist:3,8", data_dir=asked.data_dir)
    print(
        f"machine   {machine()}\n"
        f"versions  {_common.versions(('marginflow', 'torch'), max(asked.threads))}\n"
        f"rounds    {asked.rounds}, order by seed {asked.seed}\n"
    )
    compare_passes(asked, data)
    measuring_share(asked, data)


if __name__ == "__main__":
    main()
