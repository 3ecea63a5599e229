"""``marginflow.lightning`` with the real Lightning: it measures, and training does not notice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import marginflow as mf
from marginflow.lightning import MarginCallback

pytestmark = [
    pytest.mark.integrations,
    # Its hints: few workers, no validation, a folder of checkpoints that is not empty.
    pytest.mark.filterwarnings("ignore:::lightning"),
]

EPS = 0.05
DATA = mf.load("digits:3,8").sample(96)


class Module(L.LightningModule):
    """With batch norm and dropout, or without biases, norm and dropout (``plain``)."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        odd: list[nn.Module] = [] if plain else [nn.BatchNorm1d(16), nn.Dropout(0.2)]
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 16, bias=False),
            *odd,
            nn.ReLU(),
            nn.Linear(16, 1, bias=False),
        )
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x).reshape(-1)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        # The first thing of a step: what a callback before it would have disturbed.
        self.seen.append(
            (self.training, [m.training for m in self.modules()], torch.get_rng_state().tolist())
        )
        self.seen.append([None if p.grad is None else p.grad.clone() for p in self.parameters()])
        x, y = batch
        return softplus(-y * self(x)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(
    *callbacks: Callback,
    epochs: int = 8,
    plain: bool = False,
    logger: Any = False,
    ckpt: Path | None = None,
    folder: Path | None = None,
) -> Module:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    module = Module(plain)
    loader = DataLoader(TensorDataset(DATA.x, DATA.y), batch_size=32, shuffle=True)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=logger,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=folder,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader, ckpt_path=ckpt)
    return module


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("plain", [False, True], ids=["batch norm and dropout", "homogeneous"])
def test_training_is_the_same_to_the_bit(plain: bool, tmp_path: Path) -> None:
    callback = MarginCallback(
        DATA, f"fgsm:eps={EPS}", out=tmp_path / "run", schedule="every", loss="logistic"
    )
    with_it, without = fit(callback, plain=plain), fit(plain=plain)
    assert callback.monitor is not None
    assert len(callback.monitor.records) == 9
    assert bool(callback.monitor.left_out) is not plain
    # Weights, running means, mode, gradients and random state before every step.
    assert same(list(with_it.state_dict().values()), list(without.state_dict().values()))
    assert len(with_it.seen) == 2 * 8 * 3
    assert same(with_it.seen, without.seen)


def test_the_schedule_is_the_monitors_and_the_numbers_are_those_by_hand(tmp_path: Path) -> None:
    by_hand: list[dict[str, Any]] = []

    class ByHand(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            monitor = mf.Monitor(pl_module, DATA, f"fgsm:eps={EPS}")
            by_hand.append(monitor.measure(int(trainer.current_epoch) + 1))

    callback = MarginCallback(DATA, f"fgsm:eps={EPS}", schedule=[0, 2, 5])
    fit(ByHand(), callback)
    assert callback.monitor is not None
    records = callback.monitor.records
    # The last epoch comes with the end of training.
    assert [r["step"] for r in records] == [0, 2, 5, 8]
    assert [r["global_step"] for r in records] == [0, 6, 15, 24]
    hands = {r["step"]: r for r in by_hand}
    for record in records[1:]:
        for name in ("margin", "margin_quantiles", "adversarial_accuracy", "layer_norms"):
            assert record[name] == hands[record["step"]][name], name


def test_the_training_loader_serves_as_data() -> None:
    callback = MarginCallback(attack=f"fgsm:eps={EPS}", schedule="every")
    with_it = fit(callback, epochs=2)
    assert callback.monitor is not None
    assert callback.monitor.data.n == DATA.n
    given = MarginCallback(DATA, f"fgsm:eps={EPS}", schedule="every")
    assert same(with_it.seen, fit(given, epochs=2).seen)
    assert given.monitor is not None
    for one, other in zip(callback.monitor.records, given.monitor.records, strict=True):
        assert one["clean_accuracy"] == other["clean_accuracy"]
        assert one["margin"] == pytest.approx(other["margin"], rel=1e-5)


def test_loggers_get_every_measurement(tmp_path: Path) -> None:
    class Keeping(Logger):
        def __init__(self) -> None:
            super().__init__()
            self.got: list[tuple[int | None, dict[str, float]]] = []

        name = "keeping"
        version = 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.got.append((step, dict(metrics)))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    keeping = Keeping()
    callback = MarginCallback(DATA, f"fgsm:eps={EPS}", schedule=[1, 3])
    folders = {"save_dir": str(tmp_path), "name": "logs"}
    fit(callback, plain=True, logger=[keeping, CSVLogger(**folders), TensorBoardLogger(**folders)])
    assert callback.monitor is not None
    ours = [(step, m) for step, m in keeping.got if "marginflow/normalized_margin" in m]
    assert [step for step, _ in ours] == [3, 9, 24]
    for (_, metrics), record in zip(ours, callback.monitor.records, strict=True):
        for name in ("normalized_margin", "adversarial_accuracy", "norm_product", "epoch"):
            assert metrics[f"marginflow/{name}"] == record[name]
        assert all(isinstance(value, float) for value in metrics.values())
    assert "marginflow/normalized_margin" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_it_goes_on_from_lightnings_checkpoint(tmp_path: Path) -> None:
    def callback(name: str) -> MarginCallback:
        return MarginCallback(
            DATA, f"fgsm:eps={EPS}", schedule="every", out=tmp_path / name, resume=True
        )

    class Killed(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 6:
                raise KeyError("the power went")

    fit(callback("whole"), plain=True)
    saver = ModelCheckpoint(dirpath=tmp_path / "lightning", every_n_epochs=4, save_top_k=-1)
    with pytest.raises(KeyError):
        fit(callback("parts"), saver, Killed(), plain=True, folder=tmp_path)
    # The directory is free again, and holds what was measured before: epochs 0 to 6.
    assert [r["step"] for r in mf.load_run(tmp_path / "parts").metrics] == list(range(7))
    (saved,) = (tmp_path / "lightning").glob("*.ckpt")
    fit(callback("parts"), plain=True, ckpt=saved, folder=tmp_path)
    whole, parts = (mf.load_run(tmp_path / name).metrics for name in ("whole", "parts"))
    assert [r["step"] for r in parts] == list(range(9))
    # Up to the checkpoint the same bits; Lightning keeps no random state, so batches differ then.
    assert parts[:5] == whole[:5]
    assert parts[5] != whole[5]


def test_what_cannot_be_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(mf.errors.RunError):
        fit(MarginCallback(DATA, out=tmp_path / "run"), epochs=1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_second_fit_goes_on_with_the_same_callback(tmp_path: Path) -> None:
    """In memory and on disk: the records of both fits, none twice."""
    for out in (None, tmp_path / "run"):
        torch.manual_seed(0)
        module = Module(plain=True)
        watch = MarginCallback(
            (DATA.x, DATA.y),
            mf.attacks.FGSM(eps=EPS),
            schedule="every",
            **({"out": out} if out else {}),
        )
        loader = DataLoader(TensorDataset(DATA.x, DATA.y.float()), batch_size=32)
        for last in (2, 4):
            trainer = L.Trainer(
                max_epochs=last, callbacks=[watch], logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            )  # fmt: skip
            trainer.fit(module, loader)
        assert watch.monitor is not None
        steps = [r["step"] for r in watch.monitor.records]
        assert steps[-1] == 4
        if out is not None:
            assert [r["step"] for r in mf.load_run(out).metrics] == steps == [0, 1, 2, 3, 4]
