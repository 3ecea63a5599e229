"""Your own CNN with batch norm, and catastrophic overfitting, provoked and caught.

A small CNN learns the ten bundled digits: 28 epochs against PGD of five steps, then, to save time, against
FGSM of the same ε = 0.3, in one step and at a higher rate. FGSM training of so large an ε overfits
catastrophically: the accuracy under FGSM stays, that under PGD collapses. The monitor is told of FGSM
alone; a stronger attack on a few examples comes with it, and raises the alarm. Batch norm leaves a
network without normalised margins: what is not measured, and why, is said.

    python examples/batch_norm_cnn.py [--out DIR]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import marginflow as mf
from marginflow.report import write_report

EPS, SWITCH, EPOCHS, BATCH = 0.3, 28, 72, 64


class Net(nn.Module):
    """Any network, with biases and batch norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.last = nn.Linear(16 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        out: Tensor = self.last(nn.functional.max_pool2d(x, 2).flatten(1))
        return out


def perturbed(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """PGD in the ℓ∞ ball, as many projects have it; one step is FGSM."""
    size = EPS if steps == 1 else 2.5 * EPS / steps
    moved = x
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(model(moved), y), moved)
        moved = (x + (moved + size * slope.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    return moved.detach()


def main(out: Path) -> int:
    logging.basicConfig(format="! %(message)s", stream=sys.stdout)  # the alarm is a warning
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = mf.load("digits:n=800")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    attack = mf.attacks.FGSM(eps=EPS, bounds=(0, 1))
    with mf.Monitor(model, data, attack, out=out, schedule=range(0, EPOCHS + 1, 4)) as monitor:
        for epoch in range(1, EPOCHS + 1):
            model.train()
            if epoch == SWITCH + 1:
                optimizer.param_groups[0]["lr"] = 0.1
            for rows in torch.randperm(data.n).split(BATCH):
                x, y = data.x[rows], data.y[rows]
                moved = perturbed(model, x, y, steps=5 if epoch <= SWITCH else 1)
                optimizer.zero_grad()
                cross_entropy(model(moved), y).backward()
                optimizer.step()
            monitor.measure(epoch, epoch=epoch)

    print(f"\nTen digits, {data.n} images, ε = {EPS}, PGD until epoch {SWITCH}, then FGSM; seed 0")
    print(
        f"{'epoch':>5} {'clean':>7} {'FGSM':>7} {'PGD':>7}   accuracy; PGD and its FGSM: a sample"
    )
    for r in monitor.records:
        print(f"{r['epoch']:5} {r['clean_accuracy']:7.3f} {r['sample_accuracy']:7.3f} ", end="")
        print(f"{r['strong_accuracy']:7.3f}{'   alarm' if r['overfitting'] else ''}")
    print(f"\nLeft out: {', '.join(monitor.left_out)}")
    print(f"because: {next(iter(monitor.left_out.values()), '')}")
    print(f"The report lies in {write_report([monitor.run], out / 'report.html')}.")

    found = monitor.overfitting
    checks = {
        "the alarm, after FGSM took over": found is not None and found.step > SWITCH,
        "no normalised margins, and a reason": "BatchNorm2d" in monitor.left_out["norm_product"],
        "margins as they are, all the same": all(r["margin"] is not None for r in monitor.records),
        "the model left in training mode": model.training,
    }
    for what, holds in checks.items():
        if not holds:
            print(f"\nexpected: {what}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the run directory; a temporary one if missing")
    asked = parser.parse_args()
    if asked.out is not None:
        sys.exit(main(asked.out))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(Path(folder) / "run"))
