"""How much of a network's robustness can be certified, beside what attacks leave of it.

Certified accuracy is the share of examples that no perturbation of the ball can change: lower bounds of every
adversarial margin by CROWN and by intervals (both by auto-LiRPA) and by a product of layer norms.
Attacked accuracy, by FGSM and PGD, lies above the true one. Measured on MNIST's held-out digits 3 and 8.

How to run (`make test-extras` makes the environment; MNIST's four files lie in DATA/mnist):

    MARGINFLOW_DATA=DATA .venv-extras/bin/python benchmarks/certified.py

trains the network first; `--run DIR` takes a run of `marginflow train` instead. Without auto-LiRPA
there are norms only. docs/certified.md explains the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import time

import _common

import marginflow as mf

LIBRARY = "auto-LiRPA"
METHODS: tuple[mf.certified.Method, ...] = ("crown", "interval", "norms")


def arguments() -> argparse.Namespace:
    parser = _common.parser(__doc__, epochs=20)
    parser.add_argument(
        "--eps", type=float, nargs="+", default=[1, 4, 8, 16], help="ℓ∞ budgets, in 1/255"
    )
    parser.add_argument("--examples", type=int, help="the first so many of the test set")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    installed = importlib.util.find_spec("auto_LiRPA") is not None
    methods = METHODS if installed else METHODS[2:]
    run, data, trained = _common.network(asked, "fgsm:eps=16/255")
    model = run.load_model()
    if data.test is None:
        raise SystemExit(f"the data {data.name!r} have no test set")
    count = asked.examples or (64 if asked.short else data.test.n)
    x, y = data.test.x[:count], data.test.y[:count]
    clean = mf.adversarial_margins(model, x, y, normalize=False).accuracy
    packages = ("marginflow", "torch", *((LIBRARY,) if installed else ()))
    print(
        f"network   {_common.training(run)}\n"
        f"examples  {data.name}, test set, n = {len(y)}; clean accuracy {clean:.4f}\n"
        f"versions  {_common.versions(packages, asked.threads)}\n"
        f"time      network {trained:.0f} s"
    )
    if not installed:
        print(f"missing   {LIBRARY}, so norms only: {mf.certified.INSTALL}")
    names = [*(f"certified, {name}" for name in methods), "PGD-40", "FGSM", "width", "s"]
    print(f"\n| ε | {' | '.join(names)} |\n|{' --: |' * (len(names) + 1)}")
    for units in asked.eps:
        eps = units / 255
        began = time.perf_counter()
        one_step = mf.attacks.FGSM(eps, bounds=(0, 1))
        many = mf.attacks.PGD("linf", eps, steps=40, step_size=eps / 10, bounds=(0, 1))
        bounds = [
            mf.certified.certified_margins(model, x, y, many, method=name) for name in methods
        ]
        attacked = [
            mf.adversarial_margins(model, x, y, attack, normalize=False)
            for attack in (many, one_step)
        ]
        width = float((attacked[0].values - bounds[0].values).median())
        relative = width / float(attacked[0].values.abs().median())
        cells = [f"{found.accuracy:.3f}" for found in (*bounds, *attacked)]
        spent = time.perf_counter() - began
        print(f"| {units:g}/255 | {' | '.join(cells)} | {relative:.2g} | {spent:.0f} |", flush=True)
    print(
        "\nwidth: median of (PGD's margin − the best bound), over the median size of PGD's margin"
    )


if __name__ == "__main__":
    main()
