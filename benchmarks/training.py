"""A training epoch of the paper's task, beside everything that one could use instead.

784-1024-64-1 without biases, MNIST's digits 3 and 8 (n = 11 982), batches of 80, FGSM and PGD-5, ε = 16/255
(PGD steps of 6/255), x + δ in [0, 1], lr 0.1, float32, on one thread and on two:

tight           by hand: the attack takes the gradient by its input only
naive           the attack computes the weights' gradients, too, and drops them
torchattacks, foolbox, ART      their attacks in the loop (ART: its AdversarialTrainer)
torch.compile   the tight loop with its model compiled (--compile)
ours            marginflow's trainer: engine autograd, fused, fused with bf16 perturbations

and all of it again with oneDNN's products switched on for everybody,
`torch.set_float32_matmul_precision("medium")`; on processors with AMX that lowers the precision, which
is measured and said. Every loop is run once a round, in a new random order each round. Before that, one step
of each is compared with the tight loop's. The ceiling is the best rate of the matrix products alone, at the
same size and threads, measured in every round.

How to run (`make test-extras` makes the environment; MNIST's four files lie in DATA/mnist):

    MARGINFLOW_DATA=DATA .venv-extras/bin/python benchmarks/training.py --compile

`--short` takes 15 batches instead of an epoch. `--imitate-slow-mkl` runs with MKL held to AVX2 and oneDNN to
AVX-512 without AMX: an imitation of processors on which MKL has half of oneDNN's rate.
docs/performance.md explains the result.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import _common
import torch
from _loops import LOOPS, PEERS, Case, Ours, difference
from _timing import (
    DEFAULT,
    FORWARD,
    INPUT,
    ONEDNN,
    WEIGHTS,
    Ceiling,
    add_clock,
    counted,
    imitate,
    in_turns,
    machine,
    quartiles,
    ratio,
    set_clock,
    setting,
    table,
)

import marginflow as mf

PACKAGES = ("marginflow", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "torch")
TASK = (784, 1024, 64, 1)
TIGHT, AUTOGRAD, FUSED, BF16 = "tight", "ours, autograd", "ours, fused", "ours, fused, bf16 δ"
AT_MOST = {TIGHT: 0.50, "foolbox": 0.35, "ART": 0.35, "torchattacks": 0.50}
"""The aims: the fused epoch against each of these."""
AT_MOST_ONEDNN, AT_MOST_BF16, AT_LEAST_CEILING = 0.75, 0.42, 0.85

Key = tuple[str, str, int, str]
"""Case, loop, threads, precision of float32 products."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="instead of $MARGINFLOW_DATA")
    parser.add_argument("--short", action="store_true", help="15 batches, 3 rounds, 1 thread")
    parser.add_argument("--rounds", type=int, help="default 7, with --short 3")
    parser.add_argument("--threads", type=int, nargs="+", help="default 1 2, with --short 1")
    parser.add_argument("--examples", type=int, help="default all, with --short 1200")
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), help="default all")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--without-onednn", action="store_true", help="PyTorch's own products only")
    parser.add_argument("--seed", type=int, default=0, help="of the turns' order")
    add_clock(parser)
    asked = parser.parse_args()
    asked.rounds = asked.rounds or (3 if asked.short else 7)
    asked.threads = asked.threads or ([1] if asked.short else [1, 2])
    set_clock(parser, asked)
    asked.examples = asked.examples or (1200 if asked.short else None)
    left_out = set() if asked.compile else {"torch.compile"}
    if asked.imitate_slow_mkl:
        left_out.add(BF16)  # the units for it are held back, too
    asked.loops = asked.loops or [name for name in LOOPS if name not in left_out]
    for name in asked.loops:
        module = LOOPS[name].module
        if module is not None and importlib.util.find_spec(module) is None:
            parser.error(
                f"{module} is missing; run me with .venv-extras/bin/python (make test-extras makes "
                "it), or pip install 'marginflow[attack-libraries]'"
            )
    if "torch.compile" in asked.loops and not (shutil.which("g++") or shutil.which("clang++")):
        parser.error("torch.compile needs a C++ compiler; leave out --compile")
    return asked


def cases(asked: argparse.Namespace) -> dict[str, Case]:
    """The trainings, by name."""
    data = mf.load("mnist:3,8", data_dir=asked.data_dir)
    if asked.examples is not None:
        data = mf.Dataset(data.x[: asked.examples], data.y[: asked.examples], bounds=(0, 1))
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(100, 20, generator=draw)
    labels = torch.where(x[:, :10].sum(1) > x[:, 10:].sum(1), 1, -1)
    tiny = mf.Dataset(x, labels, bounds=(0, 1))
    found = [
        Case("FGSM", data, TASK, 1, 80),
        Case("PGD-5", data, TASK, 5, 80),
        Case("FGSM, batch 1000", data, TASK, 1, 1000),
        Case("tiny", tiny, (20, 20, 20, 1), 1, 100, lr=0.01, epochs=100 if asked.short else 500),
    ]
    return {case.name: case for case in found}


def wanted(case: str, loop: str, threads: int, precision: str) -> bool:
    """Whether this one tells anything that another does not."""
    if case == "tiny":  # nothing to multiply, nothing to share
        return threads == 1 and precision == DEFAULT and loop not in (BF16, "torch.compile")
    if case == "FGSM, batch 1000":
        return loop in (TIGHT, FUSED) and precision == DEFAULT
    return precision == DEFAULT or loop not in ("torch.compile", BF16, AUTOGRAD)


def prepared(asked: argparse.Namespace, tasks: dict[str, Case]) -> dict[Key, Callable[[], float]]:
    """Everything that is timed. Each loop is made under the setting that it will run under."""
    jobs: dict[Key, Callable[[], float]] = {}
    precisions = [DEFAULT] if asked.without_onednn else [DEFAULT, ONEDNN]
    for threads in [*asked.threads] + ([] if 1 in asked.threads else [1]):
        for precision in precisions:
            for case in tasks.values():
                for name in asked.loops:
                    if not wanted(case.name, name, threads, precision) or (
                        case.name != "tiny" and threads not in asked.threads
                    ):
                        continue
                    with setting(threads, precision):
                        loop = LOOPS[name](case)
                        if name in ("torch.compile", TIGHT):
                            loop()  # compiles; the first warms the machine
                    if isinstance(loop, Ours) and name == FUSED and precision == DEFAULT:
                        print(f"products  {case.name}, {counted(threads)}: {loop.products}")

                    def job(
                        loop: Callable[[], float] = loop,
                        threads: int = threads,
                        precision: str = precision,
                    ) -> float:
                        with setting(threads, precision):
                            return loop()

                    jobs[case.name, name, threads, precision] = job
    return jobs


def compare_steps(asked: argparse.Namespace, tasks: dict[str, Case]) -> None:
    """Stop where two loops do not compute the same thing."""
    rows = []
    for name in asked.loops:
        row = [name]
        for case in ("FGSM", "PGD-5"):
            apart = difference(name, tasks[case])
            # A sign that rounding flips moves one pixel of one example; bf16 flips many.
            if apart > (0.3 if name == BF16 else 1e-3):
                raise SystemExit(f"{name}, {case}: one step is {apart:.1e} from the tight loop's")
            row.append(f"{apart:.1e}")
        rows.append(row)
    print(table(["‖ΔW − ΔW_tight‖/‖ΔW_tight‖, one step", "FGSM", "PGD-5"], rows), end="\n\n")


def report(
    times: dict[Key, list[float]],
    task: Case,
    threads: int,
    precision: str,
    ceiling: Ceiling | None,
    exact: bool,
) -> None:
    """The table of one case."""
    mine = {
        k[1]: v for k, v in times.items() if (k[0], k[2], k[3]) == (task.name, threads, precision)
    }
    if not mine:
        return
    label = "PyTorch's own products"
    if precision == ONEDNN:
        label = "oneDNN for everybody" if exact else '"medium" for everybody: NOT float32 here'
    n, work = task.data.n, task.flops / 1e9
    print(f"**{task.name}, {counted(threads)}, {label}** (n = {n}, {work:.1f} GFLOP)\n")
    unit, factor = ("µs a step", 1e6 / task.updates) if task.name == "tiny" else ("s", 1.0)
    head = [
        "loop",
        f"min, {unit}",
        "median (quartiles)",
        "× tight",
        "fused/it",
        "GFLOP/s",
        "of ceiling",
    ]
    rows = []
    for name, values in sorted(mine.items(), key=lambda item: -min(item[1])):
        low, middle, high = (factor * v for v in quartiles(values))
        digits = 0 if factor > 1 else 3
        rate = task.flops / min(values)
        lowered = name == BF16 or (precision == ONEDNN and not exact) or ceiling is None
        rows.append(
            [
                name,
                f"{factor * min(values):.{digits}f}",
                f"{middle:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})",
                ratio(values, mine[TIGHT]) if TIGHT in mine else "",
                ratio(mine[FUSED], values) if FUSED in mine else "",
                f"{rate / 1e9:.0f}" if ceiling is not None else "",
                "" if lowered or ceiling is None else f"{ideal(task, ceiling) / min(values):.0%}",
            ]
        )
    print(table(head, rows), end="\n\n")


def judge(
    times: dict[Key, list[float]],
    tasks: dict[str, Case],
    threads: int,
    ceilings: dict[tuple[int, int], Ceiling],
    exact: bool,
) -> list[list[str]]:
    """A row for each aim: reached or not, and what the ceiling allows."""
    rows: list[list[str]] = []

    def row(what: str, aim: str, got: float, reached: bool, allowed: float | None) -> None:
        limit = "" if allowed is None else f"{allowed:.2f}"
        rows.append([what, aim, f"{got:.2f}", "yes" if reached else "**no**", limit])

    for case in ("FGSM", "PGD-5"):
        found = functools.partial(_least, times, case, threads)
        fused, task = found(FUSED), tasks[case]
        if fused is None:
            continue
        ceiling = ceilings[task.batch_size, threads]
        best = ideal(task, ceiling)
        where = f"{case}, {counted(threads)}: fused"
        for peer, aim in AT_MOST.items():
            if (theirs := found(peer)) is not None:
                got = fused / theirs
                row(f"{where} / {peer}", f"≤ {aim:.2f}", got, got <= aim, best / theirs)
        if (low := found(BF16)) is not None and (theirs := found(TIGHT)) is not None:
            got, allowed = low / theirs, ideal(task, ceiling, bf16=True) / theirs
            what = f"{where}, bf16 δ / tight"
            row(what, f"≤ {AT_MOST_BF16}", got, got <= AT_MOST_BF16, allowed)
        # Where the switch lowers the precision, the same products for everybody are PyTorch's own.
        precision = ONEDNN if exact else DEFAULT
        others = [v for p in (TIGHT, *PEERS) if (v := found(p, precision)) is not None]
        ours = found(FUSED, precision)
        if others and ours is not None:
            got = ours / min(others)
            what = "oneDNN for everybody" if exact else "the same products"
            what = f"{where} / best of the others, {what}"
            row(what, f"≤ {AT_MOST_ONEDNN}", got, got <= AT_MOST_ONEDNN, best / min(others))
        got = best / fused
        row(
            f"{where}, share of ceiling",
            f"≥ {AT_LEAST_CEILING}",
            got,
            got >= AT_LEAST_CEILING,
            None,
        )
    large = tasks["FGSM, batch 1000"]
    if (fused := _least(times, large.name, threads, FUSED)) is not None:
        got = ideal(large, ceilings[large.batch_size, threads]) / fused
        where = f"{large.name}, {counted(threads)}: fused, share of ceiling"
        rows.append([where, "stated", f"{got:.2f}", "", ""])
    return rows


def _least(
    times: dict[Key, list[float]], case: str, threads: int, loop: str, precision: str = DEFAULT
) -> float | None:
    values = times.get((case, loop, threads, precision))
    return None if values is None else min(values)


def ideal(task: Case, ceiling: Ceiling, *, bf16: bool = False) -> float:
    """The seconds of a case if all its useful work were done at the ceiling.

    With ``bf16`` the attack's products are done at the best rate of all, training's at float32's.
    """
    s = task.steps
    if not bf16:
        return task.flops / ceiling.rate({FORWARD: s + 1, INPUT: s, WEIGHTS: 1})
    attack = task.epochs * task.data.n * 4 * task.weights * s
    return attack / ceiling.rate({FORWARD: 1, INPUT: 1}, list(ceiling.errors)) + (
        task.flops - attack
    ) / ceiling.rate({FORWARD: 1, WEIGHTS: 1})


def main() -> None:
    asked = arguments()
    imitate(asked)
    tasks = cases(asked)
    print(f"machine   {machine()}")
    print(f"versions  {_common.versions(PACKAGES, max(asked.threads))}")
    compare_steps(asked, tasks)
    jobs = prepared(asked, tasks)
    ceilings = {(rows, t): Ceiling(rows, t) for t in asked.threads for rows in (80, 1000)}

    def measure_ceilings(turn: int) -> None:
        for ceiling in ceilings.values():
            ceiling.measure(20 if ceiling.rows == 80 else 6)

    times = in_turns(jobs, asked.rounds, asked.seed, measure_ceilings)
    any_ceiling = next(iter(ceilings.values()))
    exact = 'oneDNN by "medium"' in any_ceiling.exact
    print(f"machine   {machine()}\nrounds    {asked.rounds}, order by seed {asked.seed}\n")

    head = ["GFLOP/s of products with W_1, best", "x Wᵀ", "d W", "dᵀ x", "relative error"]
    print(table(head, [line for c in ceilings.values() for line in c.lines()]), end="\n\n")
    if not exact:
        print(
            '"medium" lowers the precision on this processor: its tables are not float32, and the aim '
            "with oneDNN for everybody is judged with PyTorch's own products for everybody.\n"
        )
    for threads in sorted({*asked.threads, 1}, reverse=True):
        for task in tasks.values():
            size = 1000 if task.batch_size == 1000 else 80
            ceiling = None if task.name == "tiny" else ceilings.get((size, threads))
            for precision in (DEFAULT, ONEDNN):
                report(times, task, threads, precision, ceiling, exact)
    rows = [row for t in reversed(asked.threads) for row in judge(times, tasks, t, ceilings, exact)]
    print("Ratios of the minima.\n" if not asked.short else "Ratios of the minima, short run.\n")
    print(table(["aim", "", "measured", "reached", "at 100 % of the ceiling"], rows))


if __name__ == "__main__":
    main()
