"""Leaving examples out late in training: time per epoch, and how far the path departs.

    MARGINFLOW_DATA=… python benchmarks/shrinking.py              # MNIST 3/8, the paper's network, FGSM
    python benchmarks/shrinking.py --run runs/fgsm --more 50      # from a run's last weights
    python benchmarks/shrinking.py --short                        # bundled digits, under a minute

From the same late weights the training goes on three times over the same batches: in full, in full with
another rounding (autograd in place of explicit products), and shrunk. The distances are
those of the weights from the full training, ‖W − W_full‖/‖W_full‖: a training is determined only
up to what rounding makes of it, so the second is what the third is to be read beside.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from _common import network, parser, training, versions
from torch import Tensor, nn

import marginflow as mf
from marginflow.engine import EngineName, build
from marginflow.losses import get_loss
from marginflow.training import Callback, Shrinking, Trainer

FGSM, FGSM_DIGITS = "fgsm:eps=16/255", "fgsm:eps=0.1"


class Watch(Callback):
    """Seconds of each epoch, and how many examples it worked on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.kept: list[int] = []
        self.last = time.perf_counter()

    def on_epoch(self, trainer: Trainer) -> None:
        """Note the time since the last epoch."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        out = 0 if trainer.shrinking is None else trainer.shrinking.left_out
        self.kept.append(trainer.data.n - out)


def go_on(
    start: nn.Module,
    data: mf.Dataset,
    config: dict[str, object],
    more: int,
    engine: EngineName,
    shrinking: Shrinking | None,
) -> tuple[Trainer, Watch]:
    """``more`` epochs from ``start``, at the epoch that it was trained for."""
    model = copy.deepcopy(start)
    attack = mf.attacks.build(str(config["attack"]))
    size, epoch = int(str(config["batch_size"])), int(str(config["epochs"]))
    loss = get_loss(str(config["loss"]))
    worker = build(model, loss, attack, shape=data.shape, batch_size=size, engine=engine)
    watch = Watch()
    trainer = Trainer(
        worker,
        data,
        lr=float(str(config["lr"])),
        batch_size=size,
        epochs=epoch + more,
        seed=int(str(config["seed"])),
        callbacks=[watch],
        shrinking=shrinking,
    )
    trainer.epoch, trainer.step = epoch, epoch * trainer.steps_per_epoch
    if shrinking is not None:
        shrinking.examine(trainer)
    watch.last = time.perf_counter()
    trainer.run()
    return trainer, watch


def weights(of: Trainer) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in of.model.parameters()])


def short(asked: argparse.Namespace) -> tuple[mf.Run, mf.Dataset, float]:
    torch.set_num_threads(asked.threads)
    data = mf.load("digits:3,8")
    options = {"attack": FGSM_DIGITS, "lr": 0.5, "batch_size": 32, "epochs": 600, "measure": False}
    began = time.perf_counter()
    return mf.train("mlp:256,32", data, **options), data, time.perf_counter() - began


def main() -> None:
    arguments = parser(__doc__, epochs=300)
    arguments.add_argument("--more", type=int, default=50, help="epochs of each of the three")
    asked = arguments.parse_args()
    run, data, seconds = short(asked) if asked.short else network(asked, FGSM)
    if asked.run is not None:
        run.config["epochs"] = run.checkpoint().info["epoch"]
    start = run.load_model().float()
    data = data.to(dtype=torch.float32)
    print(f"{data.name}, {data.n} examples; {training(run)}")
    print(versions(("torch",), asked.threads) + f"; trained before in {seconds:.0f} s\n")
    shrinking = Shrinking()
    rows: list[tuple[str, EngineName, Shrinking | None]] = [
        ("full", "fused", None),
        ("full, other rounding", "autograd", None),
        ("shrunk", "fused", shrinking),
    ]
    head = f"{asked.more} more epochs"
    print(f"{head:24}{'ms/epoch':>10}{'kept':>8}{'distance':>11}{'of motion':>11}{'γ̂_m':>12}")
    reference: Tensor | None = None
    moved = 0.0
    for name, engine, shrink in rows:
        trainer, watch = go_on(start, data, run.config, asked.more, engine, shrink)
        found = weights(trainer)
        if reference is None:
            first = torch.cat([p.detach().double().flatten() for p in start.parameters()])
            reference, moved = found, float((found - first).norm() / found.norm())
        far = float((found - reference).norm() / reference.norm())
        margins = mf.adversarial_margins(trainer.model, data.x, data.y, trainer.engine.attack)
        middle = sorted(watch.seconds)[len(watch.seconds) // 2]
        kept = sum(watch.kept) / len(watch.kept) / data.n
        print(
            f"{name:24}{1e3 * middle:10.1f}{kept:8.1%}{far:11.1e}{far / moved:11.1e}"
            f"{margins.normalized_min:12.6f}"
        )
    print(
        f"\nms/epoch: median, without examinations but where every epoch has one; "
        f"{shrinking.examinations} examinations, {shrinking.violations} violations."
    )


if __name__ == "__main__":
    main()
