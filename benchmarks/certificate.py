"""The KKT certificate at the size of the paper's network: time, peak memory, and what it says.

784-1024-64-1, no biases, MNIST's digits 3 and 8 (n = 11 982), trained with FGSM, ε = 16/255, then
certified at τ = 2 with the whole curve. Examples whose margin is not positive have no place in the
problem; they are counted and left out.

How to run (MNIST's four files lie in DATA/mnist):

    MARGINFLOW_DATA=DATA .venv/bin/python benchmarks/certificate.py

trains the network first. `--run DIR` takes a run of `marginflow train` instead.

    .venv/bin/python benchmarks/certificate.py --nnls

times the solver for the multipliers instead, beside scipy's `nnls`, in turns: plain and duplicated
columns, ill-conditioned ones (singular values over five orders of magnitude, a third as many dimensions),
and columns most of which are in use.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time

import _common
import numpy as np
import torch
from scipy.optimize import nnls

import marginflow as mf
from marginflow.kkt import _nnls

_SHORT = 2000
KINDS = ("plain", "duplicated", "ill-conditioned", "inside", "most in use")


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
    parser.add_argument("--nnls", action="store_true", help="time the solver of the multipliers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000], help="with --nnls")
    return parser.parse_args()


def columns_of(kind: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit columns, n of them, and a unit vector at acute angles to them, as W is to margin gradients."""
    rng = np.random.default_rng(seed)
    d, third = 4 * n // 3, n // 3
    slopes = np.logspace(0, -5, third)[:, None]
    if kind in ("plain", "duplicated"):
        common = rng.normal(size=(d, 1))
        columns = rng.normal(size=(d, n if kind == "plain" else n // 2)) + common
        columns = np.tile(columns, n // columns.shape[1])
        vector = common[:, 0] + 2 * rng.normal(size=d)
    elif kind == "ill-conditioned":
        columns = slopes * rng.normal(size=(third, n)) + 0.3 * rng.normal(size=(third, 1))
        vector = rng.normal(size=third)
    elif kind == "inside":  # the same, and the vector in the cone: the residual is 0
        columns = slopes * (rng.normal(size=(third, n)) + 0.3)
        vector = columns @ rng.exponential(size=n)
    else:
        columns = rng.normal(size=(2 * n, n))
        vector = columns @ rng.exponential(size=n) + np.sqrt(n) * rng.normal(size=2 * n)
    columns = columns * np.where(vector @ columns < 0, -1.0, 1.0)
    return columns / np.linalg.norm(columns, axis=0), vector / np.linalg.norm(vector)


def compare_solvers(sizes: list[int], repeats: int = 3) -> None:
    """Print a table of times, medians of ``repeats`` in turns.

    Each solver is given what it asks for: G and c, or the columns.
    """
    print(
        f"versions  {_common.versions(('marginflow', 'scipy', 'torch'), torch.get_num_threads())}\n"
    )
    print("| columns | n | positive | own | scipy | ratio | optimality | r − scipy's |")
    print("| -- | --: | --: | --: | --: | --: | --: | --: |")
    for kind in KINDS:
        for n in sizes:
            columns, vector = columns_of(kind, n, 0)
            gram = torch.from_numpy(columns.T @ columns).fill_diagonal_(1.0)
            target = torch.from_numpy(columns.T @ vector)
            times: tuple[list[float], list[float]] = [], []
            for _ in range(repeats if n <= 1000 else 1):
                began = time.perf_counter()
                found = _nnls.solve(gram, target)
                times[0].append(time.perf_counter() - began)
                began = time.perf_counter()
                expected, residual = nnls(columns, vector, maxiter=100 * n)
                times[1].append(time.perf_counter() - began)
            own, other = float(np.median(times[0])), float(np.median(times[1]))
            reached = float(np.linalg.norm(vector - columns @ found.multipliers.numpy()))
            print(
                f"| {kind} | {n} | {int((expected > 0).sum())} | {own:.3f} s | {other:.3f} s "
                f"| {other / own:.1f} | {found.violation:.0e} | {reached - residual:.0e} |",
                flush=True,
            )


def main() -> None:
    asked = arguments()
    if asked.nnls:
        torch.set_num_threads(asked.threads)
        compare_solvers(asked.sizes[:1] if asked.short else asked.sizes)
        return
    run, data, trained = _common.network(asked, asked.attack)
    model = run.load_model().eval()
    attack = mf.attacks.build(asked.attack)

    margins = mf.adversarial_margins(model.double(), data.x, data.y, attack).values
    x, y = data.x[margins > 0], data.y[margins > 0]
    if asked.short:
        x, y = x[:_SHORT], y[:_SHORT]
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
