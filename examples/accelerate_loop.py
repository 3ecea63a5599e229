"""A loop with Hugging Face's accelerate: the monitor in three lines, on one process or on many.

The monitor gets the network without accelerate's wrappers. In a distributed run (``accelerate launch``)
every process may call it; the first one measures and writes, the others go on.

    pip install accelerate
    python examples/accelerate_loop.py [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import marginflow as mf

try:
    from accelerate import Accelerator
    from accelerate.utils import set_seed
except ModuleNotFoundError:
    print("this example needs accelerate: pip install accelerate", file=sys.stderr)
    sys.exit(2)

EPS, EPOCHS, BATCH = 0.1, 25, 64


def main(out: Path) -> int:
    torch.set_num_threads(1)
    set_seed(0)
    accelerator = Accelerator(cpu=True)  # without cpu=True: whatever the machine has
    data = mf.load("digits")
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=BATCH, shuffle=True)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)

    attack = mf.attacks.FGSM(eps=EPS, bounds=(0, 1))
    inner = accelerator.unwrap_model(model)
    # The examples are the data set's own, not the loader's: that one gives each process its share.
    with mf.Monitor(inner, data, attack, out=out) as monitor:
        for epoch in range(1, EPOCHS + 1):
            for x, y in loader:
                x = x.clone().requires_grad_()
                (slope,) = torch.autograd.grad(cross_entropy(inner(x), y), x)
                moved = (x + EPS * slope.sign()).clamp(0, 1).detach()
                optimizer.zero_grad()
                accelerator.backward(cross_entropy(model(moved), y))
                optimizer.step()
            monitor.measure(epoch, epoch=epoch)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return 0

    run = mf.load_run(out)
    print(f"Ten digits, {data.n} images, FGSM ε = {EPS}, {EPOCHS} epochs, seed 0")
    print(f"{'epoch':>5} {'γ̂_m':>9} {'clean':>7} {'FGSM':>7}  accuracy")
    for r in run.metrics[::3]:
        print(
            f"{r['epoch']:5} {r['normalized_margin']:9.5f} {r['clean_accuracy']:7.3f} "
            f"{r['adversarial_accuracy']:7.3f}"
        )
    test = data.test or data
    by_hand = mf.adversarial_margins(inner, test.x, test.y, attack)
    checks = {
        "the last epoch measured": run.final["epoch"] == EPOCHS,
        "FGSM withstood better than at the start": run.final["adversarial_accuracy"]
        > run.metrics[0]["adversarial_accuracy"] + 0.1,
        "the same accuracy by hand": abs(by_hand.accuracy - run.final["test_adversarial_accuracy"])
        < 1e-9,
        "no alarm": monitor.overfitting is None,
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
