"""What ``mf.Monitor`` on its default schedule adds to somebody else's training loop of 1000 epochs.

The loops are plain PyTorch: autograd, FGSM by hand, SGD in batches. Each runs whole, with a run directory,
and the seconds inside of ``Monitor.measure`` are set against all others of the same run. A training
too long for that (MNIST) runs a few epochs; its measurements are timed one by one, and the share of
1000 epochs is put together from medians.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import _common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

import marginflow as mf
from marginflow.monitor._schedule import PER_DECADE
from marginflow.training import latest_point

AIM = 0.05


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    """The logistic loss of one output, cross-entropy of several."""
    if outputs.shape[1] == 1:
        return softplus(-y * outputs.reshape(-1)).mean()
    return cross_entropy(outputs, y)


def batch_norm_cnn() -> nn.Module:
    """A small CNN with batch norm for 8×8 images, which is not homogeneous."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 1),
    )  # fmt: skip


def mlp(*sizes: int) -> nn.Module:
    """A ReLU network without biases."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """As people write it."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(model(x), y), x)
    return (x + eps * slope.sign()).clamp(0, 1).detach()


def epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: mf.Dataset, eps: float, size: int
) -> None:
    """One epoch of adversarial training."""
    model.train()
    for rows in torch.randperm(data.n).split(size):
        x, y = data.x[rows], data.y[rows]
        moved = fgsm(model, x, y, eps)
        loss = loss_of(model(moved), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole(model: nn.Module, data: mf.Dataset, eps: float, size: int, epochs: int) -> list[str]:
    """A loop from its first to its last epoch: its seconds, those of measuring, their share."""
    attack = mf.attacks.FGSM(eps=eps, bounds=(0, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    spent = 0.0
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with mf.Monitor(model, data, attack, out=Path(folder) / "run") as monitor:
            built = time.perf_counter() - began
            for k in range(epochs):
                epoch(model, optimizer, data, eps, size)
                start = time.perf_counter()
                monitor.measure(k + 1)
                spent += time.perf_counter() - start
        total = time.perf_counter() - began
    spent += built
    share = spent / (total - spent)
    return [
        f"{total - spent:.1f}", f"{spent:.2f}", str(len(monitor.records)), f"{share:.1%}",
        "yes" if share < AIM else "**no**",
    ]  # fmt: skip


def pieces(
    model: nn.Module, data: mf.Dataset, eps: float, size: int, epochs: int, rounds: int
) -> list[str]:
    """The same for ``epochs`` epochs of which only ``rounds`` are run, each with a measurement."""
    attack = mf.attacks.FGSM(eps=eps, bounds=(0, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plain, weak, strong = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        monitor = mf.Monitor(
            model, data, attack, out=Path(folder) / "run", schedule=range(0, 3 * rounds, 1)
        )
        bare = mf.Monitor(model, data, attack, out=Path(folder) / "bare", strong=None)
        for k in range(rounds):
            start = time.perf_counter()
            epoch(model, optimizer, data, eps, size)
            plain.append(time.perf_counter() - start)
            start = time.perf_counter()
            bare.measure(k, now=True)
            weak.append(time.perf_counter() - start)
            start = time.perf_counter()
            monitor.measure(k, now=True)
            strong.append(time.perf_counter() - start)
        monitor.close()
        bare.close()
    many = len({latest_point(k, PER_DECADE) for k in range(1, epochs + 1)})
    few = len({latest_point(k, PER_DECADE // 2) for k in range(1, epochs + 1)})
    one, less, more = (statistics.median(times) for times in (plain, weak, strong))
    measuring = (many - few) * less + few * more
    share = measuring / (epochs * one)
    return [
        f"{epochs * one:.0f}", f"{measuring:.1f}", str(many), f"{share:.1%}",
        "yes" if share < AIM else "**no**",
    ]  # fmt: skip


def main() -> int:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--epochs", type=int, default=1000, help="of each loop")
    asked.add_argument("--threads", type=int, default=1, help="of PyTorch")
    asked.add_argument("--data-dir", type=Path, help="instead of $MARGINFLOW_DATA; for MNIST")
    asked.add_argument("--short", action="store_true", help="100 epochs, and no MNIST")
    given = asked.parse_args()
    torch.set_num_threads(given.threads)
    epochs = 100 if given.short else given.epochs
    two, ten = mf.load("digits:3,8"), mf.load("digits")
    # What a process does once, such as loading libraries, is not part of a loop.
    whole(mlp(64, 8, 1), two, 0.1, 32, 1)
    rows = []
    for name, data, make in (
        ("MLP 64-128-32-1, two digits", two, lambda: mlp(64, 128, 32, 1)),
        ("MLP 64-128-32-10, ten digits", ten, lambda: mlp(64, 128, 32, 10)),
        ("CNN with batch norm, two digits", two, batch_norm_cnn),
    ):
        torch.manual_seed(0)
        rows.append([f"{name}, n = {data.n}", *whole(make(), data, 0.1, 32, epochs)])
    if not given.short and (given.data_dir or os.environ.get("MARGINFLOW_DATA")):
        data = mf.load("mnist:3,8", data_dir=given.data_dir)
        torch.manual_seed(0)
        rows.append(
            [
                "MLP 784-1024-64-1, MNIST 3 vs 8 (from medians)",
                *pieces(mlp(784, 1024, 64, 1), data, 16 / 255, 80, epochs, rounds=5),
            ]
        )
    print(f"versions  {_common.versions(('marginflow', 'torch'), given.threads)}")
    print(f"epochs    {epochs}, batches of 32 (MNIST: 80), seed 0; aim: below {AIM:.0%}\n")
    head = ["loop", "training, s", "measuring, s", "points", "added", f"< {AIM:.0%}"]
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
