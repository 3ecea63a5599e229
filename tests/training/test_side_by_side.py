"""Seeds side by side take the path of their solo runs."""

from __future__ import annotations

import pytest
import torch

import marginflow as mf
from marginflow.attacks import build as build_attack
from marginflow.engine import FusedEngine
from marginflow.errors import InputError
from marginflow.losses import get_loss
from marginflow.models import mlp
from marginflow.training import Callback, LossBased, SideBySide, Trainer

ATTACKS = {
    "none": None,
    "fgsm": "fgsm:eps=0.1",
    "fgm": "fgm:eps=0.2",
    "pgd-linf": "pgd-linf:eps=0.1,steps=3,step=0.05,random=true",
    "pgd-l2": "pgd-l2:eps=0.2,steps=3",
}
SEEDS = (0, 3, 5)


def data(classes: int, dtype: torch.dtype) -> mf.Dataset:
    """23 examples with 4 features: batches of 8 leave a smaller last one of 7."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(23, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(max(classes, 2), (23,), generator=generator)
    return mf.Dataset(x, 2 * y - 1 if classes == 1 else y).to(dtype=dtype)


def trainers(
    classes: int,
    attack: str | None,
    batch_size: int | None,
    epochs: int,
    *,
    dtype: torch.dtype = torch.float64,
    momentum: float = 0.0,
    loss: str | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> list[Trainer]:
    found = []
    for seed in SEEDS:
        examples = data(classes, dtype)
        engine = FusedEngine(
            mlp(4, 6, 5, classes, seed=seed).to(dtype),
            get_loss(loss or ("logistic" if classes == 1 else "cross-entropy")),
            build_attack(attack),
            shape=examples.shape,
        )
        found.append(
            Trainer(
                engine,
                examples,
                lr=0.1,
                batch_size=batch_size,
                epochs=epochs,
                momentum=momentum,
                seed=seed,
                callbacks=callbacks,
            )
        )
    return found


def largest_difference(one: Trainer, other: Trainer) -> float:
    """Between the weights, relative to the largest weight."""
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("attack", ATTACKS)
def test_each_path_is_that_of_the_solo_run(
    attack: str, classes: int, batch_size: int | None
) -> None:
    """200 steps (or 201) in float64 to 1e-10, with the numbers of the epoch."""
    epochs = 200 if batch_size is None else 67
    solo = trainers(classes, ATTACKS[attack], batch_size, epochs)
    start = [p.detach().clone() for p in solo[0].model.parameters()]
    for trainer in solo:
        trainer.run()
    side = trainers(classes, ATTACKS[attack], batch_size, epochs)
    together = SideBySide(side)
    together.run()
    assert together.diverged == {}
    assert not any(
        torch.equal(a, b) for a, b in zip(start, side[0].model.parameters(), strict=True)
    )
    assert largest_difference(side[0], side[1]) > 0.1, "the seeds are different trainings"
    for one, other in zip(solo, side, strict=True):
        assert largest_difference(one, other) < 1e-10
        assert (other.step, other.epoch) == (one.step, one.epoch)
        assert other.log_time == one.log_time
        assert other.epoch_loss == pytest.approx(one.epoch_loss, rel=1e-10)
        assert other.epoch_accuracy == one.epoch_accuracy


@pytest.mark.parametrize("attack", ["none", "fgsm", "pgd-l2"])
@pytest.mark.parametrize("classes", [1, 3])
def test_in_float32_the_first_steps_agree_to_rounding(attack: str, classes: int) -> None:
    """Six steps: each rounds a few times at 6e-8."""
    dtype = torch.float32
    solo = trainers(classes, ATTACKS[attack], 8, 2, dtype=dtype)
    for trainer in solo:
        trainer.run()
    side = trainers(classes, ATTACKS[attack], 8, 2, dtype=dtype)
    SideBySide(side).run()
    for one, other in zip(solo, side, strict=True):
        assert largest_difference(one, other) < 3e-6


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_a_seed_goes_on_alone_from_its_state_and_others_from_theirs(momentum: float) -> None:
    whole = trainers(1, "fgsm:eps=0.1", 8, 20, momentum=momentum)
    for trainer in whole:
        trainer.run()
    half = trainers(1, "fgsm:eps=0.1", 8, 10, momentum=momentum)
    SideBySide(half).run()
    states = [trainer.state() for trainer in half]
    again = trainers(1, "fgsm:eps=0.1", 8, 20, momentum=momentum)
    for trainer, state in zip(again, states, strict=True):
        trainer.restore(state)
    again[0].run()
    SideBySide(again[1:]).run()
    for one, other in zip(whole, again, strict=True):
        assert largest_difference(one, other) < 1e-12


class Following(Callback):
    """Notes the gradients, as gauges do, and their squares."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[float, float]]] = {}

    def on_step(self, trainer: Trainer) -> None:
        squares = [float(g.square().sum()) for g in trainer.gradients]
        pairs = zip(squares, trainer.gradient_squares(), strict=True)
        self.seen.setdefault(trainer.seed, []).extend(pairs)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_callbacks_see_the_gradients_of_their_own_seed(momentum: float) -> None:
    alone, beside = Following(), Following()
    for trainer in trainers(3, "fgm:eps=0.2", None, 4, momentum=momentum, callbacks=(alone,)):
        trainer.run()
    SideBySide(trainers(3, "fgm:eps=0.2", None, 4, momentum=momentum, callbacks=(beside,))).run()
    assert beside.seen.keys() == alone.seen.keys() == set(SEEDS)
    for seed in SEEDS:
        assert len(beside.seen[seed]) == 4 * 3
        for found, expected in zip(beside.seen[seed], alone.seen[seed], strict=True):
            assert found == pytest.approx(expected, rel=1e-12)
            assert found[0] == pytest.approx(found[1], rel=1e-14)


class Spoil(Callback):
    """Blows up the weights of seed 3 after the first step of the second epoch."""

    def on_step(self, trainer: Trainer) -> None:
        if trainer.seed == 3 and trainer.step == 4:
            with torch.no_grad():
                for p in trainer.model.parameters():
                    p.mul_(1e3)


def test_a_seed_that_diverges_drops_out_and_the_others_go_on() -> None:
    def made() -> list[Trainer]:
        return trainers(
            1, "fgsm:eps=0.1", 8, 20, momentum=0.3, loss="exponential", callbacks=(Spoil(),)
        )

    solo = made()
    for trainer in (solo[0], solo[2]):
        trainer.run()
    with pytest.raises(mf.errors.DivergedError) as alone:
        solo[1].run()
    side = made()
    together = SideBySide(side)
    together.run()
    assert list(together.diverged) == [1]
    assert str(together.diverged[1]) == str(alone.value)
    assert (side[1].epoch, side[1].batch) == (1, 1), "in the middle of an epoch"
    for place in (0, 2):
        assert side[place].epoch == 20
        assert largest_difference(solo[place], side[place]) < 1e-10


def test_trainings_that_are_not_alike_are_refused() -> None:
    one, two, _ = trainers(1, None, 8, 3)
    one.rate = LossBased()
    with pytest.raises(InputError, match="loss-based"):
        SideBySide([one, two])
    one, two, _ = trainers(1, None, 8, 3)
    one.run()
    with pytest.raises(InputError, match="one step"):
        SideBySide([one, two])
