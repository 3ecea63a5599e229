"""Eight seeds at once against eight solo runs, and the size from which that gains nothing.

    python benchmarks/seeds.py                # some minutes on one core
    python benchmarks/seeds.py --short        # half a minute, the spread is wider
    python benchmarks/seeds.py --only sizes

trainings  `mf.train` eight times against `mf.train_seeds(seeds=8)` on digits:3,8 with FGSM: unmeasured
           in memory, and measured on the default schedule into run directories
sizes      the steps alone, of networks from 20 hidden units to the paper's, side by side however
           large they are: where the ratio nears 1 lies the limit of `engine.stacking_gains`

Both are run in turns. Given are the ratio (side by side / solo; median, least and greatest of the
turns) and the microseconds per step and seed (medians).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import versions

import marginflow as mf
from marginflow.attacks import build as build_attack
from marginflow.engine import FusedEngine, stacking_gains
from marginflow.losses import get_loss
from marginflow.models import build as build_model
from marginflow.training import SideBySide, Trainer

SEEDS = range(8)
FGSM = "fgsm:eps=0.1"
# Network, batch size, epochs.
TRAININGS = [("mlp:20", 32, 200), ("mlp:64,32", 32, 200)]
# Features, network, batch size, steps.
SIZES = [
    (20, "mlp:20", 100, 200),
    (64, "mlp:20", 32, 200),
    (64, "mlp:20", 100, 100),
    (64, "mlp:20", 285, 100),
    (64, "mlp:64,32", 32, 100),
    (64, "mlp:64,32", 100, 50),
    (64, "mlp:256,32", 32, 50),
    (784, "mlp:64", 32, 30),
    (784, "mlp:64", 80, 20),
    (784, "mlp:1024,64", 80, 4),
]


def in_turns(
    solo: Callable[[], float], side: Callable[[], float], turns: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, once through before anything is timed."""
    solo(), side()
    pairs = [(solo(), side()) for _ in range(turns)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def line(name: str, solo: list[float], side: list[float], steps: int) -> str:
    ratios = sorted(b / a for a, b in zip(solo, side, strict=True))
    each = [1e6 * statistics.median(s) / steps / len(SEEDS) for s in (solo, side)]
    return (
        f"{name:36} {statistics.median(ratios):6.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"
        f"{each[0]:9.1f}{each[1]:9.1f}"
    )


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def solo_runs(model: str, data: mf.Dataset, options: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for seed in SEEDS:
            out = Path(folder) / str(seed) if options["measure"] else None
            mf.train(model, data, seed=seed, out=out, **options)
        return time.perf_counter() - start


def seeds_at_once(model: str, data: mf.Dataset, options: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = folder if options["measure"] else None
        start = time.perf_counter()
        mf.train_seeds(model, data, seeds=len(SEEDS), out=out, **options)
        return time.perf_counter() - start


def trainings(turns: int, share: float) -> None:
    data = mf.load("digits:3,8")
    for model, batch_size, epochs in TRAININGS:
        options: dict[str, Any] = {
            "attack": FGSM,
            "batch_size": batch_size,
            "epochs": max(2, round(share * epochs)),
            "dtype": "float32",
        }
        steps = options["epochs"] * -(-data.n // batch_size)
        for what in ("unmeasured", "default schedule, on disk"):
            options["measure"] = what != "unmeasured"
            solo = functools.partial(solo_runs, model, data, options)
            side = functools.partial(seeds_at_once, model, data, options)
            found = in_turns(solo, side, turns)
            print(line(f"{model} batch {batch_size}, {what}", *found, steps), flush=True)


def sizes(turns: int, share: float) -> None:
    for features, model, batch_size, steps in SIZES:
        steps = max(2, round(share * steps))
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(batch_size * 2, features, generator=generator)
        y = 2 * torch.randint(2, (len(x),), generator=generator) - 1
        data = mf.Dataset(x, y)

        def made(
            data: mf.Dataset = data, model: str = model, size: int = batch_size, steps: int = steps
        ) -> list[Trainer]:
            return [
                Trainer(
                    FusedEngine(
                        build_model(model, input_shape=data.shape, outputs=1, seed=seed),
                        get_loss("logistic"),
                        build_attack(FGSM),
                        shape=data.shape,
                    ),
                    data,
                    lr=0.1,
                    batch_size=size,
                    epochs=-(-steps // 2),
                    seed=seed,
                )
                for seed in SEEDS
            ]

        def solo(made: Callable[[], list[Trainer]] = made) -> float:
            trainers = made()
            return timed(lambda: [trainer.run() for trainer in trainers])

        def side(made: Callable[[], list[Trainer]] = made) -> float:
            together = SideBySide(made())
            return timed(together.run)

        found = in_turns(solo, side, turns)
        first = made()[0]
        largest = max(p.numel() for p in first.model.parameters())
        name = f"{features}→{model} batch {batch_size}: {largest * batch_size / 1e3:.0f}k"
        chosen = "" if stacking_gains(first.engine, batch_size) else "  (one after the other)"
        print(line(name, *found, first.epochs * 2) + chosen, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=("trainings", "sizes"))
    parser.add_argument("--short", action="store_true", help="fewer turns of fewer steps")
    parser.add_argument("--turns", type=int, help="of each pair (default 5, 3 with --short)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    turns = asked.turns or (3 if asked.short else 5)
    share = 0.1 if asked.short else 1.0
    print(versions(("torch",), asked.threads))
    print(f"{'':36} {'ratio':>6} [least, most]  µs solo  µs side")
    if asked.only is None or "trainings" in asked.only:
        trainings(turns, share)
    if asked.only is None or "sizes" in asked.only:
        print("steps alone; weights of the largest layer × examples of a batch")
        sizes(turns, share)


if __name__ == "__main__":
    main()
