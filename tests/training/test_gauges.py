"""Eq. (36) over thousands of steps, that its gauge can see a failure, and the gauge of Eq. (30)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import Derivative
from marginflow.engine import AutogradEngine
from marginflow.losses import get_loss
from marginflow.training import BalanceDrift, Callback, Descent, Trainer
from stopping import InterruptAt

DATA = "separable:n=20,d=6,margin=0.3"


def trained(
    *hidden: int,
    steps: int,
    attack: str | None = "exact-linear:p=2,eps=0.1",
    loss: str = "logistic",
    derivative: Derivative = "detached",
    extra: tuple[Callback, ...] = (),
    **options: Any,
) -> tuple[Trainer, BalanceDrift]:
    model = mf.models.deep_linear(6, *hidden, 1, seed=0).double()
    data = mf.load(DATA)
    engine = AutogradEngine(model, get_loss(loss), mf.attacks.build(attack), derivative)
    gauge = BalanceDrift(model)
    run = Trainer(
        engine,
        data,
        **{"lr": 0.05, "batch_size": None, "epochs": steps, **options},
        callbacks=(*extra, gauge),
    )
    run.run()
    return run, gauge


# Eq. (36)


def test_eq_36_over_ten_thousand_steps() -> None:
    run, gauge = trained(5, steps=10_000, attack="fgm:eps=0.1")
    drift = gauge.read()["balance_drift"]
    print(f"\nEq. 36 after 10⁴ steps: drift {drift:.1e}, ln L = {run.log_loss():.3f}")
    assert run.step == 10_000
    assert drift < 1e-11
    moved = float(torch.linalg.matrix_norm(gauge._sums[0]))
    assert moved > 1e-6  # what the η² terms correct is far above the tolerance


@pytest.mark.parametrize(
    ("attack", "loss", "derivative"),
    [
        ("exact-linear:p=2,eps=0.1", "exponential", "detached"),
        ("exact-linear:p=2,eps=0.1", "logistic", "total"),
        ("exact-linear:p=inf,eps=0.05", "logistic", "detached"),
        ("exact-linear:p=inf,eps=0.05", "exponential", "total"),
        ("fgsm:eps=0.05", "exponential", "detached"),
        ("fgsm:eps=0.05", "logistic", "total"),
        ("pgd-l2:eps=0.1,steps=2", "logistic", "detached"),
        ("pgd-l2:eps=0.1,steps=2", "exponential", "total"),
    ],
)
def test_eq_36_for_attacks_losses_and_derivatives(
    attack: str, loss: str, derivative: Derivative
) -> None:
    _, gauge = trained(5, 4, steps=1000, attack=attack, loss=loss, derivative=derivative)
    drift = gauge.read()["balance_drift"]
    print(f"\n{attack}, {loss}, {derivative}: {drift:.1e}")
    assert drift < 1e-12


@pytest.mark.parametrize("hidden", [(5,), (7, 3, 5)])
@pytest.mark.parametrize("batch_size", [None, 1, 6])
def test_eq_36_for_sgd_and_other_depths(hidden: tuple[int, ...], batch_size: int | None) -> None:
    epochs = {None: 500, 1: 50, 6: 200}[batch_size]
    run, gauge = trained(*hidden, steps=epochs, batch_size=batch_size, lr=0.1)
    drift = gauge.read()["balance_drift"]
    print(f"\nL = {len(hidden) + 1}, batch {batch_size}: {drift:.1e} after {run.step} steps")
    assert drift < 1e-12
    assert len(gauge._sums) == len(hidden)


def test_the_sums_are_those_of_numpy() -> None:
    """One example a step, gradients written out; the gauge's sums against the oracle's."""
    steps: list[list[Tensor]] = []

    class Spy(Callback):
        def on_start(self, trainer: Trainer) -> None:
            steps.append([p.detach().clone() for p in trainer.model.parameters()])

        on_step = on_start

    _, gauge = trained(5, 4, steps=60, extra=(Spy(),), lr=0.1)
    data = mf.load(DATA)
    x, y = data.x.numpy(), data.y.numpy()
    sums = [np.zeros((5, 5)), np.zeros((4, 4))]
    for weights in steps[:-1]:
        a, b, c = (w.numpy() for w in weights)
        p = (c @ b @ a)[0]
        unit = p / np.linalg.norm(p)
        m = y * (x @ p) - 0.1 * np.linalg.norm(p)
        g = (-(1 / (1 + np.exp(m)))[:, None] * (y[:, None] * x - 0.1 * unit)).mean(axis=0)[None]
        one, two, three = (c @ b).T @ g, c.T @ g @ a.T, g @ (b @ a).T
        sums[0] += 0.01 * (two.T @ two - one @ one.T)
        sums[1] += 0.01 * (three.T @ three - two @ two.T)
    for found, expected in zip(gauge._sums, sums, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-16)


# The test can fail


class Push(Callback):
    """Breaks the rule that a callback leaves the weights alone."""

    def __init__(self, step: int, size: float) -> None:
        self.step = step
        self.size = size
        self.change = 0.0

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            below, above = (p.detach() for p in list(trainer.model.parameters())[:2])
            before = above.T @ above - below @ below.T
            above[1, 2] += self.size
            after = above.T @ above - below @ below.T
            self.change = float(torch.linalg.matrix_norm(after - before))


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_a_push_in_the_middle_is_seen_at_its_size(size: float) -> None:
    push = Push(500, size)
    run, gauge = trained(5, 4, steps=1000, extra=(push,))
    drift = gauge.read()["balance_drift"]
    largest = max(float(p.detach().square().sum()) for p in run.model.parameters())
    print(f"\na push of {size:g}: drift {drift:.2e}")
    assert drift > 1e-9 * size / 1e-6
    first = float(torch.linalg.matrix_norm(gauge._balances()[0] - gauge._start[0] - gauge._sums[0]))
    assert first == pytest.approx(push.change, rel=1e-6)
    assert drift >= first / largest * (1 - 1e-9)


def test_momentum_breaks_the_law_and_the_gauge_says_so() -> None:
    run, gauge = trained(5, 4, steps=200, momentum=0.5)
    drift = gauge.read()["balance_drift"]
    print(f"\nmomentum 0.5, measured all the same: drift {drift:.1e}")
    assert drift > 1e-6
    assert not BalanceDrift.fits(run)


def test_a_wrong_step_size_is_seen() -> None:
    class Wrong(BalanceDrift):
        def on_step(self, trainer: Trainer) -> None:
            rate, trainer.learning_rate = trainer.learning_rate, 1.01 * trainer.learning_rate
            super().on_step(trainer)
            trainer.learning_rate = rate

    model = mf.models.deep_linear(6, 5, 4, 1, seed=0).double()
    engine = AutogradEngine(model, get_loss("logistic"), None)
    gauge = Wrong(model)
    Trainer(engine, mf.load(DATA), lr=0.05, batch_size=None, epochs=300, callbacks=[gauge]).run()
    assert gauge.read()["balance_drift"] > 1e-9


# Where it is measured


def fits(model: nn.Module, **options: Any) -> bool:
    engine = AutogradEngine(model.double(), get_loss("logistic"), None)
    return BalanceDrift.fits(
        Trainer(engine, mf.load(DATA), **{"lr": 0.1, "batch_size": 5, "epochs": 1, **options})
    )


def frozen(layer: int) -> nn.Module:
    model = mf.models.deep_linear(6, 5, 4, 1, seed=0)
    list(model.parameters())[layer].requires_grad_(False)
    return model


def test_where_the_law_applies() -> None:
    assert fits(mf.models.deep_linear(6, 5, 1, seed=0))
    assert fits(mf.models.deep_linear(6, 5, 3, 1, seed=0), lr="lemma2", batch_size=None)
    assert not fits(mf.models.deep_linear(6, 1, seed=0))
    assert not fits(mf.models.deep_linear(6, 5, 1, seed=0), momentum=0.5)
    assert not fits(mf.models.deep_linear(6, 5, 1, seed=0), lr="loss-based")
    assert not fits(mf.models.mlp(6, 5, 1, seed=0))
    assert not fits(mf.models.diagonal_linear(6, 2, seed=0))
    assert not any(fits(frozen(layer)) for layer in range(3))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_network_with_a_frozen_layer_trains(layer: int) -> None:
    run = mf.train(frozen(layer).double(), DATA, lr=0.1, epochs=5)
    assert "balance_drift" not in run.final
    assert run.final["loss_rise"] < 0


# Across interruptions


@pytest.mark.parametrize(("batch_size", "stop_at"), [(None, 17), (6, 1), (6, 18), (6, 58)])
def test_the_gauges_survive_resuming_to_the_very_bits(
    tmp_path: Path, batch_size: int | None, stop_at: int
) -> None:
    options: dict[str, Any] = {
        "attack": "fgsm:eps=0.05", "lr": 0.3, "batch_size": batch_size, "epochs": 40,
        "dtype": "float64", "schedule": [3, 10, 25],
    }  # fmt: skip
    mf.train("deep-linear:5,4", DATA, **options, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        mf.train(
            "deep-linear:5,4",
            DATA,
            **options,
            out=tmp_path / "cut",
            callbacks=[InterruptAt(stop_at)],
        )
    run = mf.train("deep-linear:5,4", DATA, **options, out=tmp_path / "cut", resume=True)
    one, two = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert one == two
    assert 0 < run.final["balance_drift"] < 1e-13
    assert ("descent_excess" in run.final) == (batch_size is None)


# Eq. (30)


def test_the_descent_gauge_is_numpys() -> None:
    rows: list[tuple[float, float]] = []

    class Spy(Callback):
        def on_step(self, trainer: Trainer) -> None:
            square = sum(float(np.sum(g.numpy() ** 2)) for g in trainer.gradients)
            rows.append((trainer.step_loss, square))

    run, _ = trained(5, steps=40, extra=(Spy(),), lr=12.0, attack=None)
    gauge = Descent()
    again, _ = trained(5, steps=40, extra=(gauge,), lr=12.0, attack=None)
    engine = run.engine
    losses, squares = np.array(rows).T
    rises = np.diff(losses) / losses[:-1]
    excess = (np.diff(losses) + 6.0 * squares[:-1]) / losses[:-1]
    found = gauge.read()
    assert found["loss_rise"] == pytest.approx(rises.max(), rel=1e-13)
    assert found["descent_excess"] == pytest.approx(excess.max(), rel=1e-13)
    assert found["loss_rise"] > 0  # η = 12 is too long a step
    assert Descent.fits(again)
    assert not Descent.fits(Trainer(engine, run.data, lr=0.1, batch_size=5, epochs=1))
    assert not Descent.fits(
        Trainer(engine, run.data, lr=0.1, batch_size=None, epochs=1, momentum=0.5)
    )
    assert Descent().read() == {}


@pytest.mark.parametrize("model", ["deep-linear", "mlp:4"])
def test_a_loss_that_underflows_to_0_stops_no_training(model: str) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([1, 1])
    run = mf.train(model, (x, y), lr=1e5, epochs=8, dtype="float64")
    assert run.final["epoch_loss"] == 0.0
    assert run.final["log_loss"] < -745
    assert math.isfinite(run.final["descent_excess"])
