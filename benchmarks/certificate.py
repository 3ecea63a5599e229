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
import platform
import resource
import time

import _common

import marginflow as mf


def gib() -> float:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if platform.system() == "Darwin" else peak / 2**20


def arguments() -> argparse.Namespace:
    parser = _common.parser(__doc__, epochs=20)
    parser.add_argument("--attack", default="fgsm:eps=16/255", help="in training and certificate")
    parser.add_argument("--tau", type=float, default=2.0)
    parser.add_argument("--derivative", choices=("total", "detached"), default="total")
    parser.add_argument("--max-support", type=int, help="default: the library's")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    run, data, trained = _common.network(asked, asked.attack)
    model = run.load_model().eval()
    attack = mf.attacks.build(asked.attack)

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

    curve = certificate.curve
    print(
        f"network   {_common.training(run)}\n"
        f"examples  {data.name}, n = {len(y)} of {len(margins)} with a positive margin\n"
        f"versions  {_common.versions(('marginflow', 'torch'), asked.threads)}\n"
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
