"""A plain PyTorch loop, watched in three lines: do the margins grow, and does the theory hold on it?

A small network without biases tells 3 from 8 (the bundled digits) against FGSM. The loop is
plain PyTorch; the three lines that marginflow asks for are marked. Then the run is read like one of
marginflow's own: statements of the paper are judged on it, and a report is written.

    python examples/plain_loop.py [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import marginflow as mf
from marginflow.report import write_report

EPS, EPOCHS, BATCH, RATE = 0.05, 100, 16, 0.3


def fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Against the margin y·f, whose gradient does not vanish as the loss saturates."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((y * model(x).reshape(-1)).sum(), x)
    return (x - EPS * slope.sign()).detach()


def main(out: Path) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = mf.load("digits:3,8")
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 32, bias=False),
        nn.ReLU(),
        nn.Linear(32, 1, bias=False),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    # What the loop does, for verdicts: hypotheses about what is not said count as unknown.
    said = {"attack": f"fgsm:eps={EPS}", "loss": "logistic", "lr": RATE, "batch_size": BATCH}

    attack = mf.attacks.FGSM(eps=EPS)  # one
    with mf.Monitor(
        model, data, attack, out=out, keep_weights=True, training=said
    ) as monitor:  # two
        for epoch in range(1, EPOCHS + 1):
            for rows in torch.randperm(data.n).split(BATCH):
                x, y = data.x[rows], data.y[rows].float()
                loss = softplus(-y * model(fgsm(model, x, y)).reshape(-1)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            monitor.measure(epoch, epoch=epoch)  # three

    print(f"3 vs 8, {data.n} images of 8 × 8, FGSM ε = {EPS}, {EPOCHS} epochs, seed 0\n")
    print(f"{'epoch':>5} {'γ̂_m':>9} {'accuracy under FGSM':>20} {'product of norms':>17}")
    for record in monitor.records[::4]:
        print(
            f"{record['epoch']:5} {record['normalized_margin']:9.5f} "
            f"{record['adversarial_accuracy']:20.3f} {record['norm_product']:17.3f}"
        )

    verdicts = mf.verify(monitor.run, data)
    applied = [v for v in verdicts if v.outcome != "does not apply"]
    print(f"\n{len(verdicts)} statements of the paper; those that apply to this run:")
    for verdict in applied:
        print(f"  {verdict.statement} {verdict.outcome}: {verdict.measured}")
    page = write_report([monitor.run], out / "report.html")
    print(f"\nThe report lies in {page}.")

    last = monitor.records[-1]
    fitted = [r["normalized_margin"] for r in monitor.records if r["adversarial_accuracy"] == 1]
    checks = {
        "the last epoch is measured": last["epoch"] == EPOCHS,
        "every example has a positive margin in the end": last["adversarial_accuracy"] == 1,
        "the normalised margin grows from then on": bool(fitted) and fitted[-1] > fitted[0] > 0,
        "statements apply": len(applied) > 0,
        "no statement fails": all(v.outcome != "fails" for v in verdicts),
        "the run can be loaded": mf.load_run(out).metrics[-1]["step"] == last["step"],
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
