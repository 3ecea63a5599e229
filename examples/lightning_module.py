"""A LightningModule, watched by a callback, with what was measured in Lightning's own logger.

The module is an ordinary one: dropout, batches, an optimiser. ``MarginCallback`` measures it at
the end of epochs and hands the numbers to every logger of the Trainer.

    pip install 'marginflow[lightning]'
    python examples/lightning_module.py [--out DIR]
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import marginflow as mf

try:
    from marginflow.lightning import MarginCallback  # needs Lightning, and says how to get it
except mf.errors.MissingDependencyError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
import lightning as L
from lightning.pytorch.loggers import CSVLogger

EPS, EPOCHS, BATCH = 0.05, 40, 32


class Classifier(L.LightningModule):
    """Trained against FGSM; what is measured is ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64, bias=False),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x).reshape(-1)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((y * self(x)).sum(), x)
        loss = softplus(-y * self((x - EPS * slope.sign()).detach())).mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main(out: Path) -> int:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module="lightning"
    )  # its hints on workers and log_every_n_steps
    data = mf.load("digits:3,8")
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=BATCH, shuffle=True)

    callback = MarginCallback(data, f"fgsm:eps={EPS}", out=out / "run")
    logger = CSVLogger(out, name="logs")
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=logger, callbacks=[callback],
        default_root_dir=out, enable_checkpointing=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(Classifier(), loader)
    logger.save()

    with open(Path(logger.log_dir) / "metrics.csv", newline="", encoding="utf-8") as file:
        logged = [row for row in csv.DictReader(file) if row.get("marginflow/margin")]
    run = mf.load_run(out / "run")
    print(
        f"3 vs 8, {data.n} images, FGSM ε = {EPS}, {EPOCHS} epochs, seed 0; from Lightning's metrics.csv:"
    )
    print(f"{'epoch':>5} {'γ̂_m':>9} {'accuracy under FGSM':>20}")
    for row in logged[::4]:
        print(
            f"{float(row['marginflow/epoch']):5.0f} {float(row['marginflow/normalized_margin']):9.5f} "
            f"{float(row['marginflow/adversarial_accuracy']):20.3f}"
        )
    ours = [record["normalized_margin"] for record in run.metrics]
    theirs = [float(row["marginflow/normalized_margin"]) for row in logged]
    checks = {
        "Lightning's logger got every measurement": len(theirs) == len(ours) > 10,
        "with the numbers of the run directory": all(
            abs(a - b) <= 1e-6 * abs(b) for a, b in zip(theirs, ours, strict=False)
        ),
        "the start and the last epoch among them": [run.metrics[k]["epoch"] for k in (0, -1)]
        == [0, EPOCHS],
        "nine of ten examples withstand FGSM": run.final["adversarial_accuracy"] > 0.9,
    }
    for what, holds in checks.items():
        if not holds:
            print(f"\nexpected: {what}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where logs and the run go; temporary if missing")
    asked = parser.parse_args()
    if asked.out is not None:
        sys.exit(main(asked.out))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(Path(folder)))
