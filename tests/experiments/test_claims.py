"""What is claimed of a path of margins, judged on made-up paths whose answer is known."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest

from marginflow.experiments._claims import (
    Finding,
    above,
    above_claim,
    difference,
    fitted,
    fitted_claim,
    growth,
    growth_claim,
    judge,
    milli,
    separation,
)

EPOCHS = (1, 2, 5, 10, 20, 50, 100, 200)


def path(
    margins: tuple[float, ...], accuracies: tuple[float, ...] | None = None
) -> list[dict[str, Any]]:
    shares = (1.0,) * len(margins) if accuracies is None else accuracies
    return [
        {"epoch": e, "normalized_margin": m, "adversarial_accuracy": a}
        for e, m, a in zip(EPOCHS, margins, shares, strict=False)
    ]


RISING = tuple(1e-3 * math.log(e) for e in EPOCHS)
LATE = (0.2, 0.9, 1.0, 0.999, 1.0, 1.0, 1.0, 1.0)


def test_separation_is_the_first_epoch_at_which_all_are_fitted() -> None:
    assert separation(path(RISING, LATE)) == 5
    assert separation(path(RISING, (0.9999,) * 8)) is None
    assert fitted(path(RISING, LATE)) == Finding(True, "epoch 5")
    never = fitted(path(RISING, (0.5, 0.99999, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9)))
    assert never.ok is None
    assert "99.99 % at best (epoch 2 of 200)" in never.text, "99.999 % is not rounded to 100 %"


def test_growth_counts_ranks_after_separation_only() -> None:
    found = growth(path(RISING, LATE))
    assert found.ok
    assert "τ = 1.00" in found.text
    assert "n = 6" in found.text, "epochs 5 … 200"
    assert growth(path(RISING[::-1])).ok is False, "falling for certain"
    constant = growth(path((1.0,) * 8))
    assert constant.ok is None
    assert "τ = 0.00, p = 1" in constant.text, "a path that stands still has no ranks"


@pytest.mark.parametrize("n", [5, 6])
def test_the_p_value_is_the_share_of_orders_with_as_many_pairs_in_order(n: int) -> None:
    """Kendall's exact test, against the count over all n! orders of the same numbers."""
    values = (1.0, 3.0, 2.0, 4.0, 5.0, 6.0)[:n]

    def in_order(order: tuple[float, ...]) -> int:
        return sum(order[i] < order[j] for j in range(n) for i in range(j))

    orders = list(permutations(values))
    p = sum(in_order(o) >= in_order(values) for o in orders) / len(orders)
    found = growth(path(values))
    assert f"p = {p:.1g}" in found.text
    assert found.ok == (True if p < 0.01 else None)


def test_growth_may_stumble_but_must_end_higher() -> None:
    noisy = (0.1, 0.2, 0.15, 0.3, 0.4, 0.35, 0.5, 0.6)
    assert growth(path(noisy)).ok, "net growth, not point by point"
    few = growth(path((0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.1)))
    assert few.ok is None, "eight points that rise and then fall tell nothing"
    flat = [0.3, 0.5] * 5 + [0.4]
    many = [
        {"epoch": e, "normalized_margin": m, "adversarial_accuracy": 1.0}
        for e, m in enumerate(flat)
    ]
    assert growth(many).ok is False, "eleven points without growth deny it"
    ending_low = [record | {"normalized_margin": 0.1 * k} for k, record in enumerate(many)]
    assert growth(ending_low).ok
    ending_low[-1]["normalized_margin"] = -0.1
    assert growth(ending_low).ok is False, (
        "significant ranks, but the last point is below the first"
    )


def test_growth_is_not_reached_without_separation_or_points() -> None:
    assert growth(path(RISING, (0.9,) * 8)).ok is None
    few = growth(path(RISING, (0.1,) * 4 + (1.0,) * 4))
    assert few.ok is None
    assert "only 4 measured points" in few.text


def test_above_looks_at_every_common_epoch_after_separation() -> None:
    upper, lower = path(RISING, LATE), path(tuple(m - 1e-4 for m in RISING))
    assert above(upper, lower).ok
    crossing = path(tuple(m - 1e-4 if e != 50 else m for e, m in zip(EPOCHS, RISING, strict=True)))
    found = above(upper, crossing)
    assert found.ok is False, "equal is not above"
    assert "epoch 50" in found.text
    early = path((1.0, 1.0, *(m - 1e-4 for m in RISING[2:])))
    assert above(upper, early).ok, "before separation nothing is claimed"
    assert above(path(RISING, (0.9,) * 8), lower).ok is None
    assert above(upper, lower[:1]).ok is None, "no common epoch after separation"


def test_difference_is_that_of_the_closest_two_beyond_the_seeds() -> None:
    assert difference({"a": [1.0], "b": [2.0], "c": [3.0]}).ok
    assert difference({"a": [1.0], "b": [1.04], "c": [3.0]}).ok is None, "one seed cannot tell"
    assert difference({"a": [1.0, 1.01], "b": [1.04, 1.05]}).ok, "several can"
    assert "between a" in difference({"a": [1.0], "b": [1.04], "c": [3.0]}).text
    # The means lie 0.5 apart, but the seeds of one setting differ by 0.4.
    assert difference({"a": [0.8, 1.2], "b": [1.5, 1.5]}).ok is False
    assert difference({"a": [1.0]}).ok is None


def test_a_verdict_fails_if_one_seed_fails() -> None:
    claim = growth_claim("Figure 1(a)")
    good, bad, late = Finding(True, "up"), Finding(False, "down"), Finding(None, "?")
    assert judge(claim, {"seed 0": good}).outcome == "holds"
    assert judge(claim, {"seed 0": good}).measured == "up"
    failed = judge(claim, {"seed 0": good, "seed 1": bad, "seed 2": late}, "train longer")
    assert failed.outcome == "fails"
    assert failed.measured == "seed 0: up; seed 1: down; seed 2: ?"
    assert failed.advice == ""
    waiting = judge(claim, {"seed 0": good, "seed 2": late}, "train longer")
    assert (waiting.outcome, waiting.advice) == ("not reached", "train longer")
    assert judge(claim, {}).outcome == "not reached"
    for made in (fitted_claim("Figure 4"), above_claim("Figure 4")):
        assert made.statement == "Figure 4"


def test_margins_are_told_in_thousandths() -> None:
    assert milli(1.234e-3) == "1.23 × 10⁻³"
    assert milli(-0.5) == "−500 × 10⁻³"
    assert milli(2.0, unit=False) == "2,000"
