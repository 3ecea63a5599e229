"""The recorded path of a run as arrays, and what the statements about a path ask of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marginflow.errors import RunError

Array = NDArray[np.float64]

_LOGARITHMIC = 10.0
"""ln t from which asymptotic laws are fitted."""
_DECADE = 10.0
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Path:
    """The measurements of a run, one entry each; NaN for what was not recorded.

    Attributes:
        records: the measurements.
        degrees: c_k, (L,).
        n: number of examples.
    """

    records: Sequence[Mapping[str, Any]]
    degrees: Array
    n: int

    def __len__(self) -> int:
        return len(self.records)

    def series(self, name: str) -> Array:
        """One recorded number along the path, (T,)."""
        values = [record.get(name) for record in self.records]
        return np.array([math.nan if v is None else float(v) for v in values], dtype=np.float64)

    @property
    def order(self) -> float:
        """K."""
        return float(self.degrees.sum())

    @property
    def norms(self) -> Array:
        """ρ_k, (T, L)."""
        rows = [record.get("layer_norms") or () for record in self.records]
        if any(len(row) != len(self.degrees) for row in rows):
            raise RunError(
                f"the run is damaged: expected {len(self.degrees)} layer_norms in each measurement, as "
                "run.json has layers"
            )
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.degrees))

    @property
    def log_rho(self) -> Array:
        """``ln ρ = Σ c_k ln ρ_k``, (T,)."""
        return np.asarray(np.log(np.maximum(self.norms, _TINY)) @ self.degrees)

    @property
    def balances(self) -> Array:
        """``‖W_k‖_F²/c_k``, (T, L)."""
        return np.asarray(self.norms**2 / self.degrees)

    @property
    def smoothed(self) -> Array:
        """ℓ/ρ with ``ℓ = ln(1/(nL))`` of the exponential loss, (T,)."""
        return self.series("smoothed_margin")

    @property
    def smoothed_by_total(self) -> Array:
        """``ℓ/‖W‖^K``, (T,), up to a common factor."""
        shift = self.log_rho - self.order * np.log(np.linalg.norm(self.norms, axis=1) + _TINY)
        return np.asarray(self.smoothed * np.exp(shift - shift[0]))

    @property
    def log_tl(self) -> Array:
        """``ln(tL)``, (T,), as recorded or as ``ln t + ln L``."""
        recorded = self.series("log_tl")
        return np.where(
            np.isnan(recorded), self.series("log_time") + self.series("log_loss"), recorded
        )

    @property
    def separated(self) -> slice:
        """The records from the first with L < 1/n on: the corrected Assumption 4."""
        inside = np.flatnonzero(self.smoothed > 0)
        return slice(int(inside[0]), None) if len(inside) else slice(0, 0)

    @property
    def has_separated(self) -> bool:
        """Whether L fell below 1/n at some record."""
        return bool((self.smoothed > 0).any())

    @property
    def log_time(self) -> float:
        """The last ln t; −∞ where it was not recorded."""
        value = self.series("log_time")[-1] if len(self) else math.nan
        return -math.inf if math.isnan(value) else float(value)

    def last_part(self) -> NDArray[np.bool_] | None:
        """The last third of ln ln t above ln t = 10, or None if it spans less than a decade."""
        time = self.series("log_time")
        if not len(time) or not time[-1] >= _LOGARITHMIC * _DECADE:
            return None
        log_clock = np.log(np.where(time >= _LOGARITHMIC, time, 1.0))
        start = log_clock[-1] - (log_clock[-1] - math.log(_LOGARITHMIC)) / 3
        part = np.asarray((time >= _LOGARITHMIC) & (log_clock >= start))
        return part if part.sum() >= 4 else None

    def slope(self, values: Array, part: NDArray[np.bool_]) -> float:
        """The exponent of e^values in ln t, fitted on ``part`` of the path."""
        clock = np.log(self.series("log_time")[part])
        return float(np.polyfit(clock, values[part], 1)[0])

    def falls(self, values: Array, *, logarithms: bool = False) -> tuple[int, float]:
        """How often positive ``values`` fell between records, and by how much at most (relative).

        With ``logarithms`` the values are given by their logarithms.
        """
        if len(values) < 2:
            return 0, 0.0
        if logarithms:
            drops = -np.expm1(np.minimum(np.diff(values), 1.0))
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                drops = -np.diff(values) / np.maximum(np.abs(values[:-1]), _TINY)
        return int((drops > 1e-12).sum()), float(max(0.0, drops.max()))

    def course(self) -> str:
        """What ℓ/ρ did from L < 1/n on: its growth, and how often it fell and by how much."""
        if not len(self) or not self.has_separated:
            return "L < 1/n was not reached"
        values = self.smoothed[self.separated]
        grown = f"ℓ/ρ {values[0]:.4g} → {values[-1]:.4g} since L < 1/n"
        last = self.records[-1]
        steps = last.get("separated_steps")
        if steps and last.get("falls") is not None:
            share, largest = last["falls"] / steps, float(last["largest_fall"] or 0.0)
            return f"{grown}, falling on {share:.2%} of {steps} steps, by {largest:.2g} at most"
        count, largest = self.falls(values)
        return (
            f"{grown}, falling between {count} of {len(values) - 1} neighbouring records, "
            f"by {largest:.2g} at most"
        )


def last_third(height: Array) -> NDArray[np.bool_] | None:
    """The last third of ln ln(1/L) above ln(1/L) = 10, or None if it spans less than a decade."""
    if not len(height) or not height[-1] >= _LOGARITHMIC * _DECADE:
        return None
    log_height = np.log(np.maximum(height, 1.0))
    start = log_height[-1] - (log_height[-1] - math.log(_LOGARITHMIC)) / 3
    part = np.asarray((height >= _LOGARITHMIC) & (log_height >= start))
    return part if part.sum() >= 4 else None


def exponent_of(values: Array, height: Array) -> float:
    """The exponent of positive ``values`` in ``height``, by least squares of the logarithms."""
    return float(np.polyfit(np.log(height), np.log(values), 1)[0])
