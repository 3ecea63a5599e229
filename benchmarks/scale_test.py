"""The scale test: does an attack keep its strength when every layer is multiplied by c?

On a bias-free ReLU network that changes no decision and no normalised margin, f(x; cW) = c^L f(x; W), so
it must not change the adversarial accuracy. Where it does, the attack has lost its strength.
Measured: PGD in the ℓ2 ball on MNIST's held-out digits 3 and 8, by marginflow, torchattacks,
foolbox and the Adversarial Robustness Toolbox (ART).

How to run (`make test-extras` makes the environment; MNIST's four files lie in DATA/mnist):

    MARGINFLOW_DATA=DATA .venv-extras/bin/python benchmarks/scale_test.py --out docs/images/scale-test.png

trains the network first. `--run DIR` takes a run of `marginflow train` on two classes instead.
docs/scale-test.md explains the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import _common
import torch
from torch import Tensor, nn

from marginflow.experiments.libraries import (
    LOSS,
    METHODS,
    MODULES,
    OURS,
    Setting,
    perturbed,
    scaled,
    share_right,
    signed_outputs,
)

PACKAGES = ("marginflow", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "torch")


@dataclass(frozen=True)
class Outcome:
    """What one attack did at one scale; δ is in the order of the examples."""

    accuracy: float
    delta: Tensor

    @property
    def length(self) -> float:
        """The mean of ‖δ_i‖₂."""
        return float(torch.linalg.vector_norm(self.delta.flatten(1).double(), dim=1).mean())


# Okabe and Ito's colours for all kinds of colour vision; line style and marker tell the curves apart too.
STYLES = {
    OURS: ("#0072b2", "-", "o"),
    LOSS: ("#56b4e9", (0, (1, 1.2)), "D"),
    "ART": ("#009e73", "--", "s"),
    "foolbox": ("#d55e00", "-.", "^"),
    "torchattacks": ("#cc79a7", (0, (5, 1, 1, 1, 1, 1)), "v"),
}


def measure(
    model: nn.Module, x: Tensor, y: Tensor, how: Setting, scales: list[float]
) -> dict[str, dict[float, Outcome]]:
    """Every method at every scale, each with a copy of the network of its own."""
    found: dict[str, dict[float, Outcome]] = {name: {} for name in METHODS}
    for c in scales:
        for name, method in METHODS.items():
            victim = scaled(model, c)
            moved = perturbed(method, victim, x, y, how)
            found[name][c] = Outcome(share_right(victim, moved, y), moved - x)
    return found


def table(rows: dict[str, list[str]], head: list[str]) -> str:
    """A Markdown table."""
    lines = [[*head], ["---"] + ["--:"] * (len(head) - 1), *([k, *v] for k, v in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(
    path: Path, found: dict[str, dict[float, Outcome]], clean: float, scales: list[float], note: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "marginflow", "font.size": 10})
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, axes = plt.subplots(figsize=(8.0, 3.9), layout="constrained")
    axes.axhline(clean, color="#7a7a7a", linewidth=1, zorder=1)
    axes.annotate(
        f"clean accuracy {clean:.1%}",
        (scales[0], clean),
        xytext=(0, -4),
        textcoords="offset points",
        va="top",
        color="#59636e",
        fontsize=9,
    )
    for name, outcomes in found.items():
        color, line, marker = STYLES[name]
        ours = name == OURS
        axes.plot(
            scales,
            [outcomes[c].accuracy for c in scales],
            color=color,
            linestyle=line,
            marker=marker,
            linewidth=2.6 if ours else 1.8,
            markersize=9 if ours else 6,
            markerfacecolor=color if ours else "white",
            markeredgewidth=1.6,
            zorder=3 if ours else 2,
            label=name,
        )
    lowest = min(outcome.accuracy for outcomes in found.values() for outcome in outcomes.values())
    axes.set_xscale("log", base=2)
    axes.set_xticks(scales, [f"{c:g}" for c in scales])
    axes.minorticks_off()
    axes.set_ylim(max(0.0, lowest - 0.05), 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("every layer multiplied by c (no decision changes)")
    axes.set_ylabel("adversarial accuracy")
    axes.grid(axis="y", color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # From the top down as the curves are.
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right center", frameon=False, handlelength=3.6
    )
    axes.set_title(note, loc="left", fontsize=9, color="#59636e")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = _common.parser(__doc__, epochs=10)
    parser.add_argument("--eps", type=float, default=1.5, help="ℓ2 budget of the attacks")
    parser.add_argument("--steps", type=int, default=10, help="of the attacks")
    parser.add_argument("--batch-size", type=int, default=128, help="of the attacks")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 4, 8, 16], metavar="C")
    parser.add_argument("--out", type=Path, help="the figure; written as .png and as .svg")
    asked = parser.parse_args()
    for module in MODULES.values():
        if importlib.util.find_spec(module) is None:
            parser.error(
                f"{module} is missing; run me with .venv-extras/bin/python (make test-extras makes "
                "it), or pip install 'marginflow[attack-libraries]'"
            )
    return asked


def main() -> None:
    asked = arguments()
    run, data, trained = _common.network(asked, "fgsm:eps=16/255")
    model = run.load_model().eval()
    if data.test is None or not data.binary:
        raise SystemExit(f"the data {data.name!r}: expected two classes and a test set")
    x, y = data.test.x, data.test.y
    if asked.short:
        x, y, asked.scales = x[:256], y[:256], [1, 16]

    how = Setting(asked.eps, asked.steps, asked.batch_size)
    began = time.perf_counter()
    found = measure(model, x, y, how, asked.scales)
    measured = time.perf_counter() - began
    clean = share_right(model, x, y)

    print(
        f"network   {_common.training(run)}\n"
        f"examples  {data.name}, test set, n = {len(y)}; clean accuracy {clean:.4f}, "
        f"median margin {float(signed_outputs(model, x, y).median()):.1f} at c = 1\n"
        f"attack    ℓ2-PGD, ε = {how.eps:g}, {how.steps} steps of {how.step_size:g}, no random start, "
        f"bounds 0..1, float32, batches of {how.batch_size}\n"
        f"versions  {_common.versions(PACKAGES, asked.threads)}\n"
        f"time      network {trained:.0f} s, attacks {measured:.0f} s\n"
    )
    head = [f"c = {scale:g}" for scale in asked.scales]
    rows = {n: [f"{o.accuracy:.3f}" for o in by_scale.values()] for n, by_scale in found.items()}
    print(table(rows, ["adversarial accuracy", *head]), end="\n\n")
    rows = {n: [f"{o.length:.3f}" for o in by_scale.values()] for n, by_scale in found.items()}
    print(table(rows, [f"mean ‖δ‖₂ (ε = {how.eps:g})", *head]), end="\n\n")
    first, *others = (outcome.delta for outcome in found[OURS].values())
    same = all(torch.equal(first, delta) for delta in others)
    print(f"marginflow's δ, bit for bit the same at every c: {'yes' if same else 'no'}")
    if asked.out is not None:
        note = f"MNIST 3 vs 8, test set, n = {len(y)}; ℓ2-PGD, ε = {how.eps:g}, {how.steps} steps"
        draw(asked.out, found, clean, asked.scales, f"{note}; seed {run.config['seed']}")


if __name__ == "__main__":
    main()
