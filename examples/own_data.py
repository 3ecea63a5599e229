"""Your own arrays and your own model: from NumPy to a run, and back through the command line.

Three classes of points in 20 dimensions, made by scikit-learn, stand for your data, ``Net`` for your
model. Arrays go into the library as they are, or as an ``.npz`` file that the command line reads, too.

    python examples/own_data.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import make_classification
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import marginflow as mf

EPS, EPOCHS, BATCH = 0.3, 40, 50
ATTACK = f"fgm:eps={EPS}"


class Net(nn.Module):
    """Your model: no biases, so that its margins can be normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 64, bias=False)
        self.last = nn.Linear(64, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.first(x)))
        return out


def save_arrays(path: Path) -> None:
    """Your data: x (n, …) of floats, y (n,) of 0 … C − 1 (or −1/+1 for two classes)."""
    x, y = make_classification(
        900, 20, n_informative=10, n_classes=3, class_sep=2.0, random_state=0
    )
    x = x.astype(np.float32)
    np.savez(path, x=x[:600], y=y[:600], x_test=x[600:], y_test=y[600:])


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    save_arrays(folder / "points.npz")
    with np.load(folder / "points.npz") as arrays:
        by_arrays = mf.Dataset(arrays["x"], arrays["y"])
    data = mf.load(f"npz:{folder / 'points.npz'}")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attack = mf.attacks.build(ATTACK)
    if attack is None:
        raise SystemExit("no attack")

    with mf.Monitor(model, data, attack, out=folder / "run") as monitor:
        for epoch in range(1, EPOCHS + 1):
            for rows in torch.randperm(data.n).split(BATCH):
                x, y = data.x[rows], data.y[rows]
                moved = x + attack(model, x, y).delta
                optimizer.zero_grad()
                cross_entropy(model(moved), y).backward()
                optimizer.step()
            monitor.measure(epoch, epoch=epoch)
    torch.save(model.state_dict(), folder / "weights.pt")

    print(f"{data.n} + {data.test.n if data.test else 0} points, 3 classes, {attack}; seed 0\n")
    print(f"{'epoch':>5} {'clean':>7} {'FGM':>7} {'held out':>9}  accuracy")
    for r in monitor.records[::4]:
        print(
            f"{r['epoch']:5} {r['clean_accuracy']:7.3f} {r['adversarial_accuracy']:7.3f} "
            f"{r['test_adversarial_accuracy']:9.3f}"
        )

    # The same weights from the command line: the architecture is this module's Net.
    command = [
        sys.executable, "-m", "marginflow", "measure", str(folder / "weights.pt"),
        "--model", "own_data:Net", "--data", f"npz:{folder / 'points.npz'}",
        "--attack", ATTACK, "--json",
    ]  # fmt: skip
    print(
        "\n$ marginflow measure weights.pt --model own_data:Net --data npz:points.npz --attack",
        ATTACK,
    )
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": here}
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    (found,) = json.loads(done.stdout)
    print(f"accuracy {found['accuracy']:.3f}, γ̂_m {found['normalized_margin']:.5f}")

    last = monitor.records[-1]
    checks = {
        "the file and the arrays hold the same examples": torch.equal(by_arrays.x, data.x)
        and torch.equal(by_arrays.y, data.y),
        "the command line's numbers are the monitor's": found["accuracy"]
        == last["adversarial_accuracy"]
        and abs(found["normalized_margin"] - last["normalized_margin"]) < 1e-6,
        "four of five examples withstand the attack": last["adversarial_accuracy"] > 0.8,
    }
    for what, holds in checks.items():
        if not holds:
            print(f"\nexpected: {what}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.exit(main(Path(name)))
