"""Figure 1(c) in full: 10 000 epochs of training against FGSM, with examples of no weight left out.

784-1024-64-1, no biases, MNIST's digits 3 and 8 (n = 11 982), ε = 16/255, logistic loss, rate 0.1, batch
80. Prints the time, γ̂_m at the decades, the claims of the figure with the numbers that judge them, and
what shrinking did; draws γ̂_m from separation on.

How to run (MNIST's four files lie in DATA/mnist):

    MARGINFLOW_DATA=DATA .venv/bin/python benchmarks/figure_1c.py --out runs/figure_1c --image fig.png

An interrupted run goes on when the command is given again. `--run DIR` draws a run that is there.
`--short` takes the bundled digits and a smaller network.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import _common
import torch

import marginflow as mf
from marginflow.experiments._beside import after_separation
from marginflow.experiments._claims import (
    each_seed,
    fitted,
    fitted_claim,
    growth,
    growth_claim,
    judge,
)
from marginflow.experiments._experiment import MILESTONES, Trained, Training
from marginflow.experiments._figure import FigureData
from marginflow.report import draw, save_figure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run that is there; nothing is trained")
    parser.add_argument("--out", type=Path, help="default runs/figure_1c, with --short none")
    parser.add_argument("--image", type=Path, help="where to draw the curve: .png, .svg, .pdf")
    parser.add_argument("--epochs", type=int, help="default 10 000, with --short 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="leave nobody out")
    parser.add_argument("--short", action="store_true", help="digits, 64-64-1: some seconds")
    asked = parser.parse_args()
    if asked.out is None and not asked.short:  # a short run must not take a long one's place
        asked.out = Path("runs/figure_1c")
    return asked


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    asked_training = Training(
        "fgsm",
        "trained against FGSM",
        "digits:3,8" if asked.short else "mnist:3,8",
        "mlp:64" if asked.short else "mlp:1024,64",
        "fgsm:eps=0.1" if asked.short else "fgsm:eps=16/255",
        asked.epochs or (1000 if asked.short else 10_000),
        batch_size=32 if asked.short else 80,
        shrink=not asked.full,
    )
    began = time.perf_counter()
    if asked.run is None:
        there = asked.out is not None and (asked.out / "run.json").exists()
        run = mf.train(
            asked_training.model,
            asked_training.data,
            attack=asked_training.attack,
            loss=asked_training.loss,
            lr=asked_training.lr,
            batch_size=asked_training.batch_size,
            epochs=asked_training.epochs,
            dtype=asked_training.dtype,
            schedule=asked_training.schedule,
            shrink=asked_training.shrink,
            seed=asked.seed,
            out=asked.out,
            resume=there and not asked.short,
            force=there and asked.short,
            progress=not asked.short,
        )
        print(f"time      {time.perf_counter() - began:.0f} s in this process")
    else:
        run = mf.load_run(asked.run)
    config, records = run.config, run.metrics
    threads = config.get("threads", asked.threads)
    print(
        f"network   {config['model_spec']}, {config['attack']}, batch {config['batch_size']}, rate "
        f"{config['lr']}, seed {config['seed']}, n = {config['examples']}\n"
        f"versions  {_common.versions(('marginflow', 'torch'), threads)}; engine "
        f"{config.get('engine')}, products {config.get('products')}\n"
    )
    print(
        "| epoch | γ̂_m (10⁻³) | median γ̂ | ρ | adversarial accuracy: training | test | left out |"
    )
    print("| --: | --: | --: | --: | --: | --: | --: |")
    for record in records:
        if record["epoch"] in MILESTONES or record is records[-1]:
            median = record["normalized_margin_quantiles"][4]
            print(
                f"| {record['epoch']} | {1e3 * record['normalized_margin']:.3g} | {1e3 * median:.3g} "
                f"| {record['norm_product']:.0f} | {record['adversarial_accuracy']:.4f} "
                f"| {record.get('test_adversarial_accuracy', float('nan')):.4f} "
                f"| {record.get('left_out_examples', 0)} |"
            )
    last = records[-1]
    if "shrink_examinations" in last:
        print(
            f"\n{last['shrink_examinations']} examinations, {last['shrink_violations']} of which found "
            "the bound exceeded"
        )
    trained = [Trained(asked_training, asked.seed, run)]
    for claim, find in ((fitted_claim, fitted), (growth_claim, growth)):
        found = each_seed({"fgsm": trained}, lambda t, find=find: find(t.records()))
        verdict = judge(claim("Figure 1(c)"), found)
        print(f"\n{verdict.outcome}: {verdict.claim}\n  {verdict.measured}")
    if asked.image is not None:
        panels = after_separation("(c) γ̂_m under FGSM, after separation", trained)
        save_figure(draw(FigureData("fig1c", "", "", panels), width_inches=6), asked.image)
        print(f"\nthe curve is in {asked.image}")


if __name__ == "__main__":
    main()
