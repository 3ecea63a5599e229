"""What :func:`~marginflow.ascent.maximize_linear` returns.

Source: the margin of Section 3.1 and the bound of its dual problem (Eq. 143).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_FIT_OVER = 100.0
_FIT_FROM = 10


class LinearPoint(NamedTuple):
    """The best so far after ``step`` steps: ``margin <= γ* <= bound``, in the units of x.

    Attributes:
        step: how many steps were taken.
        margin: ``min_i y_i <u, x_i> − ε‖u‖_q`` there, in the units of x.
        bound: the least bound so far, in the units of x.
    """

    step: int
    margin: float
    bound: float


@dataclass(frozen=True, eq=False)
class LinearMaximum:
    """A predictor, its margin, and a proof that no other has a much larger one.

    Attributes:
        method: ``dual`` or ``normalized``.
        eps: radius of the perturbations, in the units of x.
        p: their exponent.
        direction: the best unit vector found, shape (d,); zeros if there is none.
        weights: ``direction/margin``, shape (d,), so that ``min_i y_i <w, x_i> − ε‖w‖_q = 1``: the
            robust SVM's. Zeros unless the margin is positive.
        margin: ``min_i y_i <u, x_i> − ε‖u‖_q`` at u = direction, in the units of x; 0 without one.
        bound: ``‖Σ_i α_i y_i x_i − δ‖₂ >= γ*``, in the units of x, for the α and δ below.
        multipliers: α, shape (n,), >= 0, sum 1. The robust SVM's own are ``α/γ*²``.
        perturbation: δ, shape (d,), ``‖δ‖_p <= ε``: the worst for the predictor
            ``Σ_i α_i y_i x_i − δ``; example i becomes ``x_i − y_i δ``.
        steps: steps taken; ``steps + 1`` gradients of ln L, the last for the certificate alone.
        converged: whether ``relative_gap`` is at most what was asked for.
        separable: whether ``γ* > 0``: True when margin > 0 shows it, False when
            bound <= 1e-12·max_i ‖x_i‖₂ does, None when neither.
        path: the best so far at log-spaced steps, and at the last.
        advice: empty if converged, else what to do.
    """

    method: str
    eps: float
    p: float
    direction: Tensor
    weights: Tensor
    margin: float
    bound: float
    multipliers: Tensor
    perturbation: Tensor
    steps: int
    converged: bool
    separable: bool | None
    path: tuple[LinearPoint, ...]
    advice: str

    @property
    def gap(self) -> float:
        """``bound − margin >= γ* − margin``, in the units of x; >= 0 up to rounding."""
        return self.bound - self.margin

    @property
    def relative_gap(self) -> float:
        """``(bound − margin)/bound``; infinite when the bound is 0."""
        return self.gap / self.bound if self.bound > 0.0 else math.inf

    @property
    def angle_bound(self) -> float:
        """A proven bound, in radians, on the angle from ``direction`` to the best direction.

        ``arccos(margin/bound)``: with the constraints at margin 1, ``direction/margin`` is feasible and
        the best w is the point of the feasible set nearest to 0. π without a positive margin.
        """
        if self.margin <= 0.0:
            return math.pi
        relative = max(self.relative_gap, 4.0 * torch.finfo(torch.float64).eps)
        return 2.0 * math.asin(math.sqrt(relative / 2.0))

    @property
    def rate(self) -> float:
        """The exponent a of ``gap ~ C t^{−a}``, fitted on ``path``: see :func:`fitted_rate`."""
        return fitted_rate(self.path)


def fitted_rate(path: tuple[LinearPoint, ...]) -> float:
    """The exponent a of ``gap ~ C t^{−a}``: least squares of ln gap on ln t.

    Over the last two decades of steps, from step 10, where the gap is positive beyond
    rounding (1e-13 of the bound). NaN with fewer than three such points. The adaptive method's gap
    falls faster than any power, and its a only says how steeply on average.
    """
    from_step = max(_FIT_FROM, path[-1].step / _FIT_OVER) if path else 0
    chosen = [
        (math.log(step), math.log(bound - margin))
        for step, margin, bound in path
        if step >= from_step and bound - margin > 1e-13 * bound
    ]
    if len(chosen) < 3:
        return math.nan
    t, gap = torch.tensor(chosen, dtype=torch.float64).T
    t = t - t.mean()
    return float(-(t @ gap) / (t @ t))
