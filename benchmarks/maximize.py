"""Margin maximisation against constant-rate SGD: margins, accuracies, residuals, and what they cost.

The paper's network 784-1024-64-1 on MNIST 3-vs-8, against FGSM and ℓ∞-PGD (5 steps of 6/255), ε = 16/255.
A table of every run: γ̂_m, the epoch from which every training example is fitted, test accuracy clean,
under the attack trained with, and under PGD with 50 steps and 5 random starts (the worst of them for each
example), seconds, and gradient evaluations (an example's gradient by the input or by the weights). Then what
it costs to come to a given γ̂_m, and the relative KKT residual r(τ) with the best multipliers.

How to run (MNIST's four files lie in DATA/mnist); a run that is there already is not made again:

    MARGINFLOW_DATA=DATA .venv/bin/python benchmarks/maximize.py --out runs/maximize

The whole takes about three hours with two threads, most of it SGD's. `--part` chooses: `tune` (SGD's rates
and momenta on seed 0), `fgsm`, `pgd`, `others` (further methods), `polish` (SGD's networks), `data`
(2-vs-7, 4-vs-9, digits), `clock` (seconds an epoch, interleaved; wants an idle machine). `--short` takes
the bundled digits and a smaller network.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import _common
import torch
from _free_signs import residual_with_free_signs

import marginflow as mf
from marginflow.training import Callback, Trainer

PARTS = ("tune", "fgsm", "pgd", "others", "polish", "data", "clock")
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTA = (0.0, 0.9)
BEST = "sgd-0.03-0.9"
OTHERS = (
    "relative",
    "steepest:norm=l2,step=0.03..3e-4",
    "steepest:norm=sign",
    "steepest:norm=adam",
)
GOALS = (0.001, 0.002, 0.004, 0.01, 0.02, 0.025)
RESTARTS = 5


@dataclass(frozen=True)
class Setting:
    """One run: SGD as ``sgd-RATE-MOMENTUM``, or a method of ``mf.maximize``, maybe from another run."""

    method: str
    epochs: int
    seed: int = 0
    data: str = "mnist:3,8"
    attack: str = "fgsm"
    start: Path | None = None

    def path(self, out: Path) -> Path:
        """Where it lies."""
        slug = "".join(c if c.isalnum() or c in ".-" else "-" for c in self.method)
        data = self.data.replace(":", "-").replace(",", "-")
        return out / data / self.attack / slug / str(self.epochs) / f"seed-{self.seed}"


@dataclass(frozen=True)
class Scale:
    """Network, attacks and lengths of a benchmark."""

    model: str
    attacks: dict[str, str]
    batch_size: int
    long: int
    lengths: tuple[int, int]
    polished: int
    eps: float


FULL = Scale(
    "mlp:1024,64",
    {"fgsm": "fgsm:eps=16/255", "pgd": "pgd-linf:eps=16/255,steps=5,step=6/255"},
    80, 400, (40, 100), 20, 16 / 255,
)  # fmt: skip
SHORT = Scale(
    "mlp:64,16",
    {"fgsm": "fgsm:eps=0.1", "pgd": "pgd-linf:eps=0.1,steps=5,step=0.0375"},
    15, 200, (40, 100), 20, 0.1,
)  # fmt: skip
DIGITS = replace(FULL, model="mlp:256,32", attacks={"fgsm": "fgsm:eps=0.1"}, batch_size=32, eps=0.1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="default runs/maximize, with --short none")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given again")
    parser.add_argument("--seeds", type=int, default=3, help="0 … SEEDS − 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-residuals", action="store_true", help="leave out r(τ)")
    parser.add_argument("--made", action="store_true", help="only the runs that are there")
    parser.add_argument("--short", action="store_true", help="digits, a small network, one seed")
    asked = parser.parse_args()
    if asked.short:
        asked.seeds = 1
        asked.part = asked.part or ["fgsm", "polish", "clock"]
    elif asked.out is None:
        asked.out = Path("runs/maximize")
    asked.part = asked.part or list(PARTS)
    return asked


def settings(part: str, scale: Scale, seeds: int, out: Path | None) -> Iterator[Setting]:
    """The runs of a part of the benchmark."""
    data = "digits:3,8" if scale is SHORT else "mnist:3,8"
    if part == "tune":
        for rate in RATES:
            for momentum in MOMENTA:
                yield Setting(f"sgd-{rate:g}-{momentum:g}", scale.long, data=data)
    if part in ("fgsm", "pgd"):
        for seed in range(seeds):
            yield Setting(BEST, scale.long, seed, data, part)
            for epochs in scale.lengths if part == "fgsm" else scale.lengths[1:]:
                yield Setting("spheres", epochs, seed, data, part)
    if part == "others":
        for method in OTHERS:
            yield Setting(method, scale.lengths[1], 0, data)
    if part == "polish":
        for seed in range(seeds):
            begun = Setting(BEST, scale.long, seed, data)
            yield Setting("polish", scale.polished, seed, data, start=begun.path(out or Path()))
    if part == "data":
        for name in ("mnist:2,7", "mnist:4,9", "digits:3,8"):
            yield Setting(BEST, scale.long, 0, name)
            yield Setting("spheres", scale.lengths[1], 0, name)


class Runs:
    """Makes runs, or finds them where they are."""

    def __init__(self, scale: Scale, out: Path | None, *, made: bool) -> None:
        self.scale = scale
        self.out = out
        self.made = made
        self.kept: dict[Path, mf.Run] = {}

    def scale_of(self, setting: Setting) -> Scale:
        """The digits have a network of their own."""
        return DIGITS if setting.data.startswith("digits") and self.scale is FULL else self.scale

    def get(self, setting: Setting) -> mf.Run | None:
        """The finished run; None where it is not there and none are to be made."""
        path = setting.path(self.out or Path())
        if path in self.kept:
            return self.kept[path]
        if self.out is not None and (path / "run.json").exists():
            run = mf.load_run(path)
            if run.metrics and run.final.get("epoch") == setting.epochs:
                return run
        if self.made:
            return None
        run = self._make(setting, path if self.out is not None else None)
        self.kept[path] = run
        return run

    def _make(self, setting: Setting, path: Path | None) -> mf.Run:
        scale = self.scale_of(setting)
        attack = scale.attacks[setting.attack]
        resume = path is not None and (path / "run.json").exists()
        shared: dict[str, Any] = {
            "attack": attack, "epochs": setting.epochs, "seed": setting.seed, "dtype": "float32",
            "out": path, "resume": resume, "progress": True,
        }  # fmt: skip
        if setting.method.startswith("sgd-"):
            rate, momentum = map(float, setting.method.removeprefix("sgd-").split("-"))
            return mf.train(
                scale.model, setting.data, lr=rate, momentum=momentum,
                batch_size=scale.batch_size, **shared,
            )  # fmt: skip
        model: Any = scale.model
        if setting.start is not None:
            begun = self.get(replace(setting, method=BEST, epochs=scale.long, start=None))
            if begun is None:
                raise SystemExit(f"the run to polish is not there: {setting.start}")
            model = copy.deepcopy(begun.model or begun.load_model())
        return mf.maximize(model, setting.data, method=setting.method, **shared)


class Clock(Callback):
    """Notes when each epoch ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch(self, trainer: Trainer) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def clock(scale: Scale, *, rounds: int = 3, epochs: int = 4) -> None:
    """Seconds an epoch, the first of each run left out, minima of interleaved runs; no measurements."""
    name = "digits:3,8" if scale is SHORT else "mnist:3,8"
    data = mf.load(name).to(dtype=torch.float32)
    methods = (
        "sgd-0.03-0",
        BEST,
        "spheres",
        "relative",
        "steepest:norm=sign",
        "steepest:norm=adam",
    )
    print("\n| seconds an epoch |", " | ".join(methods), "|")
    print("|---" * (len(methods) + 1) + "|")
    for kind, attack in scale.attacks.items():
        spent: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(rounds):
            for method in methods:
                timer = Clock()
                shared: dict[str, Any] = {
                    "attack": attack, "epochs": epochs, "schedule": {epochs},
                    "batch_size": scale.batch_size, "callbacks": [timer],
                }  # fmt: skip
                if method.startswith("sgd-"):
                    rate, momentum = map(float, method.removeprefix("sgd-").split("-"))
                    mf.train(scale.model, data, lr=rate, momentum=momentum, **shared)
                else:
                    mf.maximize(scale.model, data, method=method, **shared)
                spent[method] += [b - a for a, b in pairwise(timer.times)]
        cells = [f"{min(spent[method]):.3f}" for method in methods]
        print(f"| {kind} |", " | ".join(cells), "|", flush=True)


def evaluations(run: mf.Run, epochs: float) -> float:
    """Gradients of single examples, by the input or by the weights, up to an epoch."""
    attack = mf.attacks.build(run.config["attack"])
    steps = getattr(attack, "steps", 1)
    first = steps if run.config["kind"] == "maximize" else 0  # every example is met once first
    return run.config["examples"] * (epochs * (steps + 1) + first)


def seconds(run: mf.Run) -> float | None:
    """Of the whole run, measurements too; None in memory."""
    return None if run.path is None else float(run.checkpoint().info["elapsed_seconds"])


def worst_accuracy(model: torch.nn.Module, data: mf.Dataset, eps: float) -> float:
    """Share of examples that no start of PGD with 50 steps turns."""
    strong = mf.attacks.PGD("linf", eps=eps, steps=50, step_size=eps / 10, random_start=True)
    least = torch.full((data.n,), math.inf, dtype=torch.float64)
    for seed in range(RESTARTS):
        found = mf.adversarial_margins(
            model, data.x, data.y, strong, normalize=False, batch_size=512, seed=seed
        )
        least = torch.minimum(least, found.values)
    return float((least > 0).double().mean())


def first_epoch(run: mf.Run, key: str, least: float) -> int | None:
    """The first measured epoch with at least this much."""
    for record in run.metrics:
        value = record[key]
        if value is not None and value >= least:
            return int(record["epoch"])
    return None


def table(chosen: Sequence[Setting], runs: Runs) -> None:
    """One line a run."""
    print(
        "| data | attack | method | epochs | seed | γ̂_m | median γ̂ | adv. train | 100 % from "
        "| test clean | adv. | PGD-50 × 5 | gradients (10⁶) | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for setting in chosen:
        run = runs.get(setting)
        if run is None:
            continue
        end = run.final
        data = mf.load(setting.data).to(dtype=torch.float32)
        model = run.model or run.load_model()
        unseen = data if data.test is None else data.test
        pgd = worst_accuracy(model, unseen, runs.scale_of(setting).eps)
        fitted = first_epoch(run, "adversarial_accuracy", 1.0)
        took = seconds(run)
        print(
            f"| {setting.data} | {setting.attack} | {setting.method} | {setting.epochs} "
            f"| {setting.seed} | {end['normalized_margin']:.3e} "
            f"| {end['normalized_margin_quantiles'][4]:.3e} | {end['adversarial_accuracy']:.4f} "
            f"| {'never' if fitted is None else fitted} | {end['test_clean_accuracy']:.4f} "
            f"| {end['test_adversarial_accuracy']:.4f} | {pgd:.4f} "
            f"| {evaluations(run, setting.epochs) / 1e6:.2f} "
            f"| {'–' if took is None else f'{took:.0f}'} |",
            flush=True,
        )


def costs(chosen: Sequence[Setting], runs: Runs) -> None:
    """Gradient evaluations and seconds to a given margin, at the first measured epoch that has it."""
    print("\n| attack | method | epochs | seed |", " | ".join(f"{g:g}" for g in GOALS), "|")
    print("|---" * (4 + len(GOALS)) + "|")
    for setting in chosen:
        run = runs.get(setting)
        if run is None:
            continue
        took = seconds(run)
        cells = []
        for goal in GOALS:
            epoch = first_epoch(run, "normalized_margin", goal)
            if epoch is None:
                cells.append("–")
                continue
            clock = "" if took is None else f", {took * epoch / setting.epochs:.0f} s"
            cells.append(f"{evaluations(run, epoch) / 1e6:.2f}·10⁶{clock}")
        print(
            f"| {setting.attack} | {setting.method} | {setting.epochs} | {setting.seed} |",
            " | ".join(cells), "|",
        )  # fmt: skip


def residuals(chosen: Sequence[Setting], runs: Runs) -> None:
    """r(τ), and for FGSM with either sign where it is all but undetermined."""
    print(
        "\n| attack | method | epochs | seed | r(2), examples | r(0.2), examples "
        "| r(0.2), free signs 1e-3 | 1e-2 | 1e-1 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for setting in chosen:
        run = runs.get(setting)
        if run is None or run.final["normalized_margin"] <= 0:
            continue
        data = mf.load(setting.data).to(dtype=torch.float32)
        attack = mf.attacks.build(run.config["attack"])
        model = run.model or run.load_model()
        cells = []
        for tau in (2.0, 0.2):
            found = mf.kkt_certificate(model, data.x, data.y, attack, tau=tau)
            cells.append(f"{found.residual:.3f}, {len(found.support)}")
        if isinstance(attack, mf.attacks.FGSM):
            for theta in (1e-3, 1e-2, 1e-1):
                free = residual_with_free_signs(model, data, attack, window=0.2, theta=theta)
                cells.append(f"{free.residual:.3f} ({free.share:.0%}, margins × {free.above:.2f})")
        print(
            f"| {setting.attack} | {setting.method} | {setting.epochs} | {setting.seed} |",
            " | ".join(cells), "|", flush=True,
        )  # fmt: skip


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    scale = SHORT if asked.short else FULL
    began = time.perf_counter()
    print(_common.versions(["torch"], asked.threads), "\n")
    runs = Runs(scale, asked.out, made=asked.made)
    chosen = [
        setting for part in asked.part for setting in settings(part, scale, asked.seeds, asked.out)
    ]
    if not asked.made:
        for setting in chosen:
            runs.get(setting)
    if chosen:
        table(chosen, runs)
        costs([s for s in chosen if s.start is None], runs)
    if chosen and not asked.no_residuals:
        residuals(chosen, runs)
    if "clock" in asked.part:
        clock(scale)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
