"""Your own network in your own loop, trained for its adversarial margin by SphereSGD.

A small convolutional network tells 3 from 8 (the bundled digits) against FGSM, in a plain PyTorch loop:
first by torch.optim.SGD, then by marginflow's SphereSGD, for equally many steps. Both are
judged by the smallest normalised adversarial margin of the training set. Nothing of marginflow is
needed to train but the optimiser.

    python examples/own_loop.py
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, max_pool2d, softplus

import marginflow as mf
from marginflow.ascent import SphereSGD

EPS = 0.1  # of pixels in [0, 1]
EPOCHS, BATCH = 80, 48


class Net(nn.Module):
    """Without biases, so that scaling a layer scales the output: the network is homogeneous."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.second = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.last = nn.Linear(32 * 2 * 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(torch.relu(self.first(x)), 2)
        x = max_pool2d(torch.relu(self.second(x)), 2)
        out: Tensor = self.last(x.flatten(1)).squeeze(1)
        return out


def fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Against the margin y·f, whose gradient does not vanish as the loss saturates."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((y * model(x)).sum(), x)
    return (x - EPS * slope.sign()).detach()


def log_loss(margins: Tensor, temperature: float) -> Tensor:
    """``ln mean softplus(−τm)``; ln softplus(−a) is ln sigmoid(−a) = −a where softplus underflows."""
    a = temperature * margins
    logs = torch.where(a > 15, logsigmoid(-a), softplus(-a.clamp(max=15)).log())
    return logs.logsumexp(0) - torch.tensor(float(len(a))).log()


def train(name: str, data: mf.Dataset) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    optimizer: torch.optim.Optimizer
    if name == "SphereSGD":
        with torch.no_grad():
            for weight in model.parameters():
                weight.div_(weight.norm())  # so that margins, and τ, have a scale
        optimizer = SphereSGD(model.parameters(), lr=0.03, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = EPOCHS * -(-data.n // BATCH)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1 / 30) ** (1 / steps))
    step = 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(data.n).split(BATCH):
            x, y = data.x[rows], data.y[rows].float()
            margins = y * model(fgsm(model, x, y))
            optimizer.zero_grad()
            if name == "SphereSGD":
                # A rising temperature: from all examples to those of the smallest margin.
                log_loss(margins, 30.0 * 100 ** (step / steps)).backward()
                optimizer.step()
                scheduler.step()
            else:
                softplus(-margins).mean().backward()
                optimizer.step()
            step += 1
    return model


def main() -> int:
    torch.set_num_threads(1)
    data = mf.load("digits:3,8")
    held_out = data.test or data
    attack = mf.attacks.FGSM(eps=EPS)
    print(f"3 vs 8, {data.n} images of 8 × 8, FGSM ε = {EPS}, {EPOCHS} epochs, seed 0\n")
    print(
        f"{'optimiser':10} {'γ̂_m':>9} {'median γ̂':>9} {'train':>7} {'test':>7}  adversarial accuracy"
    )
    smallest = {}
    for name in ("SGD", "SphereSGD"):
        model = train(name, data)
        m = mf.adversarial_margins(model, data.x, data.y, attack)
        test = mf.adversarial_margins(model, held_out.x, held_out.y, attack)
        smallest[name] = m.normalized_min
        median = m.quantiles([0.5]).item()
        print(
            f"{name:10} {m.normalized_min:9.5f} {median:9.5f} {m.accuracy:7.3f} {test.accuracy:7.3f}"
        )
    if not smallest["SphereSGD"] > max(smallest["SGD"], 0.0):
        print("\nexpected the larger margin from SphereSGD", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
