"""Two runs beside each other: where their measurements and weights part, and by how much.

Source: marginflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

_SHARES = frozenset({"balance_drift", "descent_excess", "loss_rise", "norm_drift"})
"""Measurements that are shares of another quantity: 1e-16 and 2e-16 differ by 1e-16, not by a half."""


@dataclass(frozen=True)
class Difference:
    """The place where one quantity of two runs differs most.

    Attributes:
        name: of the quantity: a measurement, ``layer_norms[1]`` for an entry of a list, or a weight.
        step: at which.
        relative: ``|a − b|`` over the largest size that the quantity has in either run, at least 1 for a
            drift, which is a share already; infinite where only one of them is a number.
        there: its value in the first run; None for a tensor.
        here: its value in the second.
    """

    name: str
    step: int
    relative: float
    there: Any = None
    here: Any = None

    def __str__(self) -> str:
        values = f": {self.there!r} there, {self.here!r} here" if self.there is not None else ""
        return f"{self.name} at step {self.step}{values}"


def compare_records(
    there: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]
) -> tuple[Difference, ...]:
    """For each quantity that differs anywhere, the first place where it does, with its largest difference.

    Records are paired by their step; a step that only one of them has is left out.

    Args:
        there: the measurements of the first run.
        here: those of the second.

    Returns:
        in the order of their steps, then of the quantities in the records; empty where all are equal
        to the bit.
    """
    ours = {record["step"]: dict(_leaves(record)) for record in here}
    pairs = [(r["step"], dict(_leaves(r)), ours[r["step"]]) for r in there if r["step"] in ours]
    sizes: dict[str, float] = {}
    for _, a, b in pairs:
        for name in a.keys() | b.keys():
            found = [abs(v[name]) for v in (a, b) if _is_number(v.get(name))]
            least = 1.0 if name in _SHARES else 0.0
            sizes[name] = max([sizes.get(name, least), *found])
    first: dict[str, Difference] = {}
    for step, a, b in pairs:
        for name in dict.fromkeys([*a, *b]):
            x, y = a.get(name), b.get(name)
            if _same(x, y):
                continue
            relative = math.inf
            if _is_number(x) and _is_number(y):
                relative = abs(float(x) - float(y)) / (sizes[name] or 1.0)
            before = first.get(name)
            if before is None:
                first[name] = Difference(name, step, relative, x, y)
            elif relative > before.relative:
                first[name] = Difference(name, before.step, relative, before.there, before.here)
    return tuple(first.values())


def compare_weights(
    there: Mapping[str, Tensor], here: Mapping[str, Tensor], step: int
) -> tuple[Difference, ...]:
    """The tensors that differ in any bit.

    Args:
        there: of the first run, by name, of any shape.
        here: of the second, of the same names, of any shape.
        step: at which both were taken.
    """
    found = []
    for name in dict.fromkeys([*there, *here]):
        a, b = there.get(name), here.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            found.append(Difference(name, step, math.inf))
        elif not torch.equal(a, b):
            size = torch.maximum(a.abs().max(), b.abs().max()).double()
            gap = (a.double() - b.double()).abs().max() / size
            found.append(Difference(name, step, float(gap) if gap.isfinite() else math.inf))
    return tuple(found)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The single values of a record, lists taken apart."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield f"{name}[]", len(value)
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{name}[{index}]")
    else:
        yield name, value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same(a: Any, b: Any) -> bool:
    """Equal to the bit: −0 is another number than 0, and NaN the same as NaN."""
    if isinstance(a, float) and isinstance(b, float):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) and math.isnan(b)
        return a == b and math.copysign(1.0, a) == math.copysign(1.0, b)
    return type(a) is type(b) and a == b
