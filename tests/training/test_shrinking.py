"""Leaving examples out, against full training and naive sums over single examples."""

from __future__ import annotations

import math
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import Attack
from marginflow.engine import AutogradEngine, EngineName, build
from marginflow.errors import InputError
from marginflow.losses import get_loss
from marginflow.training import Callback, Shrinking, Trainer

FGSM = mf.attacks.FGSM(0.02)
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def spread(n: int = 60, dtype: torch.dtype = torch.float64) -> mf.Dataset:
    """Two separable classes, of which few examples lie near the boundary: 0.1 … 4 from it."""
    generator = torch.Generator().manual_seed(1)
    y = torch.ones(n, dtype=torch.int64)
    y[1::2] = -1
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    x[:, 0] = y * torch.linspace(0.1**0.5, 2, n, dtype=torch.float64) ** 2
    return mf.Dataset(x.to(dtype), y)


def trainer(
    data: mf.Dataset,
    shrinking: Shrinking | None = None,
    attack: Attack | None = FGSM,
    engine: EngineName = "autograd",
    **options: Any,
) -> Trainer:
    model = mf.models.mlp(5, 16, 8, 1, seed=0).to(data.x.dtype)
    logistic = get_loss("logistic")
    worker = build(model, logistic, attack, shape=data.shape, batch_size=8, engine=engine)
    settings = {"lr": 1.0, "batch_size": 8, "epochs": 200, **options}
    return Trainer(worker, data, shrinking=shrinking, **settings)


def weights(of: Trainer) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in of.model.parameters()])


def distance(a: Trainer, b: Trainer) -> float:
    """‖W_a − W_b‖ / ‖W_b‖."""
    return float((weights(a) - weights(b)).norm() / weights(b).norm())


def single(of: Trainer) -> tuple[list[float], list[float]]:
    """``|ℓ′(z_i)|`` of the loss as it is written on paper, and how far an epoch's step of the example
    moves a layer at most, relative to its norm: by autograd, one example at a time."""
    weights, moves = [], []
    layers = list(of.model.parameters())
    norms = [float(w.detach().norm()) for w in layers]
    for x, y in zip(of.data.x, of.data.y, strict=True):
        x, y = x.unsqueeze(0), y.unsqueeze(0)
        if of.engine.attack is not None:
            x = x + of.engine.attack(of.model, x, y).delta
        z = (of.model(x).squeeze(1) * y).sum()
        slope = 1 / (1 + math.exp(float(z.detach())))
        gradients = torch.autograd.grad(z, layers)
        far = max(float(g.norm()) / w for g, w in zip(gradients, norms, strict=True))
        weights.append(slope)
        moves.append(of.rate.rate(of) / of.batch_size * slope * far)
    return weights, moves


class Checked(Shrinking):
    """Sums the weights itself, one by one, before and after each examination."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.before: list[tuple[float, float]] = []
        self.after: list[tuple[float, float]] = []
        self.counts: list[int] = []

    def sums(self, trainer: Trainer) -> tuple[float, float]:
        """The share and the movement of those left out."""
        weights, moves = single(trainer)
        if self.kept is None:
            return 0.0, 0.0
        out = (~self.kept).tolist()
        share = sum(w for w, o in zip(weights, out, strict=True) if o) / sum(weights)
        return share, sum(m for m, o in zip(moves, out, strict=True) if o)

    def examine(self, trainer: Trainer) -> None:
        self.before.append(self.sums(trainer))
        super().examine(trainer)
        found = self.before[-1][trainer.engine.name == "fused"]
        assert math.exp(self.log_share) == pytest.approx(found, rel=1e-3)
        self.after.append(self.sums(trainer))
        self.counts.append(self.left_out)


@pytest.mark.parametrize(
    ("dtype", "engine", "epochs"),
    [
        (torch.float32, "autograd", 120),
        (torch.float32, "fused", 120),
        (torch.float64, "fused", 400),
    ],
)
def test_the_bound_holds_and_the_path_is_that_of_full_training(
    dtype: torch.dtype, engine: EngineName, epochs: int
) -> None:
    data, theta = spread(dtype=dtype), UNIT[dtype]
    shrinking = Checked(longest=16)
    shrunk = trainer(data, shrinking, engine=engine, epochs=epochs)
    shrunk.run()
    full = trainer(data, engine=engine, epochs=epochs)
    full.run()
    limits = (2**-10, theta) if engine == "fused" else (theta, math.inf)
    for share, movement in shrinking.after:
        assert share <= limits[0] * math.exp(-2) * 1.001
        assert movement <= limits[1] * math.exp(-2) * 1.001
    assert all(s <= limits[0] and m <= limits[1] for s, m in shrinking.before)
    assert shrinking.violations == 0
    assert max(shrinking.counts) > data.n // 4, "many are left out, or nothing is shown"
    # Initial weights that differ by a rounding end 13 to 44 roundings apart.
    assert distance(shrunk, full) < 40 * theta
    assert (shrunk.step, shrunk.log_time) == (full.step, full.log_time)
    assert shrunk.epoch_loss == pytest.approx(full.epoch_loss, rel=100 * theta)
    assert shrunk.epoch_accuracy == full.epoch_accuracy == 1


def test_a_bound_that_is_exceeded_is_counted_and_answered() -> None:
    class Watched(Checked):
        def examine(self, trainer: Trainer) -> None:
            slack = self._slack
            super().examine(trainer)
            if self.before[-1][0] > 0.2:
                answers.append((self.interval, self._slack - slack))

    answers: list[tuple[int, float]] = []
    shrinking = Watched(theta=0.2, slack=0.0)  # weights that grow at all exceed it
    trainer(spread(), shrinking, epochs=80).run()
    assert shrinking.violations == len(answers) > 0
    assert all(interval == 1 and more >= 1 for interval, more in answers)
    assert max(share for share, _ in shrinking.after) <= 0.2


def test_a_jump_of_the_loss_is_followed_by_an_examination() -> None:
    shrinking = Shrinking()
    run = trainer(spread(dtype=torch.float32), shrinking, engine="fused", epochs=120)
    run.run()
    assert shrinking.left_out > 0
    assert shrinking.next > run.epoch
    last, run.epoch_loss = run.epoch_loss, 1.9 * run.epoch_loss
    shrinking.end_epoch(run)
    assert shrinking.next > run.epoch
    run.epoch_loss = 4 * last
    shrinking.end_epoch(run)
    assert shrinking.next == run.epoch


class Given(Shrinking):
    """Leaves out the examples at 0, where a homogeneous network has no gradient, at once and for good."""

    def begin_epoch(self, trainer: Trainer) -> None:
        data = trainer.data
        self.kept = data.x.abs().sum(dim=1) > 0
        self._losses = torch.full((data.n,), math.log(2.0), dtype=torch.float64)


@pytest.mark.parametrize("engine", ["autograd", "fused"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [3, None])
def test_leaving_out_examples_without_gradient_changes_nothing(
    engine: EngineName, momentum: float, batch_size: int | None
) -> None:
    data = spread(40)
    data.x[8:] = 0
    options: dict[str, Any] = {"epochs": 8, "lr": 0.1, "momentum": momentum}
    options |= {"batch_size": batch_size, "attack": None, "engine": engine}
    steps: list[int] = []
    gradients: list[float] = []

    class Seen(Callback):
        def on_step(self, trainer: Trainer) -> None:
            steps.append(trainer.step)
            gradients.append(sum(float(g.abs().sum()) for g in trainer.gradients))

    shrunk = trainer(data, Given(), **options, callbacks=[Seen()])
    shrunk.run()
    full = trainer(data, **options)
    full.run()
    assert distance(shrunk, full) < 1e-14
    assert steps == list(range(1, 8 * shrunk.steps_per_epoch + 1))
    assert (0.0 in gradients) == (batch_size is not None), "batches of which nobody is left"
    assert shrunk.log_time == full.log_time
    assert shrunk.epoch_loss == pytest.approx(full.epoch_loss, rel=1e-14)
    assert shrunk.step_loss == pytest.approx(full.step_loss, rel=1e-14)


class Stop(Callback):
    """Keeps the state after a step, and ends the training as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGINT)

    def on_interrupt(self, trainer: Trainer) -> None:
        assert trainer.step == self.step
        self.found = trainer.state()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("stop_at", [8 * 70, 8 * 80 + 3])
def test_restored_state_gives_the_very_bits(momentum: float, stop_at: int) -> None:
    attack = mf.attacks.PGD("linf", 0.02, steps=1, random_start=True)
    options: dict[str, Any] = {"attack": attack, "epochs": 90, "momentum": momentum}
    options |= {"engine": "fused", "lr": 1 - momentum}
    data = spread(dtype=torch.float32)
    through = trainer(data, Shrinking(theta=1e-3), **options)
    through.run()
    stop = Stop(stop_at)
    with pytest.raises(KeyboardInterrupt):
        trainer(data, Shrinking(theta=1e-3), **options, callbacks=[stop]).run()
    rest = trainer(data, Shrinking(theta=1e-3), **options)
    rest.restore(stop.found)
    rest.run()
    assert torch.equal(weights(through), weights(rest))
    assert through.shrinking is not None
    assert rest.shrinking is not None
    assert through.shrinking.left_out > 0
    assert through.shrinking.record() == rest.shrinking.record()
    assert (through.step, through.epoch_loss) == (rest.step, rest.epoch_loss)


def test_nobody_is_left_out_before_all_are_fitted() -> None:
    data = spread()
    data.y[0] = -data.y[0]
    data.x[0, 0] = 2.0 * data.y[1]
    shrinking = Shrinking(theta=0.5, least=0.0)
    run = trainer(data, shrinking, lr=0.01, epochs=20)
    run.run()
    assert run.epoch_accuracy < 1
    assert shrinking.examinations == shrinking.left_out == 0


def test_refuses_what_it_cannot_serve() -> None:
    data = spread()
    with pytest.raises(InputError, match=r"undoes no epoch, got lr='loss-based:"):
        trainer(data, Shrinking(), lr="loss-based:a=0.1")
    for layer in (nn.BatchNorm1d(5), nn.Dropout(0.5)):
        model = nn.Sequential(layer, nn.Linear(5, 1, bias=False)).double()
        engine = AutogradEngine(model, get_loss("logistic"), None)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(InputError, match="does not depend on the rest of its batch"):
            Trainer(engine, data, lr=0.1, batch_size=8, epochs=1, shrinking=Shrinking())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    options: list[tuple[dict[str, Any], str]] = [
        ({"theta": 1.0}, "theta: expected a number below 1"),
        ({"theta": 0.0}, "theta: expected a number above 0"),
        ({"longest": 0}, "longest: expected a whole number of at least 1"),
        ({"slack": -1.0}, "slack: expected a number of at least 0"),
    ]
    for given, message in options:
        with pytest.raises(InputError, match=message):
            Shrinking(**given)
