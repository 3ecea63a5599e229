"""Catastrophic overfitting: one-step training fools its own attack while a stronger one wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marginflow._checks import real, whole
from marginflow.errors import InputError

_ACCURACY = "adversarial_accuracy"
_MARGIN = "normalized_margin"


@dataclass(frozen=True)
class Overfitting:
    """Where a training overfitted catastrophically.

    Source: Wong, Rice & Kolter (2020).

    Attributes:
        step: the flagged measurement's step.
        epoch: its epoch, or None where the records have none.
        weak_accuracy, strong_accuracy: shares at the flagged measurement, under the weak and the
            strong attack.
        weak_margin, strong_margin: γ̂_m there.
        peak_step: where the accuracy under the strong attack was at its best before.
        peak_weak_accuracy, peak_strong_accuracy: the same two shares there.
    """

    step: int
    epoch: float | None
    weak_accuracy: float
    strong_accuracy: float
    weak_margin: float
    strong_margin: float
    peak_step: int
    peak_weak_accuracy: float
    peak_strong_accuracy: float

    def __str__(self) -> str:
        place = f"step {self.step}" if self.epoch is None else f"epoch {self.epoch:g}"
        return (
            f"{place}: accuracy under the strong attack {self.strong_accuracy:.1%}, from "
            f"{self.peak_strong_accuracy:.1%} at its best; under the weak one {self.weak_accuracy:.1%}, from "
            f"{self.peak_weak_accuracy:.1%}"
        )


def detect_overfitting(
    weak: Sequence[Mapping[str, Any]],
    strong: Sequence[Mapping[str, Any]],
    *,
    drop: float = 0.5,
    floor: float = 0.1,
    slack: float = 0.05,
    patience: int = 2,
) -> Overfitting | None:
    """Find the first measurement at which training has overfitted catastrophically, if there is one.

    Training against a one-step attack (FGSM) can suddenly learn to fool that attack alone
    (Wong, Rice & Kolter, 2020): the accuracy under FGSM stays or rises, that under PGD collapses. With
    ``a_w`` and ``a_s`` the accuracies under the weak and the strong attack, and s the measurement so far at
    which ``a_s`` was largest, measurement t is *suspect* when both

        ``a_s(t) ≤ (1 − drop) a_s(s)``    and    ``a_w(t) ≥ a_w(s) − slack``,

    provided that ``a_s(s) ≥ floor``: who was never robust has nothing to lose. The second condition tells
    overfitting from a training that merely stumbles, where both fall. The first of ``patience``
    suspect measurements in a row is flagged: a single noisy epoch is not, nor is a fall that only the
    last measurement shows.

    The accuracies may be of training or of test examples; give the records of two monitors
    (:class:`marginflow.Monitor`) of the same model, measured at the same steps.

    Args:
        weak: records under the attack that was trained against.
        strong: records under the stronger attack; steps that only one of the two has are left out.
        drop: the share of its best accuracy that must be lost under the strong attack, in (0, 1].
        floor: the least best accuracy under the strong attack from which a fall counts, a share >
            0.
        slack: how far the accuracy under the weak attack may have fallen meanwhile, a share ≥ 0.
        patience: suspect measurements in a row, at least 1.

    Returns:
        the flagged measurement, or None.

    Raises:
        InputError: a number out of range, records without a common step or without accuracies.
    """
    real("drop", drop, above=0.0)
    real("floor", floor, above=0.0)
    real("slack", slack, least=0.0)
    whole("patience", patience, least=1)
    if drop > 1:
        raise InputError(f"drop: expected a share of at most 1, got {drop:g}")
    pairs = _common(weak, strong)
    peak = 0
    suspects: list[int] = []
    for t, (w, s) in enumerate(pairs):
        if s[_ACCURACY] >= pairs[peak][1][_ACCURACY]:
            peak, suspects = t, []
            continue
        best = pairs[peak][1][_ACCURACY]
        fallen = best >= floor and s[_ACCURACY] <= (1 - drop) * best
        kept = w[_ACCURACY] >= pairs[peak][0][_ACCURACY] - slack
        suspects = [*suspects, t] if fallen and kept else []
        if len(suspects) == patience:
            return _flag(pairs[suspects[0]], pairs[peak])
    return None


_Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def _common(weak: Sequence[Mapping[str, Any]], strong: Sequence[Mapping[str, Any]]) -> list[_Pair]:
    """The records of the same step, in the order of the steps."""
    try:
        found = {int(record["step"]): record for record in strong}
        pairs = [(record, found[record["step"]]) for record in weak if record["step"] in found]
        for pair in pairs:
            for record in pair:
                real(_ACCURACY, record[_ACCURACY], least=0.0)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"records: expected those of mf.Monitor, with step and {_ACCURACY}; lacking: {error}"
        ) from None
    if not pairs:
        raise InputError("records: expected measurements at the same steps, got none in common")
    return sorted(pairs, key=lambda pair: int(pair[0]["step"]))


def _flag(now: _Pair, peak: _Pair) -> Overfitting:
    weak, strong = now
    epoch = weak.get("epoch")
    return Overfitting(
        step=int(weak["step"]),
        epoch=None if epoch is None else float(epoch),
        weak_accuracy=float(weak[_ACCURACY]),
        strong_accuracy=float(strong[_ACCURACY]),
        weak_margin=_margin(weak),
        strong_margin=_margin(strong),
        peak_step=int(peak[0]["step"]),
        peak_weak_accuracy=float(peak[0][_ACCURACY]),
        peak_strong_accuracy=float(peak[1][_ACCURACY]),
    )


def _margin(record: Mapping[str, Any]) -> float:
    value = record.get(_MARGIN)
    return float("nan") if value is None else float(value)
