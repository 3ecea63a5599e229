"""The KKT certificate at the size of the paper's network: time, peak memory, and what it says.

784-1024-64-1, no biases, MNIST's digits 3 and 8 (n = 11 982), trained with FGSM, ε = 16/255, then
certified at τ = 2 with the whole curve. Examples whose margin is not positive have no place in the
problem; they are counted and left out.

How to run (MNIST's four files lie in DATA/mnist):

    MARGINFLOW_DATA=DATA .venv/bin/python benchmarks/certificate.py

trains the network first. `--run DIR` takes a run of `marginflow train` instead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import resource
import time
from pathlib import Path

import torch

import marginflow as mf


def gib() -> float:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if platform.system() == "Darwin" else peak / 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run on two classes instead of a training")
    parser.add_argument("--data-dir", type=Path, help="instead of $MARGINFLOW_DATA")
    parser.add_argument("--attack", default="fgsm:eps=16/255", help="in training and certificate")
    parser.add_argument("--epochs", type=int, default=20, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--tau", type=float, default=2.0)
    parser.add_argument("--derivative", choices=("total", "detached"), default="total")
    parser.add_argument("--max-support", type=int, help="default: the library's")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    began = time.perf_counter()
    if asked.run is not None:
        run = mf.load_run(asked.run)
        data = mf.load(run.config["data"], data_dir=asked.data_dir)
    else:
        data = mf.load("mnist:3,8", data_dir=asked.data_dir)
        run = mf.train(
            "mlp:1024,64",
            data,
            attack=asked.attack,
            lr=0.1,
            batch_size=80,
            epochs=asked.epochs,
            measure=False,
            seed=asked.seed,
        )
    model = run.load_model().eval()
    attack = mf.attacks.build(asked.attack)
    trained = time.perf_counter() - began

    margins = mf.adversarial_margins(model.double(), data.x, data.y, attack).values
    x, y = data.x[margins > 0], data.y[margins > 0]
    before, began = gib(), time.perf_counter()
    certificate = mf.kkt_certificate(
        model,
        x,
        y,
        attack,
        tau=asked.tau,
        derivative=asked.derivative,
        max_support=asked.max_support,
    )
    seconds, after = time.perf_counter() - began, gib()

    c, curve = run.config, certificate.curve
    print(
        f"network   {c['model_spec']}, {c['attack']}, {c['loss']}, lr {c['lr']:g}, "
        f"batch {c['batch_size']}, {c['epochs']} epochs, seed {c['seed']}\n"
        f"examples  {data.name}, n = {len(y)} of {len(margins)} with a positive margin\n"
        f"versions  marginflow {mf.__version__}, torch {importlib.metadata.version('torch')}, "
        f"Python {platform.python_version()}, {asked.threads} threads\n"
        f"time      network {trained:.0f} s, certificate {seconds:.1f} s\n"
        f"memory    peak {after:.2f} GiB ({before:.2f} GiB before the certificate)\n"
    )
    print(certificate, end="\n\n")
    print("| τ | examples | r(τ) |\n| --: | --: | --: |")
    rows = zip(curve.taus.tolist(), curve.supports.tolist(), curve.residuals.tolist(), strict=True)
    for tau, support, residual in rows:
        print(f"| {tau:.4g} | {support} | {residual:.6f} |")


if __name__ == "__main__":
    main()
