from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flow_runs import ATTACK, DATA

import marginflow as mf
from marginflow.monitor import QUANTILES
from marginflow.runs import Run

EPOCHS = (0, 1, 2, 5, 10, 30, 100, 300, 1000)


def record(epoch: int, margin: float, *, test: bool = True) -> dict[str, Any]:
    """A measurement with the keys of mf.Monitor."""
    share = min(1.0, 0.5 + epoch / 1000)
    values: dict[str, Any] = {
        "step": 9 * epoch,
        "epoch": epoch,
        "epoch_loss": None if epoch == 0 else 1 / (1 + epoch),
        "epoch_accuracy": None if epoch == 0 else share,
        "normalized_margin": margin,
        "normalized_margin_quantiles": [margin + 0.01 * level for level in QUANTILES],
        "normalized_margin_by_total": margin / 7,
        "margin": margin * (13 + epoch),
        "smoothed_margin": margin - 0.1,
        "adversarial_accuracy": share,
        "dead_inputs": 0,
        "log_loss": -0.3 - epoch / 300,
        "clean_normalized_margin": margin + 0.005,
        "clean_accuracy": min(1.0, share + 0.1),
        "layer_norms": [6.5 + epoch / 100, 3.2 + epoch / 200],
        "norm_product": 13.0 + epoch,
        "total_norm": 7.3,
    }
    if test:
        values["test_clean_accuracy"] = share - 0.05
        values["test_adversarial_accuracy"] = share - 0.1
    return values


def make_run(
    name: str | None = "fgsm",
    *,
    attack: str = "fgsm:eps=0.15",
    measure_with: str | None = None,
    margins: Callable[[int], float] = lambda epoch: -0.02 + 0.0000221 * epoch,
    epochs: Sequence[int] = EPOCHS,
    test: bool = True,
    **config: Any,
) -> Run:
    """A run in memory with a made-up history; ``name`` is that of its folder, if any."""
    settings: dict[str, Any] = {
        "kind": "train",
        "data": "digits:3,8",
        "data_sha256": "e9c267f05310a4b9b523a404183f920f",
        "data_bounds": [0.0, 1.0],
        "classes": ["3", "8"],
        "examples": 286,
        "model_spec": "mlp:32",
        "model": {"kind": "mlp", "widths": [64, 32, 1], "activation": "relu"},
        "attack": attack,
        "measure_with": attack if measure_with is None else measure_with,
        "loss": "logistic",
        "lr": 0.1,
        "batch_size": 32,
        "epochs": epochs[-1] if epochs else 1000,
        "momentum": 0.0,
        "derivative": "detached",
        "measure": True,
        "schedule": None,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "layers": [
            {"name": "1.weight", "parameters": ["1.weight"], "degree": 1},
            {"name": "3.weight", "parameters": ["3.weight"], "degree": 1},
        ],
        "versions": {"marginflow": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu"},
        "git_revision": None,
        "machine": "x86_64",
        "threads": 2,
    }
    metrics = [record(epoch, margins(epoch), test=test) for epoch in epochs]
    return Run(settings | config, metrics, None if name is None else Path("runs") / name)


def standard_run() -> Run:
    """Standard training, measured under the attack of :func:`make_run`'s default."""
    return make_run(
        "standard",
        attack="none",
        measure_with="fgsm:eps=0.15",
        margins=lambda epoch: -0.02 - 0.15 * min(1.0, epoch / 100),
    )


@pytest.fixture
def adversarial() -> Run:
    return make_run()


@pytest.fixture
def standard() -> Run:
    return standard_run()


@pytest.fixture(scope="session")
def both() -> list[Run]:
    """The two, for tests that only read them."""
    return [make_run(), standard_run()]


@pytest.fixture(name="make_run", scope="session")
def _make_run() -> Callable[..., Run]:
    return make_run


@pytest.fixture(scope="session")
def flow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow to ln t = 30, and a training run from the same weights, on disk."""
    root = tmp_path_factory.mktemp("runs")
    out = root / "flow"
    mf.gradient_flow("deep-linear:4", DATA, attack=ATTACK, log_time=30, rtol=1e-6, out=out)
    mf.train(
        "deep-linear:4",
        DATA,
        attack=ATTACK,
        loss="exponential",
        epochs=40,
        dtype="float64",
        out=root / "descent",
    )
    return root


@pytest.fixture
def flow(flow_folder: Path) -> Run:
    return mf.load_run(flow_folder / "flow")


@pytest.fixture
def descent(flow_folder: Path) -> Run:
    return mf.load_run(flow_folder / "descent")
