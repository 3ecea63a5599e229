"""The stronger attack beside the measured one, on a few examples: the alarm of catastrophic overfitting.

Source: Wong, Rice & Kolter (2020), as in :mod:`marginflow.overfitting`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from marginflow.attacks import FGM, FGSM, PGD, Attack
from marginflow.monitor._record import Subject, for_json
from marginflow.monitor._schedule import PER_DECADE, Due, Schedule
from marginflow.overfitting import Overfitting, detect_overfitting

_STEPS = 7
_PER_DECADE = PER_DECADE // 2
_SLACK = 0.05
_LEAST, _MOST, _SHARE = 100, 512, 8


def stronger(attack: Attack | None) -> Attack | None:
    """PGD with seven steps of 2.5 ε/7 in place of FGM and FGSM; None beside any other attack."""
    if type(attack) not in (FGM, FGSM) or attack is None or attack.eps == 0:
        return None
    return PGD(attack.p, attack.eps, steps=_STEPS, bounds=attack.bounds)


class Strong:
    """Measures a sample of the examples under ``attack`` and under the subject's own.

    The sample is an eighth of the examples, at least 100 and at most 512, drawn with seed 0. On the
    schedule ``log`` only half of the points of a decade are due: PGD costs seven times what FGSM does.

    Args:
        subject: what is monitored.
        attack: the stronger attack.
        schedule: that of the monitor.
    """

    def __init__(self, subject: Subject, attack: Attack, schedule: Schedule) -> None:
        self.attack = attack
        size = min(max(_LEAST, subject.data.n // _SHARE), _MOST)
        few = dataclasses.replace(subject.data, test=None).sample(size)
        self.subject = dataclasses.replace(subject, data=few, loss=None)
        self.due = Due(schedule, _PER_DECADE)

    def measure(self, step: int, *, forced: bool) -> dict[str, Any]:
        """Accuracies and smallest margins of the sample under both attacks; empty if not due.

        The margins are normalised where the network is homogeneous.
        """
        if not self.due(step) and not forced:
            return {}
        found: dict[str, Any] = {"sample_size": self.subject.data.n}
        for name, attack in (("sample", self.subject.attack), ("strong", self.attack)):
            margins = self.subject.margins(self.subject.data, attack)[1]
            least = margins.min if margins.rho is None else margins.normalized_min
            found |= {f"{name}_accuracy": margins.accuracy, f"{name}_margin": for_json(least)}
        return found


def overfitting_of(records: Sequence[Mapping[str, Any]]) -> Overfitting | None:
    """What :func:`detect_overfitting` says of the records that have both accuracies.

    Its slack is 0.05, or 1/√n where that is more: twice what n examples scatter by chance.

    Args:
        records: those of a monitor with ``strong``, oldest first.

    Returns:
        the flagged measurement, or None.
    """
    sides = {
        name: [
            {
                "step": record["step"],
                "epoch": record.get("epoch"),
                "adversarial_accuracy": record[f"{name}_accuracy"],
                "normalized_margin": record[f"{name}_margin"],
            }
            for record in records
            if "strong_accuracy" in record
        ]
        for name in ("sample", "strong")
    }
    if not sides["strong"]:
        return None
    size = next(r["sample_size"] for r in records if "strong_accuracy" in r)
    return detect_overfitting(
        sides["sample"], sides["strong"], slack=max(_SLACK, 1 / math.sqrt(size))
    )
