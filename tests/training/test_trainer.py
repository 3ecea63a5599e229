"""Algorithm 1 against a loop written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import marginflow as mf
from marginflow.attacks import Attack
from marginflow.engine import AutogradEngine
from marginflow.errors import DivergedError, InputError, ModelError, RunError
from marginflow.losses import get_loss
from marginflow.training import Callback, Trainer


def small(seed: int = 0) -> tuple[torch.nn.Module, mf.Dataset]:
    data = mf.load(f"separable:n=23,d=6,margin=0.2,seed={seed}")
    return mf.models.mlp(6, 7, 5, 1, seed=seed).double(), data


def trainer(
    model: torch.nn.Module, data: mf.Dataset, attack: Attack | None = None, **options: Any
) -> Trainer:
    engine = AutogradEngine(model, get_loss("logistic"), attack)
    return Trainer(engine, data, **{"lr": 0.3, "batch_size": 5, "epochs": 4, **options})


def forward(w: list[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    activations = [x]
    for k, v in enumerate(w):
        u = v @ activations[-1]
        activations.append(np.maximum(u, 0) if k < len(w) - 1 else u)
    return activations


def signals(w: list[np.ndarray], activations: list[np.ndarray]) -> list[np.ndarray]:
    back = [np.ones(1)]
    for k in range(len(w) - 1, 0, -1):
        back.append((w[k].T @ back[-1]) * (activations[k] > 0))
    return back[::-1]


def by_hand(
    weights: list[np.ndarray], batches: list[tuple[np.ndarray, np.ndarray]], lr: float, eps: float
) -> list[np.ndarray]:
    """FGSM training of a ReLU network by its textbook formulas, one example at a time, in numpy."""
    w = [v.copy() for v in weights]
    for xs, ys in batches:
        total = [np.zeros_like(v) for v in w]
        for x, y in zip(xs, ys, strict=True):
            gradient = w[0].T @ signals(w, forward(w, x))[0]
            activations = forward(w, x - eps * y * np.sign(gradient))
            slope = -1 / (1 + np.exp(y * activations[-1][0]))
            for k, signal_k in enumerate(signals(w, activations)):
                total[k] += slope * y * np.outer(signal_k, activations[k])
        w = [v - lr * g / len(ys) for v, g in zip(w, total, strict=True)]
    return w


def test_fgsm_training_equals_the_loop_by_hand() -> None:
    model, data = small()
    run = trainer(model, data, mf.attacks.FGSM(0.05), seed=3)
    start = [p.detach().numpy().copy() for p in model.parameters()]
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    call = run.engine.__call__

    class Spy(AutogradEngine):
        def __call__(self, x: Tensor, y: Tensor, *options: Any) -> Any:
            seen.append((x.numpy().copy(), y.numpy().copy()))
            return call(x, y, *options)

    run.engine = Spy(model, run.engine.loss, run.engine.attack)
    run.run()
    assert len(seen) == 4 * 5
    expected = by_hand(start, seen, 0.3, 0.05)
    for parameter, value in zip(model.parameters(), expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_steps_are_those_of_torch(momentum: float) -> None:
    """Bit for bit those of a torch.optim.SGD that is given the same gradients."""
    model, data = small()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=momentum)

    class Twin(Callback):
        def on_step(self, trainer: Trainer) -> None:
            for parameter, gradient in zip(twin.parameters(), trainer.gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(mine, its)

    run = trainer(model, data, mf.attacks.FGSM(0.05), momentum=momentum, callbacks=[Twin()])
    run.run()
    assert run.step == 4 * 5


def test_every_epoch_sees_every_example_once_in_another_order() -> None:
    model, data = small()
    orders: list[list[float]] = [[]]

    class Spy(AutogradEngine):
        def __call__(self, x: Tensor, y: Tensor, *options: Any) -> Any:
            orders[-1].extend(x[:, 0].tolist())
            return super().__call__(x, y, *options)

    class NewEpoch(Callback):
        def on_epoch(self, trainer: Trainer) -> None:
            orders.append([])

    run = trainer(model, data, callbacks=[NewEpoch()])
    run.engine = Spy(model, run.engine.loss, None)
    run.run()
    everything = sorted(data.x[:, 0].tolist())
    assert [sorted(order) for order in orders[:-1]] == [everything] * 4
    assert len({tuple(order) for order in orders[:-1]}) == 4


def test_epoch_means_are_those_of_the_steps() -> None:
    model, data = small()
    losses: list[tuple[float, int]] = []

    class Spy(AutogradEngine):
        def __call__(self, x: Tensor, y: Tensor, *options: Any) -> Any:
            result = super().__call__(x, y, *options)
            losses.append((float(result.loss), len(y)))
            return result

    run = trainer(model, data, epochs=1)
    run.engine = Spy(model, run.engine.loss, None)
    run.run()
    assert [n for _, n in losses] == [5, 5, 5, 5, 3]
    assert run.epoch_loss == pytest.approx(sum(v * n for v, n in losses) / 23, rel=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stop_at", [1, 7, 10, 13])
def test_restored_state_gives_the_very_bits(momentum: float, stop_at: int) -> None:
    attack = mf.attacks.PGD("linf", 0.05, steps=2, random_start=True)
    model, data = small()
    trainer(model, data, attack, momentum=momentum).run()

    class Stop(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == stop_at:
                states.append(trainer.state())
                raise InterruptedError

    states: list[Any] = []
    first, _ = small()
    with pytest.raises(InterruptedError):
        trainer(first, data, attack, momentum=momentum, callbacks=[Stop()]).run()
    second, _ = small(seed=5)  # other weights: all must come from the state
    rest = trainer(second, data, attack, momentum=momentum)
    rest.restore(states[0])
    torch.rand(3)  # the caller's random state must not matter
    rest.run()
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rest.step == 20


def test_training_leaves_no_trace_but_the_weights() -> None:
    model, data = small()
    model.eval()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    handler = signal.getsignal(signal.SIGINT)
    trainer(model, data, mf.attacks.PGD("l2", 0.1, random_start=True)).run()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_waits_for_the_end_of_a_step() -> None:
    told: list[int] = []

    class Interrupt(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == 7:
                signal.raise_signal(signal.SIGINT)

        def on_interrupt(self, trainer: Trainer) -> None:
            told.append(trainer.step)

    model, data = small()
    with pytest.raises(KeyboardInterrupt):
        trainer(model, data, callbacks=[Interrupt()]).run()
    assert told == [7]


def test_a_callback_may_stop_a_training_as_ctrl_c_does() -> None:
    told: list[tuple[str, int]] = []

    class Stop(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == 7:
                trainer.stop()

    class Later(Callback):
        def on_step(self, trainer: Trainer) -> None:
            told.append(("step", trainer.step))

        def on_interrupt(self, trainer: Trainer) -> None:
            told.append(("interrupt", trainer.step))

    model, data = small()
    with pytest.raises(KeyboardInterrupt):
        trainer(model, data, callbacks=[Stop(), Later()]).run()
    assert told[-2:] == [("step", 7), ("interrupt", 7)], "the step is completed for all callbacks"


def test_full_batch_gradient_descent_makes_one_step_an_epoch() -> None:
    model, data = small()
    run = trainer(model, data, batch_size=None)
    run.run()
    assert run.step == run.epoch == 4


def test_divergence_names_step_and_cause() -> None:
    model, data = small()
    run = trainer(model, data, lr=1e200, epochs=50)
    with pytest.raises(
        DivergedError, match=r"diverged at step \d+ \(epoch \d+\).*lower lr"
    ) as caught:
        run.run()
    assert caught.value.step >= 2

    exploding = small()[0]
    engine = AutogradEngine(exploding.float(), get_loss("exponential"), None)
    with torch.no_grad():
        for p in exploding.parameters():
            p.mul_(100)
    with pytest.raises(DivergedError, match=r"exponential loss overflows torch\.float32 at margin"):
        Trainer(engine, data.to(dtype=torch.float32), lr=0.1, batch_size=5, epochs=50).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: expected a number above 0"),
        ({"lr": float("nan")}, "lr: expected a finite number"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number"),
        ({"epochs": -1}, "epochs: expected a whole number of at least 0"),
        ({"momentum": 1.0}, "momentum: expected a number below 1"),
        ({"seed": -1}, "seed: expected a whole number of at least 0"),
    ],
)
def test_refuses_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    model, data = small()
    with pytest.raises(InputError, match=message):
        trainer(model, data, **options)


def test_a_state_of_another_model_is_refused_whole() -> None:
    model, data = small()
    state = trainer(model, data).state()
    other = mf.models.mlp(6, 8, 5, 1, seed=0).double()
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ModelError, match=r"another model: 'linear1.weight' has shape \(7, 6\)"):
        trainer(other, data).restore(state)
    # A batch that no epoch has would end it without a step.
    for batch in (-1, 10**6):
        with pytest.raises(RunError, match=f"no epoch has a batch {batch}"):
            trainer(model, data).restore(dataclasses.replace(state, batch=batch))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
