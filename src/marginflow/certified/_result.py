"""Lower bounds of adversarial margins, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from marginflow.errors import ModelError

Method = Literal["auto", "crown", "interval", "norms"]
"""How bounds are found: see :func:`certified_margins`."""
METHODS: tuple[Method, ...] = ("auto", "crown", "interval", "norms")
"""Every :data:`Method`."""


@dataclass(frozen=True, eq=False)
class CertifiedMargins:
    """What no perturbation of the ball can bring n margins below.

    Source: Gowal et al. (2018) for ``interval``, Zhang et al. (2018) for ``crown``.

    Attributes:
        values: c_i, (n,), float64: ``c_i ≤ m_i(x_i + δ)`` for every ``‖δ‖_p ≤ ε`` with x_i + δ in the
            bounds, of the network in exact arithmetic: rounding is taken off already.
        rounding: what was taken off for it, (n,).
        evaluation: by how much a plain evaluation of m_i in float64 can be off, (n,), at most.
        method: ``crown``, ``interval`` or ``norms``.
        reason: why this method, where the choice was left open; else empty.
        p, eps: the ball: the exponent of its norm and its radius ε, in the units of x.
        rho: ρ = Π ρ_k^{c_k} of the network, or None where its layers were not given.
    """

    values: Tensor
    rounding: Tensor
    evaluation: Tensor
    method: str
    reason: str
    p: float
    eps: float
    rho: float | None = None

    @property
    def normalized(self) -> Tensor:
        """``c_i / ρ``, (n,), below γ̂_i.

        Raises:
            ModelError: ρ is not known.
        """
        if self.rho is None:
            raise ModelError(
                "these bounds are not normalised; give the layers: "
                "homogeneity=mf.measure_homogeneity(model, x)"
            )
        return self.values / self.rho

    @property
    def min(self) -> float:
        """``min_i c_i``."""
        return float(self.values.min())

    @property
    def normalized_min(self) -> float:
        """``min_i c_i / ρ``, below γ̂_m.

        Raises:
            ModelError: ρ is not known.
        """
        return float(self.normalized.min())

    @property
    def accuracy(self) -> float:
        """Share of examples with ``c_i > 0``: no perturbation of the ball changes their class."""
        return float((self.values > 0).double().mean())

    def __str__(self) -> str:
        n = len(self.values)
        text = f"certified by {self.method}: {self.accuracy:.4g} of {n} examples, min c = {self.min:.4g}"
        return text + (f" ({self.reason})" if self.reason else "")
