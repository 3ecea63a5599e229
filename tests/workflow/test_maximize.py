"""``mf.maximize`` as its users call it."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import marginflow as mf
from marginflow.ascent import Ascent
from marginflow.errors import (
    DataError,
    DivergedError,
    InputError,
    ModelError,
    NotHomogeneousError,
    RunError,
)
from marginflow.training import Callback, Trainer
from stopping import CrashAt, InterruptAt

DATA = "separable:n=24,d=6,margin=0.3"
SMALL: dict[str, Any] = {"attack": "fgsm:eps=0.05", "batch_size": 5, "epochs": 8}
METHODS = ("spheres", "polish", "steepest:norm=adam", "relative")
DIGITS: dict[str, Any] = {"data": "digits:3,8", "attack": "fgsm:eps=0.1"}


def weights_of(run: mf.Run) -> dict[str, torch.Tensor]:
    return dict(run.load_model().state_dict())


def assert_same_weights(one: mf.Run, other: mf.Run) -> None:
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_margins_become_larger_than_those_of_a_training() -> None:
    """Issue and docs: the same task, a third of the epochs, at least twice the margin."""
    trained = mf.train("mlp:256,32", **DIGITS, lr=0.1, batch_size=32, epochs=200)
    found = mf.maximize("mlp:256,32", **DIGITS, epochs=60)
    assert trained.final["adversarial_accuracy"] == found.final["adversarial_accuracy"] == 1.0
    assert trained.final["normalized_margin"] > 0
    assert found.final["normalized_margin"] > 2 * trained.final["normalized_margin"]


def test_the_result_is_in_the_model_and_in_the_run(tmp_path: Path) -> None:
    data = mf.load(DATA)
    model = mf.models.mlp(6, 8, 1, seed=1).double()
    pinned = list(model.parameters())
    for parameter in pinned:
        parameter.grad = torch.ones_like(parameter)
    model.eval()
    before = torch.get_rng_state()
    run = mf.maximize(model, data, **SMALL, out=tmp_path / "run")
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert all(a is b for a, b in zip(pinned, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in pinned)
    assert run.model is model
    measured = mf.adversarial_margins(model, data.x, data.y, mf.attacks.FGSM(0.05))
    assert run.final["normalized_margin"] == measured.normalized_min
    read = mf.load_run(tmp_path / "run")
    assert read.metrics == run.metrics
    assert read.config["kind"] == "maximize"
    assert read.config["from"] is None
    assert_same_weights(run, read)
    for norm in run.final["layer_norms"]:
        assert norm == pytest.approx(1.0, abs=1e-12)


class Spoil(Callback):
    """Turns the network around after an epoch: the margins after it are no better than before."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.before: dict[str, torch.Tensor] = {}

    def on_epoch(self, trainer: Trainer) -> None:
        if trainer.epoch == self.epoch - 1:
            self.before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
        if trainer.epoch == self.epoch:
            with torch.no_grad():
                next(trainer.model.parameters()).neg_()


def test_the_best_weights_are_kept_and_said_to_be(tmp_path: Path) -> None:
    spoil = Spoil(8)
    run = mf.maximize("mlp:8", DATA, **SMALL, callbacks=[spoil], out=tmp_path / "run")
    margins = [r["normalized_margin"] for r in run.metrics[:-1]]
    assert run.final["best_epoch"] == run.metrics[margins.index(max(margins))]["epoch"] < 8
    assert run.final["epoch"] == 8
    assert run.final["normalized_margin"] == max(margins)
    if run.final["best_epoch"] == 7:
        assert all(torch.equal(v, spoil.before[n]) for n, v in weights_of(run).items())
    assert_same_weights(run, mf.load_run(tmp_path / "run"))
    assert mf.load_run(tmp_path / "run").final == run.final


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_at", [3, 20, 38])
def test_a_resumed_run_has_the_very_bits(tmp_path: Path, method: str, stop_at: int) -> None:
    """After Ctrl-C in the middle of an epoch, and after a crash that writes nothing more."""
    options = {**SMALL, "attack": "pgd-linf:eps=0.05,steps=2,step=0.04,random=true"}
    options["method"] = method
    whole = mf.maximize("mlp:8", DATA, **options, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        mf.maximize(
            "mlp:8", DATA, **options, out=tmp_path / "cut", callbacks=[InterruptAt(stop_at)]
        )
    later = min(stop_at + 4, 39)
    with pytest.raises(InterruptedError):
        mf.maximize(
            "mlp:8", DATA, **options, out=tmp_path / "cut", resume=True, callbacks=[CrashAt(later)]
        )
    again = mf.maximize("mlp:8", DATA, **options, out=tmp_path / "cut", resume=True)
    bytes_of = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert bytes_of[0] == bytes_of[1]
    assert_same_weights(whole, again)
    assert_same_weights(whole, mf.load_run(tmp_path / "cut"))


def test_resuming_keeps_the_settings(tmp_path: Path) -> None:
    mf.maximize("mlp:8", DATA, **SMALL, out=tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    changes: list[dict[str, Any]] = [
        {"epochs": 9}, {"method": "polish"}, {"seed": 1}, {"attack": "fgsm:eps=0.06"}
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(RunError, match=f"other settings.*{next(iter(change))}"):
            mf.maximize("mlp:8", DATA, **{**SMALL, **change}, out=tmp_path / "run", resume=True)
    with pytest.raises(RunError, match=r"not a training; continue it with mf\.maximize"):
        mf.train("mlp:8", DATA, attack="fgsm:eps=0.05", out=tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="already"):
        mf.maximize("mlp:8", DATA, **SMALL, out=tmp_path / "run")
    done = mf.maximize("mlp:8", DATA, **SMALL, out=tmp_path / "run", resume=True)
    assert done.final["epoch"] == 8
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_seed_decides_in_every_process() -> None:
    one, other = (mf.maximize("mlp:8", DATA, **SMALL, seed=s) for s in (3, 4))
    assert one.metrics != other.metrics
    code = (
        "import json, torch, marginflow as mf; torch.set_num_threads(1); torch.manual_seed(99)\n"
        f"run = mf.maximize('mlp:8', {DATA!r}, **{SMALL!r}, seed=3)\n"
        "print(json.dumps(run.metrics))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert json.loads(found.stdout) == one.metrics


def test_polishing_a_trained_run(tmp_path: Path) -> None:
    trained = mf.train(
        "mlp:16", DATA, attack="fgsm:eps=0.05", lr=0.5, epochs=300, out=tmp_path / "trained"
    )
    assert trained.final["adversarial_accuracy"] == 1.0
    options: dict[str, Any] = {**SMALL, "method": "polish", "start": tmp_path / "trained"}
    options["epochs"] = 60
    run = mf.maximize("mlp:16", DATA, **options, strict=True, out=tmp_path / "polished")
    margin = trained.final["normalized_margin"]
    assert run.metrics[0]["normalized_margin"] == pytest.approx(margin, rel=1e-5)
    assert run.final["normalized_margin"] > margin
    assert run.config["warm_up"] is False
    origin = run.config["from"]
    assert (origin["run"], origin["step"]) == ("trained", 300)
    in_memory = mf.maximize("mlp:16", DATA, **{**options, "start": trained})
    assert in_memory.metrics == run.metrics
    assert in_memory.config["from"] == origin
    # A polish too rough to gain anything gives back what it was given.
    rough = mf.maximize("mlp:16", DATA, **{**options, "method": "polish:angle=1..1", "epochs": 2})
    assert rough.final["best_epoch"] == 0
    assert rough.final["normalized_margin"] == rough.metrics[0]["normalized_margin"]
    # The same weights without their name.
    model = trained.load_model()
    plain = mf.maximize(model, DATA, **{**options, "start": None}, out=tmp_path / "plain")
    assert plain.metrics == run.metrics


def test_a_run_that_began_with_another_is_resumed_without_it(tmp_path: Path) -> None:
    first = mf.train("mlp:8", DATA, attack="fgsm:eps=0.05", lr=0.3, epochs=20)
    options = {**SMALL, "method": "polish:hard=0.5"}
    whole = mf.maximize("mlp:8", DATA, **options, start=first, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        mf.maximize(
            "mlp:8", DATA, **options, start=first, out=tmp_path / "cut", callbacks=[InterruptAt(17)]
        )
    with pytest.raises(RunError, match=r"other settings.*from"):
        mf.maximize("mlp:8", DATA, **options, start=whole, out=tmp_path / "cut", resume=True)
    again = mf.maximize("mlp:8", DATA, **options, out=tmp_path / "cut", resume=True)
    assert again.metrics == whole.metrics
    assert again.config["from"] == whole.config["from"]
    assert_same_weights(whole, again)


def test_polish_says_that_data_are_not_separated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = "fgsm:eps=0.2"
    message = r"polish: \d+ of 24 adversarial margins are not positive at the start \(γ̂_m = -"
    with pytest.raises(InputError, match=message + r".*; train first, use method='spheres'"):
        mf.maximize(
            "mlp:8", DATA, wide, method="polish", epochs=4, strict=True, out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        run = mf.maximize("mlp:8", DATA, wide, method="polish", epochs=4, out=tmp_path / "run")
    (record,) = caplog.records
    assert "a warm-up comes first" in record.getMessage()
    assert run.config["warm_up"] is True
    assert run.config["method"].startswith("polish:")
    # Nothing is said, or warmed up again, where a run is resumed.
    caplog.clear()
    again = mf.maximize(
        "mlp:8", DATA, wide, method="polish", epochs=4, out=tmp_path / "run", resume=True
    )
    assert not caplog.records
    assert again.metrics == run.metrics


def test_several_classes() -> None:
    run = mf.maximize("mlp:32", "digits:0,1,2", "fgsm:eps=0.05", epochs=10, seed=1)
    assert run.config["loss"] == "cross-entropy"
    assert run.final["normalized_margin"] > run.metrics[0]["normalized_margin"]
    assert run.final["adversarial_accuracy"] > 0.9


def test_loss_based_is_an_ordinary_training() -> None:
    run = mf.maximize("mlp:8", DATA, "fgsm:eps=0.05", method="loss-based", epochs=30)
    trained = mf.train("mlp:8", DATA, attack="fgsm:eps=0.05", lr="loss-based", epochs=30)
    assert run.config["kind"] == "train"
    assert run.metrics == trained.metrics
    with pytest.raises(InputError, match="start: method 'loss-based' is an ordinary training"):
        mf.maximize("mlp:8", DATA, method="loss-based", start=trained)


@pytest.mark.parametrize(("method", "gap"), [("dual", 1e-5), ("normalized", 2e-2)])
def test_one_linear_layer(method: str, gap: float, tmp_path: Path) -> None:
    model = mf.models.deep_linear(6, 1, seed=0)
    norm = float(model.state_dict()[next(iter(model.state_dict()))].norm())
    run = mf.maximize(
        model,
        DATA,
        "fgm:eps=0.1",
        method=f"{method}:gap={gap}",
        epochs=10_000,
        out=tmp_path / "run",
    )
    best = mf.references.max_margin(
        *(t.double().numpy() for t in (mf.load(DATA).x, mf.load(DATA).y))
    )
    # The ℓ2 adversary takes ε of every margin (Eq. 10).
    assert run.final["normalized_margin"] == pytest.approx(best.margin - 0.1, rel=1.1 * gap)
    assert run.final["duality_bound"] >= (best.margin - 0.1) * (1 - 1e-6)
    assert run.final["converged"] is True
    assert run.final["duality_gap"] <= gap
    assert run.final["norm_product"] == pytest.approx(norm, rel=1e-6)
    assert mf.load_run(tmp_path / "run").final == run.final
    assert_same_weights(run, mf.load_run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("model", "data", "attack", "error", "message"),
    [
        (
            "mlp:8",
            DATA,
            "fgm:eps=0.1",
            ModelError,
            r"method='spheres' takes any homogeneous network",
        ),
        (
            "deep-linear:4",
            DATA,
            "fgm:eps=0.1",
            ModelError,
            r"one linear layer with one output, got 2",
        ),
        ("deep-linear", "digits:0,1,2", None, DataError, r"labels −1 and \+1: choose two classes"),
        ("deep-linear", DATA, "fgm:eps=0.1,objective=loss", InputError, r"exact"),
        ("deep-linear", DATA, "pgd-linf:eps=0.1,steps=2,random=true", InputError, r"exact"),
        (
            "deep-linear",
            DATA,
            "fgm:eps=5",
            DataError,
            r"not separable under l2 .*eps = 5.*reduce eps",
        ),
    ],
)
def test_what_dual_refuses(
    model: str, data: str, attack: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        mf.maximize(model, data, attack, method="dual", epochs=500, out=tmp_path / "run")
    print(caught.value)
    assert not (tmp_path / "run").exists()


def test_dual_is_not_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "dual", "epochs": 50, "out": tmp_path / "run"}
    mf.maximize("deep-linear", DATA, **options)
    with pytest.raises(InputError, match=r"cannot be resumed.*begin anew, with force"):
        mf.maximize("deep-linear", DATA, **options, resume=True)


class Dead(nn.Module):
    """A network whose hidden units are off at every input."""

    def __init__(self) -> None:
        super().__init__()
        self.sided = False
        self.first = nn.Linear(6, 4, bias=False)
        self.second = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(-self.first.weight.abs())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.sided else x.abs()
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def zeroed() -> nn.Module:
    model = mf.models.mlp(6, 8, 1)
    with torch.no_grad():
        list(model.parameters())[1].zero_()
    return model


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), NotHomogeneousError, "bias"),
        (zeroed(), ModelError, r"3\.weight|norm 0|is 0"),
        (Dead(), ModelError, r"dead"),
        ("mlp:8", InputError, "batch_size"),
    ],
    ids=["biases", "zero layer", "dead", "batch size"],
)
def test_networks_that_cannot_be_used(
    model: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    size = 0 if isinstance(model, str) else 5
    with pytest.raises(error, match=message) as caught:
        mf.maximize(model, DATA, batch_size=size, epochs=2, out=tmp_path / "run")
    print(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tau", ["1e39..1e39", "1e300..1e308"])
def test_a_temperature_beyond_float32(tau: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "epochs": 3, "batch_size": 6}
    with pytest.raises(DivergedError, match=r"τ·margin overflows torch\.float32 at τ = .*float64"):
        mf.maximize("mlp:8", DATA, method=f"spheres:tau={tau}", **options, out=tmp_path / "run")
    weights = weights_of(mf.load_run(tmp_path / "run"))
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_a_high_temperature_is_no_overflow() -> None:
    """L underflows from τ γ̂ = 100 on; its logarithm does not, nor does the step break the network."""
    run = mf.maximize("mlp:8", DATA, method="spheres:tau=1..1e6", epochs=20, dtype="float32")
    assert run.final["adversarial_accuracy"] == 1.0
    assert run.final["normalized_margin"] > 0


def test_other_arguments() -> None:
    with pytest.raises(InputError, match=r"unknown method 'sfere'.*spheres"):
        mf.maximize("mlp:8", DATA, method="sfere")
    with pytest.raises(InputError, match="epochs"):
        mf.maximize("mlp:8", DATA, epochs=0)
    with pytest.raises(RunError, match="nowhere"):
        mf.maximize("mlp:8", DATA, start="nowhere")
    first = mf.train("mlp:9", DATA, epochs=1)
    with pytest.raises(ModelError, match="of another model"):
        mf.maximize("mlp:8", DATA, start=first)


def test_the_temperature_and_the_angle_are_recorded() -> None:
    run = mf.maximize("mlp:8", DATA, method="spheres:angle=0.02..0.001,tau=2..50", **SMALL)
    records = run.metrics[1:]
    angles = [r["learning_rate"] for r in records]
    assert angles == sorted(angles, reverse=True)
    assert 0.001 < angles[-1] < 0.02
    for r in records:
        share = (r["step"] - 1) / 40
        assert r["temperature"] * r["scale"] == pytest.approx(2 * 25**share, rel=1e-12)
        assert r["learning_rate"] == pytest.approx(0.02 * 0.05**share, rel=1e-12)
        assert r["log_time"] is None
    assert all(math.isfinite(r["epoch_loss"]) for r in records)


def test_a_network_that_is_dead_at_half_of_the_examples() -> None:
    """There is no scale in which to count the temperature."""
    data = mf.load(DATA)
    model = Dead().to(data.x.dtype)
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.weight[:, 0] = 1.0
    x = data.x.clone()
    x[:, 0] = -x[:, 0].abs()
    x[:8, 0] *= -1
    model.sided = True
    with pytest.raises(ModelError, match="half of the margins are 0 at the start: a dead network"):
        mf.maximize(model, (x, data.y), epochs=2)


def test_what_an_ascent_has_seen_at_its_end() -> None:
    """The margins of a last step at full batch are those of the weights before it."""
    before: list[torch.Tensor] = []
    data = mf.load(DATA)
    x = data.x.float()

    class Seen(Callback):
        def on_step(self, trainer: Trainer) -> None:
            assert isinstance(trainer, Ascent)
            if before:
                assert torch.equal(trainer.seen, before[-1])
            with torch.no_grad():
                before.append(trainer.model(x)[:, 0] * data.y)

        def on_end(self, trainer: Trainer) -> None:
            assert isinstance(trainer, Ascent)
            assert trainer.progress == 1.0

    mf.maximize("mlp:8", data, epochs=5, batch_size=24, engine="autograd", callbacks=[Seen()])
    assert len(before) == 5


def test_steepest_records_the_margin_in_its_own_norm() -> None:
    """m/‖W‖^K with max |w|, by hand; and a method that served before begins anew."""
    method = mf.ascent.build_method("steepest:norm=adam")
    data = mf.load("digits:3,8")
    runs = [
        mf.maximize("mlp:8", data, "fgsm:eps=0.05", method=method, epochs=2, seed=1)
        for _ in range(2)
    ]
    assert runs[0].metrics == runs[1].metrics
    assert runs[0].model is not None
    largest = max(float(p.detach().abs().max()) for p in runs[0].model.parameters())
    end = runs[0].final
    assert end["matching_margin"] == pytest.approx(end["margin"] / largest**2, rel=1e-12)
