"""Robust accuracy by our attacks beside AutoAttack's, the yardstick of the field.

The share of held-out examples that an attack leaves classified rightly, each attack on the same examples
and within the same budget: FGSM (FGM in ℓ2), PGD from the example itself, PGD with random restarts (an
example counts if it withstands all), both objectives of PGD, torchattacks' PGD, and AutoAttack.

How to run (`make test-extras` makes the environment; MNIST's four files lie in DATA/mnist):

    MARGINFLOW_DATA=DATA .venv-extras/bin/python benchmarks/robust_accuracy.py

trains the paper's network against FGSM first. `--run DIR` takes a run of `marginflow train` instead.
`--scale 8` multiplies every layer by 8 before, which changes no decision of a bias-free network.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable

import _common
import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.experiments.libraries import scaled

PACKAGES = ("marginflow", "torchattacks", "torch")
BOUNDS = (0.0, 1.0)


def withstood(
    model: nn.Module, x: Tensor, y: Tensor, attack: mf.attacks.Attack | None, seed: int, times: int
) -> Tensor:
    """Which examples are classified rightly under each of ``times`` calls of the attack, (n,) bool."""
    still = torch.ones(len(y), dtype=torch.bool)
    for restart in range(times):
        found = mf.adversarial_margins(
            model, x, y, attack, batch_size=500, normalize=False, seed=seed + restart
        )
        still &= found.values > 0
    return still


def attacks(
    asked: argparse.Namespace,
) -> dict[str, tuple[Callable[[], mf.attacks.Attack | None], int]]:
    """What is run, by its row of the table: how to make it, how often."""
    p, eps, steps = asked.norm, asked.eps, asked.steps
    step = 2.5 * eps / steps
    theirs = ("PGD", "PGDL2")[p == "l2"]

    def pgd(objective: str, *, start: bool = False) -> Callable[[], mf.attacks.Attack]:
        return lambda: mf.attacks.PGD(
            p, eps, steps=steps, random_start=start, bounds=BOUNDS, objective=objective
        )

    once = mf.attacks.FGM if p == "l2" else mf.attacks.FGSM
    return {
        "no attack": (lambda: None, 1),
        f"{once.__name__}": (lambda: once(eps, bounds=BOUNDS), 1),
        f"PGD, {steps} steps": (pgd("margin"), 1),
        f"PGD, {steps} steps, {asked.restarts} restarts": (
            pgd("margin", start=True),
            asked.restarts,
        ),
        f'PGD, {steps} steps, objective="loss"': (pgd("loss"), 1),
        f"torchattacks' {theirs}, {steps} steps": (
            lambda: mf.attacks.from_torchattacks(theirs, eps, alpha=step, steps=steps),
            1,
        ),
        "AutoAttack": (
            lambda: mf.attacks.AutoAttack(p, eps, queries=asked.queries, steps=asked.aa_steps),
            1,
        ),
    }


def arguments() -> argparse.Namespace:
    parser = _common.parser(__doc__, epochs=40)
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of the budget")
    parser.add_argument("--eps", type=float, default=16 / 255, help="the budget ε")
    parser.add_argument("--examples", type=int, default=1000, help="of the test set, by --sample")
    parser.add_argument("--sample", type=int, default=0, help="seed of the examples and starts")
    parser.add_argument("--steps", type=int, default=40, help="of PGD")
    parser.add_argument("--restarts", type=int, default=10, help="of PGD")
    parser.add_argument("--scale", type=float, default=1.0, metavar="C", help="of every layer")
    asked = parser.parse_args()
    asked.queries, asked.aa_steps = (100, 10) if asked.short else (5000, 100)
    if asked.short:
        asked.examples, asked.restarts = min(asked.examples, 100), 2
    if importlib.util.find_spec("torchattacks") is None:
        parser.error(
            "torchattacks is missing; run me with .venv-extras/bin/python (make test-extras makes "
            "it), or pip install 'marginflow[attack-libraries]'"
        )
    return asked


def main() -> None:
    asked = arguments()
    run, data, trained = _common.network(asked, "fgsm:eps=16/255")
    model = scaled(run.load_model(), asked.scale)
    if data.test is None:
        raise SystemExit(f"the data {data.name!r}: expected a test set")
    order = torch.randperm(data.test.n, generator=torch.Generator().manual_seed(asked.sample))
    chosen = order[: asked.examples]
    x, y = data.test.x[chosen], data.test.y[chosen]
    classes = 2 if data.binary else int(data.y.max()) + 1
    print(
        f"network   {_common.training(run)}"
        + (f"; every layer × {asked.scale:g}" if asked.scale != 1 else "")
        + f"\nexamples  {data.name}, test set, n = {len(y)} of {data.test.n}, sample {asked.sample}\n"
        f"budget    {asked.norm}, ε = {asked.eps:.6g}, bounds 0..1, float32\n"
        f"AutoAttack of {classes} classes: {', '.join(mf.attacks.AutoAttack.parts(classes))}; "
        f"{asked.aa_steps} steps, {asked.queries} queries\n"
        f"versions  {_common.versions(PACKAGES, asked.threads)}\n"
        f"time      network {trained:.0f} s\n"
    )
    print("| attack | robust accuracy | right | seconds |\n| --- | --: | --: | --: |")
    kept: dict[str, Tensor] = {}
    for name, (make, times) in attacks(asked).items():
        began = time.perf_counter()
        kept[name] = withstood(model, x, y, make(), asked.sample, times)
        seconds = time.perf_counter() - began
        right = int(kept[name].sum())
        print(f"| {name} | {right / len(y):.1%} | {right} | {seconds:.1f} |", flush=True)
    ours = torch.stack([still for name, still in kept.items() if name.startswith("PGD")]).all(dim=0)
    theirs = kept["AutoAttack"]
    half = 1.96 * math.sqrt(float(theirs.double().mean() * (1 - theirs.double().mean())) / len(y))
    print(
        f"\nonly AutoAttack turned {int((ours & ~theirs).sum())} of the examples, only our PGD "
        f"{int((theirs & ~ours).sum())}; by the choice of examples ± {half:.1%} (95 %)"
    )


if __name__ == "__main__":
    main()
