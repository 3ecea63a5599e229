"""The detector of catastrophic overfitting, on made-up and on real trainings."""

from __future__ import annotations

from typing import Any

import pytest

import marginflow as mf
from marginflow.errors import InputError
from marginflow.monitor import QUANTILES
from marginflow.overfitting import detect_overfitting


def records(*accuracies: float) -> list[dict[str, Any]]:
    return [
        {"step": 10 * t, "epoch": t, "adversarial_accuracy": a, "normalized_margin": a - 1}
        for t, a in enumerate(accuracies)
    ]


def test_it_flags_where_the_strong_accuracy_falls_and_the_weak_one_does_not() -> None:
    weak = records(0.5, 0.6, 0.7, 0.9, 0.95, 1.0)
    strong = records(0.4, 0.5, 0.6, 0.3, 0.1, 0.0)
    found = detect_overfitting(weak, strong)
    assert found is not None
    assert (found.step, found.epoch, found.peak_step) == (30, 3.0, 20)
    assert (found.weak_accuracy, found.strong_accuracy) == (0.9, 0.3)
    assert (found.peak_weak_accuracy, found.peak_strong_accuracy) == (0.7, 0.6)
    assert found.strong_margin == pytest.approx(-0.7)
    assert str(found).startswith("epoch 3: accuracy under the strong attack 30.0%, from 60.0%")


@pytest.mark.parametrize(
    ("weak", "strong"),
    [
        ((0.5, 0.6, 0.7, 0.8), (0.4, 0.5, 0.6, 0.7)),  # nothing happens
        ((0.5, 0.9, 0.3, 0.2), (0.4, 0.8, 0.2, 0.1)),  # training stumbles: both fall
        ((0.5, 0.9, 0.9, 0.9), (0.4, 0.8, 0.5, 0.41)),  # less than half is lost
        ((0.5, 0.9, 0.9, 0.9), (0.0, 0.09, 0.01, 0.0)),  # never robust enough to lose anything
        ((0.5, 0.9, 0.9, 0.9, 0.9), (0.4, 0.8, 0.1, 0.8, 0.8)),  # one noisy epoch
        ((0.5, 0.9, 0.9), (0.4, 0.8, 0.1)),  # not confirmed
        ((0.9, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)),  # never robust: nothing to lose
    ],
)
def test_it_flags_nothing_else(weak: tuple[float, ...], strong: tuple[float, ...]) -> None:
    assert detect_overfitting(records(*weak), records(*strong)) is None


def test_its_numbers_can_be_changed() -> None:
    weak, strong = records(0.5, 0.9, 0.82, 0.82), records(0.4, 0.8, 0.6, 0.6)
    assert detect_overfitting(weak, strong) is None
    assert detect_overfitting(weak, strong, drop=0.2) is None, "the weak one fell by 8 points"
    assert detect_overfitting(weak, strong, drop=0.26, slack=0.1) is None, "a quarter was lost"
    assert detect_overfitting(weak, strong, drop=0.2, slack=0.1, floor=0.81) is None
    found = detect_overfitting(weak, strong, drop=0.24, slack=0.1)
    assert found is not None
    assert found.epoch == 2
    once = detect_overfitting(records(0.5, 0.9, 0.9), records(0.4, 0.8, 0.1), patience=1)
    assert once is not None


def test_only_common_steps_count_in_any_order() -> None:
    weak, strong = records(0.5, 0.6, 0.7, 0.9, 0.95), records(0.4, 0.5, 0.6, 0.3, 0.1)
    expected = detect_overfitting(weak, strong)
    assert expected is not None
    assert detect_overfitting(weak[::-1], [{**strong[0], "step": 7}, *strong]) == expected
    without = detect_overfitting(
        [{k: v for k, v in w.items() if k != "epoch"} for w in weak], strong
    )
    assert without is not None
    assert without.epoch is None
    assert str(without).startswith("step 30:")


def test_bad_input() -> None:
    some = records(0.5, 0.6)
    with pytest.raises(InputError, match="none in common"):
        detect_overfitting(some, [])
    with pytest.raises(InputError, match=r"mf\.Monitor"):
        detect_overfitting(some, [{"step": 0}])
    for options in ({"drop": 0.0}, {"drop": 1.1}, {"slack": -1.0}, {"floor": 0.0}, {"patience": 0}):
        with pytest.raises(InputError):
            detect_overfitting(some, some, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("eps", "overfits"), [(0.3, True), (0.05, False)])
def test_a_real_training(eps: float, overfits: bool) -> None:
    """FGSM on the ten digits: at ε = 0.3 it overfits, at ε = 0.05 it does not.

    The margins agree: since PGD was withstood best, the upper quartile of the FGSM margins has
    grown, that of the PGD margins fallen.
    """
    data = mf.load("digits:n=300")
    run = mf.train(
        "mlp:128", data, attack=f"fgsm:eps={eps}", lr=0.2, batch_size=16, epochs=120,
        schedule=range(0, 121, 10), keep_weights=True,
    )  # fmt: skip
    assert run.model is not None
    strong = mf.Monitor(run.model, data, mf.attacks.PGD("linf", eps, steps=10), schedule="every")
    for step, weights in run.trajectory().items():
        run.model.load_state_dict(weights)
        strong.measure(step)
    found = mf.detect_overfitting(run.metrics, strong.records)
    assert (found is not None) == overfits
    if found is None:
        return
    assert found.strong_accuracy < 0.5 * found.peak_strong_accuracy
    assert found.weak_accuracy > found.peak_weak_accuracy - 0.05
    upper = QUANTILES.index(0.75)
    best = next(k for k, record in enumerate(strong.records) if record["step"] == found.peak_step)
    weak_then, weak_now, strong_then, strong_now = (
        records[k]["normalized_margin_quantiles"][upper]
        for records in (run.metrics, strong.records)
        for k in (best, -1)
    )
    assert weak_now > weak_then
    assert strong_now < strong_then
