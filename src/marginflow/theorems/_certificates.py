"""KKT certificates at kept points of a path, for Theorems 5 and 6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from marginflow.attacks import Derivative
from marginflow.errors import ModelError
from marginflow.kkt import Certificate, kkt_certificate
from marginflow.theorems._path import Array, exponent_of
from marginflow.theorems._site import Site

TAU = 0.1
_MOST = 8
_FITTED = 4
_REACH = 100.0


@dataclass(frozen=True, eq=False)
class Certificates:
    """At most eight certificates along a path, oldest first.

    Attributes:
        found: the certificates.
        height: ln(1/L) of the exponential loss at each.
    """

    found: tuple[Certificate, ...]
    height: Array

    @property
    def stationarity(self) -> Array:
        """χ."""
        return np.array([c.stationarity for c in self.found])

    @property
    def complementarity(self) -> Array:
        """ξ."""
        return np.array([c.complementarity for c in self.found])

    @property
    def residual(self) -> Array:
        """r(τ) with the best multipliers."""
        return np.array([c.residual for c in self.found])

    @property
    def last(self) -> list[int]:
        """Which points are fitted: the last four from ln(1/L) = 10 on, if there are so many."""
        return [i for i, height in enumerate(self.height) if height >= 10][-_FITTED:]

    @property
    def reaches(self) -> bool:
        """Whether the last points can show a rate."""
        return len(self.last) == _FITTED and bool(self.height[-1] >= _REACH)

    def exponent(self, values: Array) -> float:
        """The exponent of ``values`` in ln(1/L) over the last points; −∞ where they reach 0."""
        part = self.last
        if (values[part] <= 0).any():
            return -math.inf
        return exponent_of(values[part], self.height[part])


def certify(sites: Sequence[Site], derivative: Derivative) -> Certificates:
    """Certificates at those points that have L < 1/n, and that can be certified."""
    separated = [site for site in sites if site.smoothed > 0][-_MOST:]
    pairs = [(site, c) for site in separated if (c := _certificate(site, derivative)) is not None]
    height = [site.smoothed + math.log(len(site.y)) for site, _ in pairs]
    return Certificates(tuple(c for _, c in pairs), np.array(height, dtype=np.float64))


def _certificate(site: Site, derivative: Derivative) -> Certificate | None:
    name = site.loss.name
    try:
        return kkt_certificate(
            site.model,
            site.x,
            site.y,
            site.attack,
            loss=name if name in ("exponential", "logistic") else "exponential",
            tau=TAU,
            taus=[TAU],
            derivative=derivative,
            homogeneity=site.homogeneity,
        )
    except ModelError:
        return None
