"""``mf.train_seeds``: ordinary runs, each the solo run of its seed."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import marginflow as mf
from marginflow.errors import DivergedError, InputError, RunError, SpecificationError
from marginflow.training import SideBySide
from marginflow.workflow._callbacks import Pace

DATA = "separable:n=23,d=6,margin=0.3"
SMALL: dict[str, Any] = {
    "attack": "fgm:eps=0.1",
    "lr": 0.2,
    "batch_size": 8,
    "epochs": 6,
    "dtype": "float64",
}


@pytest.fixture(autouse=True)
def by_explicit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side is what the fused engine offers, whatever ``auto`` means elsewhere."""
    monkeypatch.delenv("MARGINFLOW_ENGINE", raising=False)


def close(found: Any, expected: Any) -> bool:
    """Records alike to rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        pairs = zip(found, expected, strict=True)
        return len(found) == len(expected) and all(close(a, b) for a, b in pairs)
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-9, abs=1e-12))
    return bool(found == expected)


def apart(one: mf.Run, other: mf.Run) -> float:
    pairs = zip(one.load_model().parameters(), other.load_model().parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def same_runs(expected: list[mf.Run], found: list[mf.Run]) -> None:
    """The same weights at the end and the same numbers at the steps that both have measured."""
    for one, other in zip(expected, found, strict=True):
        assert apart(one, other) < 1e-12
        measured = {record["step"]: record for record in other.metrics}
        both = [record for record in one.metrics if record["step"] in measured]
        assert both[-1]["step"] == one.final["step"] == other.final["step"]
        assert all(close(measured[record["step"]], record) for record in both)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp:8", {}),
        ("mlp:8", {"batch_size": None, "momentum": 0.5}),
        ("deep-linear:5,4", {"batch_size": None}),  # all three gauges, kept weights
        ("mlp:8", {"measure_with": "fgsm:eps=0.1", "schedule": [2, 5], "loss": "exponential"}),
    ],
    ids=["batches", "momentum", "gauges", "schedule"],
)
def test_each_run_is_the_solo_run(tmp_path: Path, model: str, options: dict[str, Any]) -> None:
    options = {**SMALL, **options}
    runs = mf.train_seeds(model, DATA, seeds=[0, 4], out=tmp_path, **options)
    for seed, run in zip((0, 4), runs, strict=True):
        assert run.path == tmp_path / f"seed-{seed}"
        solo = mf.train(model, DATA, seed=seed, **options, out=tmp_path / f"solo-{seed}")
        read = mf.load_run(tmp_path / f"seed-{seed}")
        assert {**read.config, "layers": 0} == {**solo.config, "layers": 0}
        assert close(read.config["layers"], solo.config["layers"])
        assert read.config["engine"] == "fused"
        assert read.config["seed"] == seed
        assert close(read.metrics, solo.metrics)
        assert read.metrics == run.metrics
        assert apart(read, solo) < 1e-12
        assert read.trajectory().keys() == solo.trajectory().keys()
    if model.startswith("deep"):
        assert {"balance_drift", "norm_drift", "descent_excess"} <= runs[0].final.keys()
        assert runs[0].trajectory()


def test_without_a_folder_the_runs_are_in_memory() -> None:
    def factory(seed: int) -> nn.Module:
        return mf.models.mlp(6, 5, 1, seed=seed + 100)

    runs = mf.train_seeds(factory, mf.load(DATA), seeds=3, **SMALL)
    assert [run.config["seed"] for run in runs] == [0, 1, 2]
    assert len({run.final["margin"] for run in runs}) == 3
    solo = mf.train(factory(1), mf.load(DATA), seed=1, **SMALL)
    assert runs[1].path is None
    assert close(runs[1].metrics, solo.metrics)
    for p in runs[1].load_model().parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


def test_one_seed_is_its_solo_run_to_the_bit() -> None:
    (run,) = mf.train_seeds("mlp:8", DATA, seeds=[5], **SMALL)
    assert run.metrics == mf.train("mlp:8", DATA, seed=5, **SMALL).metrics


def test_runs_that_share_a_pace_are_saved_at_the_same_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("marginflow.workflow._callbacks.time.monotonic", lambda: now)
    pace = Pace(2.0)
    now = 101.9
    assert not pace.due(3, measured=True)
    now = 102.1
    assert [pace.due(4, measured=True) for _ in range(3)] == [True] * 3
    assert not pace.due(5, measured=True)
    now = 131.0
    assert not pace.due(6, measured=False)
    now = 133.0
    assert [pace.due(7, measured=False) for _ in range(3)] == [True] * 3


def test_interrupted_seeds_go_on_together_or_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mf.train_seeds("mlp:8", DATA, seeds=3, **SMALL)
    take_step = SideBySide._take_step

    def interrupted(self: SideBySide, batch: int) -> None:
        take_step(self, batch)
        if self.trainers[0].step == 8:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SideBySide, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mf.train_seeds("mlp:8", DATA, seeds=3, **SMALL, out=tmp_path)
    monkeypatch.undo()
    for seed in range(3):
        assert mf.load_run(tmp_path / f"seed-{seed}").checkpoint().info["step"] == 8
    alone = mf.train("mlp:8", DATA, seed=1, **SMALL, out=tmp_path / "seed-1", resume=True)
    runs = mf.train_seeds("mlp:8", DATA, seeds=3, **SMALL, out=tmp_path, resume=True)
    assert runs[1].metrics == alone.metrics
    same_runs(whole, runs)
    longer = {**SMALL, "epochs": 9}
    # Seed 3 begins, those that are there go on from where they are.
    prolonged = mf.train_seeds("mlp:8", DATA, seeds=4, **longer, out=tmp_path, resume=True)
    same_runs(mf.train_seeds("mlp:8", DATA, seeds=4, **longer), prolonged)


def test_a_seed_that_diverges_is_named_and_the_others_are_finished(tmp_path: Path) -> None:
    def factory(seed: int) -> nn.Module:
        model = mf.models.mlp(6, 8, 1, seed=seed)
        if seed == 1:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(100)
        return model

    options = {**SMALL, "loss": "exponential"}
    with pytest.raises(DivergedError, match=r"1 of 3 seeds diverged.*seed 1: .*last good") as error:
        mf.train_seeds(factory, DATA, seeds=3, **options, out=tmp_path)
    assert "seed-1" in str(error.value)
    for seed in (0, 2):
        assert mf.load_run(tmp_path / f"seed-{seed}").final["epoch"] == 6
    assert mf.load_run(tmp_path / "seed-1").final["epoch"] == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lr": "loss-based:a=0.1"}, "learning rate loss-based"),
        ({"engine": "autograd"}, "autograd engine"),
        ({"derivative": "total"}, "autograd engine"),
        ({"attack": "pgd-l2:eps=0.1,steps=2,random=true"}, "ℓ2 ball"),
        ({"model": "mlp:700,700"}, "gain nothing"),
    ],
    ids=["rate", "engine", "total", "random-start", "large"],
)
def test_elsewhere_the_seeds_run_one_after_the_other(
    options: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**SMALL, "dtype": "float32", "epochs": 2, **options}
    model = options.pop("model", "mlp:8")
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        runs = mf.train_seeds(model, DATA, seeds=2, **options)
    (line,) = caplog.messages
    assert line.startswith("the seeds are trained one after the other: ")
    assert why in line
    for seed, run in enumerate(runs):
        assert run.metrics == mf.train(model, DATA, seed=seed, **options).metrics


def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    train: Any = mf.train_seeds
    for seeds, wrong in (([], "seeds"), ([1, 1], "different seeds"), (0, "seeds"), ([-1], "seeds")):
        with pytest.raises(InputError, match=wrong):
            train("mlp:8", DATA, seeds=seeds, out=tmp_path / "x")
    with pytest.raises(InputError, match="got a network"):
        train(mf.models.mlp(6, 8, 1), DATA)
    with pytest.raises(InputError, match="not for several seeds"):
        train("mlp:8", DATA, seed=3)
    with pytest.raises(SpecificationError, match="did you mean 'epochs'"):
        train("mlp:8", DATA, epoch=3)
    with pytest.raises(InputError, match="exclude"):
        train("mlp:8", DATA, out=tmp_path, resume=True, force=True)
    with pytest.raises(InputError, match="out"):
        train("mlp:8", DATA, resume=True)
    with pytest.raises(RunError, match="no run"):
        train("mlp:8", DATA, out=tmp_path / "x", resume=True)
    mf.train("mlp:8", DATA, **SMALL, seed=1, out=tmp_path / "y" / "seed-1")
    with pytest.raises(RunError, match="already holds a run"):
        train("mlp:8", DATA, seeds=2, out=tmp_path / "y")
    with pytest.raises(RunError, match="the run of one seed"):
        train("mlp:8", DATA, seeds=2, out=tmp_path / "y" / "seed-1")
    assert not (tmp_path / "x").exists()
    assert [p.name for p in (tmp_path / "y").iterdir()] == ["seed-1"]
