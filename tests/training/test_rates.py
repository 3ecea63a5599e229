"""Learning rates: the radius rule and descent of Lemma 2, the bookkeeping of the loss-based rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp
from torch import Tensor

import marginflow as mf
from marginflow.engine import AutogradEngine
from marginflow.errors import InputError, ModelError, SpecificationError
from marginflow.losses import get_loss
from marginflow.runs import RunDirectory
from marginflow.training import (
    Callback,
    Constant,
    Lemma2,
    LossBased,
    Trainer,
    build_rate,
    printed_smoothness,
    smoothness,
)
from stopping import CrashAt, InterruptAt

DATA = "separable:n=20,d=6,margin=0.3"
EXACT = "exact-linear:p=2,eps=0.1"


def deep(*hidden: int, features: int = 6, seed: int = 0) -> torch.nn.Module:
    return mf.models.deep_linear(features, *hidden, 1, seed=seed).double()


def trainer(model: torch.nn.Module, data: mf.Dataset, **options: Any) -> Trainer:
    attack = mf.attacks.build(options.pop("attack", EXACT))
    engine = AutogradEngine(model, get_loss(options.pop("loss", "logistic")), attack)
    return Trainer(engine, data, **{"batch_size": None, "epochs": 50, **options})


def numpy_loss_and_gradients(
    weights: list[np.ndarray], x: np.ndarray, y: np.ndarray, eps: float, loss: str
) -> tuple[float, list[np.ndarray]]:
    """L = (1/n) Σ ℓ(y_i⟨p, x_i⟩ − ε‖p‖₂) and its gradients, by the chain rule on p = W_L ⋯ W_1."""
    product = weights[0]
    for w in weights[1:]:
        product = w @ product
    p = product[0]
    size = np.linalg.norm(p)
    m = y * (x @ p) - eps * size
    values = np.exp(-m) if loss == "exponential" else np.logaddexp(0, -m)
    slopes = -np.exp(-m) if loss == "exponential" else -expit(-m)
    g = np.mean(slopes[:, None] * (y[:, None] * x - eps * p / size), axis=0)
    gradients = []
    for k in range(len(weights)):
        before, after = np.eye(len(p)), np.eye(1)
        for w in weights[:k]:
            before = w @ before
        for w in reversed(weights[k + 1 :]):
            after = after @ w
        gradients.append(after.T @ g[None] @ before.T)
    return float(values.mean()), gradients


class Trace(Callback):
    """Everything after each step and each epoch."""

    def __init__(self) -> None:
        self.weights: list[list[np.ndarray]] = []
        self.states: list[dict[str, float]] = []
        self.rates: list[float] = []
        self.times: list[float] = []
        self.bits: list[list[Tensor]] = []

    def note(self, trainer: Trainer) -> None:
        bits = [p.detach().clone() for p in trainer.model.parameters()]
        self.bits.append(bits)
        self.weights.append([b.numpy() for b in bits])
        self.states.append(dict(trainer.rate.state))
        self.rates.append(trainer.learning_rate)
        self.times.append(trainer.log_time)

    def on_start(self, trainer: Trainer) -> None:
        self.note(trainer)


class Steps(Trace):
    def on_step(self, trainer: Trainer) -> None:
        self.note(trainer)


class Epochs(Trace):
    def on_epoch(self, trainer: Trainer) -> None:
        self.note(trainer)


def numpy_log_loss(
    weights: list[np.ndarray], x: np.ndarray, y: np.ndarray, eps: float, loss: str
) -> float:
    """ln L where L itself has underflowed."""
    p = weights[0]
    for w in weights[1:]:
        p = w @ p
    m = y * (x @ p[0]) - eps * np.linalg.norm(p)
    logs = -m
    if loss == "logistic":
        logs = np.where(m > 37, -m, np.log(np.logaddexp(0, -np.minimum(m, 37))))
    return float(logsumexp(logs)) - math.log(len(y))


# Lemma 2


@pytest.mark.parametrize(
    ("hidden", "eps", "constant", "scale", "steps"),
    [
        ((), 0.1, "corrected", 1.0, 200),
        ((5,), 0.0, "corrected", 1.0, 300),
        ((5,), 0.1, "corrected", 0.2, 300),
        ((5, 4), 0.2, "corrected", 1.0, 300),
        ((5, 4), 0.05, "corrected", 0.02, 200),  # data so small that η = 1
        ((5, 4), 0.1, "printed", 1.0, 60),
    ],
)
def test_lemma_2_to_the_letter(
    hidden: tuple[int, ...], eps: float, constant: str, scale: float, steps: int
) -> None:
    """η, r, μ and W ∈ S(r) at every step; Eq. (30) with loss and gradients computed by numpy."""
    data = mf.load(DATA)
    data = mf.Dataset(data.x * scale, data.y)
    eps *= scale
    path, model = Steps(), deep(*hidden)
    run = trainer(
        model,
        data,
        attack=f"exact-linear:p=2,eps={eps!r}" if eps else None,
        lr=f"lemma2:constant={constant}",
        epochs=steps,
        callbacks=[path],
    )
    run.run()
    x, y = data.x.numpy(), data.y.double().numpy()
    depth, reach = len(hidden) + 1, float(np.linalg.norm(x, axis=1).max()) + eps
    low = path.states[0]["floor"]
    assert low == pytest.approx(
        np.linalg.norm(np.linalg.multi_dot([*reversed(path.weights[0]), np.eye(6)])) / 2
    )

    def eta(r: float) -> float:
        beta = (
            smoothness(depth, r, low, eps, data_norm=reach - eps)
            if constant == "corrected"
            else printed_smoothness(depth, r, low, eps)
        )
        return min(1.0, 1 / beta)

    grown = 0
    for t in range(steps):
        r = path.states[t]["radius"]
        assert path.rates[t + 1] == pytest.approx(eta(r), rel=1e-14)
        mu = r ** (depth - 1) * reach * eta(r)
        largest = max(float(np.linalg.norm(w)) for w in path.weights[t + 1])
        left = largest > r - mu
        grown += left
        assert path.states[t + 1]["radius"] == pytest.approx(r + mu if left else r, rel=1e-14)
        assert max(float(np.linalg.norm(w)) for w in path.weights[t]) <= r - mu  # in S(r − μ)
        assert largest <= r  # one step does not leave S(r)
        before, gradients = numpy_loss_and_gradients(path.weights[t], x, y, eps, "logistic")
        after, _ = numpy_loss_and_gradients(path.weights[t + 1], x, y, eps, "logistic")
        square = sum(float(np.sum(g * g)) for g in gradients)
        assert after - before + eta(r) / 2 * square <= 1e-15 * before
    print(f"\nL = {depth}, {constant}: η = {path.rates[-1]:.3g}, r grew {grown} times")
    if constant == "corrected" and scale == 1.0 and depth > 1:
        assert grown > 0
    assert run.rate.state["below_floor"] == 0


def test_steps_below_the_floor_are_counted() -> None:
    run = trainer(deep(5), mf.load(DATA), lr="lemma2:floor=3", epochs=20)
    run.run()
    assert run.rate.state["floor"] == 3.0
    assert run.rate.state["below_floor"] == 20


def test_lemma_2_never_lets_the_loss_rise_in_a_recorded_run() -> None:
    run = mf.train(deep(5, 4), DATA, attack=EXACT, lr="lemma2", epochs=400, schedule=[400])
    assert run.final["loss_rise"] < 0
    assert run.final["descent_excess"] < 0
    assert run.final["below_floor"] == 0
    big = mf.train(deep(5, 4), DATA, attack=EXACT, lr=30.0, epochs=40, schedule=[40])
    print(
        f"\nEq. 30: {run.final['descent_excess']:.2e}; at η = 30: {big.final['descent_excess']:.2e}"
    )
    assert big.final["descent_excess"] > 1e-3  # the gauge can see a failure


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 5}, "full-batch"),
        ({"momentum": 0.9}, "no momentum"),
        ({"loss": "exponential"}, "the logistic loss"),
        ({"attack": "fgsm:eps=0.1"}, "exact-linear:p=2, or none"),
        ({"attack": "exact-linear:p=inf,eps=0.1"}, "exact-linear:p=2, or none"),
    ],
)
def test_lemma_2_is_refused_outside_its_setting(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"lr lemma2: expected .*{words}"):
        trainer(deep(5), mf.load(DATA), lr="lemma2", **change)


def test_lemma_2_needs_a_deep_linear_network_away_from_0() -> None:
    with pytest.raises(ModelError, match="deep linear"):
        trainer(mf.models.mlp(6, 4, 1, seed=0).double(), mf.load(DATA), lr="lemma2", attack=None)
    zero = deep(5)
    with torch.no_grad():
        next(iter(zero.parameters())).zero_()
    with pytest.raises(InputError, match="product of the layers is 0"):
        trainer(zero, mf.load(DATA), lr="lemma2", attack=None).run()


# Loss-based


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
@pytest.mark.parametrize(("batch_size", "a"), [(None, 0.5), (8, 0.1), (8, 0.5)])
def test_undone_epochs_restore_the_very_bits(loss: str, batch_size: int | None, a: float) -> None:
    data, path = mf.load(DATA), Epochs()
    run = trainer(
        deep(5, 4), data, loss=loss, lr=f"loss-based:a={a},fall=1", batch_size=batch_size, epochs=120,
        callbacks=[path],
    )  # fmt: skip
    run.run()
    x, y = data.x.numpy(), data.y.double().numpy()
    undone = kept = 0
    for t in range(120):
        before, after = path.states[t], path.states[t + 1]
        same = all(torch.equal(a, b) for a, b in zip(path.bits[t], path.bits[t + 1], strict=True))
        if after["undone"] > before["undone"]:
            undone += 1
            assert same
            assert path.times[t + 1] == path.times[t]
            assert after["log_loss"] == before["log_loss"]
            assert after["a"] == before["a"] / 2 ** (1 / 10)
        else:
            kept += 1
            assert not same
            assert path.times[t + 1] > path.times[t]
            value = numpy_log_loss(path.weights[t + 1], x, y, 0.1, loss)
            assert after["log_loss"] == pytest.approx(value, rel=1e-11, abs=1e-11)
            fell = before["log_loss"] - after["log_loss"]
            assert fell > 0
            most = (1 if batch_size is None else 3) / fell
            assert after["a"] == before["a"] * min(2 ** (1 / 5), most)
    print(f"\n{loss}, batch {batch_size}: {kept} epochs kept, {undone} undone")
    assert min(kept, undone) >= 5


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
def test_the_clock_is_a_plain_sum(loss: str) -> None:
    """ln t = ln Σ a/L, with the losses of numpy, over the accepted epochs."""
    data, path = mf.load(DATA), Epochs()
    trainer(deep(5), data, loss=loss, lr="loss-based", epochs=60, callbacks=[path]).run()
    x, y = data.x.numpy(), data.y.double().numpy()
    total = 0.0
    for t in range(60):
        if path.states[t + 1]["undone"] == path.states[t]["undone"]:
            value, _ = numpy_loss_and_gradients(path.weights[t], x, y, 0.1, loss)
            total += path.states[t]["a"] / value
        found = path.times[t + 1]
        assert found == (-math.inf if total == 0 else pytest.approx(math.log(total), abs=1e-12))
    assert path.states[-1]["undone"] > 0


def test_the_clock_of_a_constant_rate_and_of_lemma_2() -> None:
    run = mf.train(deep(5), DATA, lr=0.03, epochs=70, batch_size=6, schedule=[70])
    assert run.final["log_time"] == pytest.approx(math.log(0.03 * 70 * 4), rel=1e-13)
    path = Steps()
    trainer(deep(5), mf.load(DATA), lr="lemma2", epochs=30, callbacks=[path]).run()
    assert path.times[-1] == pytest.approx(math.log(sum(path.rates[1:])), rel=1e-13)


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
def test_a_step_is_a_times_the_gradient_of_ln_l(loss: str) -> None:
    data, path = mf.load(DATA), Epochs()
    trainer(deep(5, 4), data, loss=loss, lr="loss-based:a=0.01", epochs=1, callbacks=[path]).run()
    value, gradients = numpy_loss_and_gradients(
        path.weights[0], data.x.numpy(), data.y.double().numpy(), 0.1, loss
    )
    assert path.states[1]["undone"] == 0
    for before, after, g in zip(path.weights[0], path.weights[1], gradients, strict=True):
        np.testing.assert_allclose(after, before - 0.01 * g / value, rtol=1e-12, atol=1e-15)


def test_it_goes_on_where_the_loss_underflows() -> None:
    run = mf.train(deep(5), DATA, lr="loss-based:fall=1", epochs=1200, schedule=[1000, 1200])
    earlier, final = run.metrics
    print(f"\nln L = {final['log_loss']:.1f}, ln t = {final['log_time']:.1f}")
    assert earlier["log_loss"] < -745  # below the smallest float64
    assert final["log_loss"] < earlier["log_loss"] - 100
    assert final["epoch_loss"] == 0.0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_does_not_run_away_on_an_acute_cone(depth: int) -> None:
    """Every step lowers the loss there, so nothing but the limit on the fall of ln L stops a."""
    data, hidden = mf.load("separable:n=8,d=3,margin=1.0"), (4,) * (depth - 1)
    run = mf.train(
        deep(*hidden, features=3), data, lr="loss-based:fall=1", epochs=600, schedule=[600]
    )
    fast = mf.train(
        deep(*hidden, features=3), data, lr="loss-based:fall=20", epochs=600, schedule=[600]
    )
    print(f"\nL = {depth}: ln L = {run.final['log_loss']:.1f}, {fast.final['log_loss']:.1f}")
    assert 300 < -run.final["log_loss"] < 700
    assert 3000 < -fast.final["log_loss"] < 14_000
    assert run.final["normalized_margin"] > 0.7


def test_without_the_limit_it_does() -> None:
    """The plain rule of Lyu & Li: here a doubles every fifth epoch until W overflows."""
    run = mf.train(
        deep(features=3), "separable:n=8,d=3,margin=1.0", lr="loss-based:fall=1e300", epochs=300,
        schedule=[300],
    )  # fmt: skip
    print(f"\nno limit: ln L = {run.final['log_loss']:.2e}, a = {run.final['a']:.2e}")
    assert run.final["log_loss"] < -1e15
    assert run.final["undone"] < 30


@pytest.mark.parametrize(
    ("batch_size", "stop_at", "how"),
    [
        (None, 36, CrashAt),
        (None, 20, InterruptAt),
        (8, 35, CrashAt),
        (8, 1, InterruptAt),
        (8, 35, InterruptAt),
        (8, 52, InterruptAt),
    ],
)
def test_a_resumed_run_has_the_very_bits(
    tmp_path: Path, batch_size: int | None, stop_at: int, how: type[CrashAt | InterruptAt]
) -> None:
    options: dict[str, Any] = {
        "attack": EXACT, "lr": "loss-based:a=0.5", "batch_size": batch_size,
        "epochs": 60 if batch_size is None else 24, "schedule": [0, 5, 12, 18, 23],
        "dtype": "float64",
    }  # fmt: skip
    whole = mf.train("deep-linear:5,4", DATA, **options, out=tmp_path / "whole")
    assert 0 < whole.final["undone"] < options["epochs"]
    with pytest.raises((InterruptedError, KeyboardInterrupt)):
        mf.train("deep-linear:5,4", DATA, **options, out=tmp_path / "cut", callbacks=[how(stop_at)])
    checkpoint = RunDirectory(tmp_path / "cut").latest_checkpoint()
    assert checkpoint is not None
    assert (checkpoint.info["batch"] > 0) == (how is InterruptAt and batch_size == 8)
    mf.train("deep-linear:5,4", DATA, **options, out=tmp_path / "cut", resume=True)
    one, two = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert one == two
    runs = [mf.load_run(tmp_path / name) for name in ("whole", "cut")]
    for a, b in zip(*(run.load_model().parameters() for run in runs), strict=True):
        assert torch.equal(a, b)
    kept = [run.trajectory() for run in runs]
    assert list(kept[0]) == list(kept[1])
    for step in kept[0]:
        for name, value in kept[0][step].items():
            assert torch.equal(value, kept[1][step][name])


@pytest.mark.parametrize("stop_at", [3, 17, 29])
def test_lemma_2_resumes_to_the_very_bits(tmp_path: Path, stop_at: int) -> None:
    options: dict[str, Any] = {
        "attack": EXACT, "lr": "lemma2", "epochs": 30, "dtype": "float64", "schedule": [10, 20],
    }  # fmt: skip
    mf.train("deep-linear:5,4", DATA, **options, out=tmp_path / "whole")
    with pytest.raises(InterruptedError):
        mf.train(
            "deep-linear:5,4", DATA, **options, out=tmp_path / "cut", callbacks=[CrashAt(stop_at)]
        )
    mf.train("deep-linear:5,4", DATA, **options, out=tmp_path / "cut", resume=True)
    one, two = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_loss_based_refuses_momentum() -> None:
    with pytest.raises(InputError, match="loss-based: expected no momentum"):
        trainer(deep(5), mf.load(DATA), lr="loss-based", momentum=0.5)


# From specifications


def test_a_number_is_a_number_however_it_is_written() -> None:
    runs = [
        mf.train("mlp:5", DATA, attack="fgsm:eps=0.05", lr=lr, batch_size=7, epochs=10)
        for lr in (0.1, "0.1", "1/10", Constant(0.1))
    ]
    for other in runs[1:]:
        assert other.metrics == runs[0].metrics
        assert {**other.config} == {**runs[0].config}


@pytest.mark.parametrize(
    ("lr", "kind", "spec"),
    [
        (0.5, Constant, 0.5),
        (1, Constant, 1.0),
        ("1e-3", Constant, 1e-3),
        ("3/4", Constant, 0.75),
        ("lemma2", Lemma2, "lemma2:constant=corrected"),
        ("lemma2:constant=printed", Lemma2, "lemma2:constant=printed"),
        ("lemma2:floor=1/4", Lemma2, "lemma2:constant=corrected,floor=0.25"),
        ("loss-based", LossBased, f"loss-based:a=0.1,fall={LossBased().fall!r}"),
        ("loss-based:a=2,fall=1/2", LossBased, "loss-based:a=2.0,fall=0.5"),
    ],
)
def test_build_rate(lr: float | str, kind: type, spec: float | str) -> None:
    rate = build_rate(lr)
    assert type(rate) is kind
    assert rate.spec == spec
    assert build_rate(rate.spec).spec == spec
    assert build_rate(rate) is rate


@pytest.mark.parametrize(
    ("lr", "error", "words"),
    [
        (0.0, InputError, "lr: expected a number above 0"),
        (-1, InputError, "above 0"),
        (math.nan, InputError, "finite"),
        ("inf", InputError, "finite"),
        ("-0.1", InputError, "above 0"),
        ("1/0", SpecificationError, "fraction"),
        (True, InputError, "expected a number"),
        (None, InputError, "expected a number"),
        ("", SpecificationError, "lr: expected a number"),
        ("lema2", SpecificationError, "did you mean 'lemma2'"),
        ("lemma2:printed", SpecificationError, "'printed' has no name"),
        ("lemma2:constant=printd", SpecificationError, "did you mean 'printed'"),
        ("lemma2:radius=3", SpecificationError, "option of 'lemma2' 'radius'"),
        ("lemma2:floor=0", InputError, "floor: expected a number above 0"),
        ("loss-based:a=0", InputError, "loss-based: a: expected a number above 0"),
        ("loss-based:a=x", SpecificationError, "expected a number or a fraction"),
        ("loss-based:fall=0", InputError, "loss-based: fall"),
        ("loss-based:b=1", SpecificationError, "option of 'loss-based' 'b'"),
    ],
)
def test_bad_rates(lr: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build_rate(lr)
