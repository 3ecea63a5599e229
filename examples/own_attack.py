"""Your own attack, in training and in the measurements: only a window of the image may change.

An attack is a subclass of ``mf.attacks.Attack`` that computes δ; ball, bounds, labels, the model's mode
and the count of dead inputs are looked after by its base. Here the perturbation may touch
nothing but the middle 4 × 4 pixels, like a sticker on a sign: δ = −ε sgn(∇_x m) inside the window, 0 outside.

    python examples/own_attack.py
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import marginflow as mf
from marginflow.attacks import Attack, Query

EPS, EPOCHS, BATCH = 0.3, 60, 32


@dataclass(frozen=True, eq=False)
class Sticker(Attack):
    """FGSM inside the rows and columns ``low`` to ``high``, both of an image (…, H, W)."""

    low: int = 2
    high: int = 5

    name: ClassVar[str] = "sticker"

    def _spec_parts(self) -> list[str]:
        return [f"low={self.low}", f"high={self.high}"]  # how runs and reports call it

    def window(self, x: Tensor) -> Tensor:
        inside = torch.zeros(x.shape[-2:], dtype=torch.bool, device=x.device)
        inside[self.low : self.high + 1, self.low : self.high + 1] = True
        return inside

    def _perturb(self, query: Query, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        slope = query.gradient(query.x) * self.window(query.x)
        return -self.eps * slope.sign(), ~slope.flatten(1).any(dim=1)


def train(attack: Attack | None, judge: Attack, data: mf.Dataset) -> mf.Monitor:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 1, bias=False)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with mf.Monitor(model, data, judge) as monitor:
        for epoch in range(1, EPOCHS + 1):
            for rows in torch.randperm(data.n).split(BATCH):
                x, y = data.x[rows], data.y[rows]
                if attack is not None:
                    x = x + attack(model, x, y).delta
                optimizer.zero_grad()
                softplus(-y * model(x).reshape(-1)).mean().backward()
                optimizer.step()
            monitor.measure(epoch, epoch=epoch)
    return monitor


def main() -> int:
    torch.set_num_threads(1)
    data = mf.load("digits:3,8")
    sticker = Sticker(EPS, math.inf, bounds=(0, 1))
    print(f"3 vs 8, {data.n} images of 8 × 8; {sticker}; {EPOCHS} epochs, seed 0\n")
    plain, robust = train(None, sticker, data), train(sticker, sticker, data)
    print(f"{'trained on':20} {'clean':>7} {'sticker':>8} {'held out':>9}  accuracy")
    for name, monitor in (("images as they are", plain), ("stickers", robust)):
        r = monitor.records[-1]
        print(
            f"{name:20} {r['clean_accuracy']:7.3f} {r['adversarial_accuracy']:8.3f} "
            f"{r['test_adversarial_accuracy']:9.3f}"
        )

    found = sticker(robust.model, data.x, data.y)
    moved = data.x + found.delta
    # Oracle: the same by hand, example by example.
    x = data.x[:1].clone().requires_grad_()
    (slope,) = torch.autograd.grad((data.y[:1] * robust.model(x).reshape(-1)).sum(), x)
    by_hand = torch.zeros_like(data.x[:1])
    by_hand[..., 2:6, 2:6] = -EPS * slope[..., 2:6, 2:6].sign()
    by_hand = (data.x[:1] + by_hand).clamp(0, 1) - data.x[:1]
    margins = mf.adversarial_margins(robust.model, data.x, data.y, sticker)
    checks = {
        "nothing outside of the window": not bool(found.delta[..., ~sticker.window(data.x)].any()),
        "pixels in [0, 1]": bool(((moved >= 0) & (moved <= 1)).all()),
        "δ as by hand": torch.allclose(found.delta[:1], by_hand, rtol=0, atol=1e-6),
        "margins no larger than those of clean images": margins.accuracy
        <= robust.records[-1]["clean_accuracy"],
        "training on stickers withstands them better": robust.records[-1]["adversarial_accuracy"]
        > plain.records[-1]["adversarial_accuracy"] + 0.1,
    }
    for what, holds in checks.items():
        if not holds:
            print(f"\nexpected: {what}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
