"""Lemma 12: the weights align with the negative gradient, and how fast."""

from __future__ import annotations

import math

import numpy as np
import torch

from marginflow.attacks import Derivative
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import along_the_flow, path_of
from marginflow.theorems._path import Array, exponent_of, last_third
from marginflow.theorems._site import Site
from marginflow.theorems._verdict import Claim, Verdict

_TOLERANCE = 0.15
_SETTLED = 1e3
_SLIDES = "the flow slides along a jump of its field, and the recorded gradient is that of one side"


def lemma_12(evidence: Evidence) -> tuple[Verdict, ...]:
    """``cos(W, ∇L) → −1`` along the flow (Eq. 132), with a rate that the paper does not state.

    Components of W that the gradient never touches (the conserved quantities of Lemma 11 and of each
    layer's rows) keep their size while ``‖W‖ ~ (ln 1/L)^{1/K}``, so that from a generic start

        1 + cos ~ (ln 1/L)^{−2/K}.

    Without them, as from a balanced start, it is faster: only the turning of W is left, with exponent
    −2 where it is that of a linear predictor. So the exponent is bounded from one side.
    """
    shared = along_the_flow(evidence)
    limit = Claim(
        "Lemma 12",
        "cos(W, ∇L) → −1",
        shared,
        "1 + cos since L < 1/n, and the exponent of its last third in ln ln(1/L)",
        "falls to 0: the exponent is negative, and the last value the smallest",
        "undecided below ln(1/L) = 100, and where the exponent is within −1/K of 0",
    )
    path = path_of(evidence)
    predicted = math.nan if path is None else 2 / path.order
    rate = Claim(
        "Lemma 12 (rate)",
        "1 + cos(W, ∇L) ~ (ln 1/L)^{−2/K} from a generic start, faster from a balanced one",
        shared,
        "exponent of 1 + cos in ln(1/L), fitted over the last third of ln ln(1/L) above 10",
        f"−2/K = {-predicted:.4g}, or less",
        f"{_TOLERANCE:.0%}: next-order terms at finite ln(1/L)",
    )
    height, values, norms = _course(evidence)
    text = f"1 + cos {values[0]:.3g} → {values[-1]:.3g}" if len(values) else ""
    unmet = [claim.set_aside(text) for claim in (limit, rate)]
    if unmet[0] and unmet[1]:
        return unmet[0], unmet[1]

    def undecided(measured: str, advice: str) -> tuple[Verdict, ...]:
        return limit.judge(None, measured, advice), rate.judge(None, measured, advice)

    if not len(values) or path is None:
        return undecided("no point with L < 1/n", evidence.further)
    if any(record.get("sliding") for record in path.records):
        return undecided(text, _SLIDES)
    part = last_third(height)
    if part is None:
        return undecided(text, f"ln(1/L) must span a decade above 10: {evidence.further}")
    if values[-1] <= resolution(evidence):
        unresolved = "1 + cos is below what the integrator resolves"
        return limit.judge(True, text), rate.judge(None, text, unresolved)
    slope = exponent_of(values[part], height[part])
    text = f"exponent {slope:.4g} up to ln(1/L) = {height[-1]:.4g}; {text}"
    lowest = bool(values[-1] <= values.min())
    towards = False if slope >= 0 else True if lowest and slope <= -predicted / 2 else None
    # Kept components are seen as ‖W‖^{−2}: while ‖W‖ still hardly grows, that is slow, and no failure.
    by_growth = -2 * exponent_of(norms[part], height[part])
    within: bool | None = slope <= -predicted * (1 - _TOLERANCE)
    if not within and slope < 0:
        explained = slope <= by_growth * (1 - _TOLERANCE)
        within = None if explained or height[-1] < _SETTLED else False
    return (
        limit.judge(towards, text, evidence.further if towards is None else ""),
        rate.judge(within, text, evidence.further if within is None else ""),
    )


def resolution(evidence: Evidence) -> float:
    """Below this 1 + cos is the integrator's error, which turns W by up to 1000 tolerances."""
    return min(max(1e-12, 1e3 * evidence.rtol) ** 2, 1e-6)


def _course(evidence: Evidence) -> tuple[Array, Array, Array]:
    """ln(1/L), 1 + cos and ‖W‖ at the points with L < 1/n, as recorded, else at the kept ones."""
    rows = [
        (-float(r["log_loss"]), float(r["one_plus_cosine"]), math.hypot(*r["layer_norms"]))
        for r in evidence.run.metrics
        if r.get("one_plus_cosine") is not None
    ]
    if not rows:
        shift = math.log(len(evidence.sample[1]))
        derivative = evidence.config["derivative"]
        rows = [
            (site.smoothed + shift, _one_plus_cosine(site, derivative), float(site.norms.norm()))
            for site in evidence.sites
        ]
    kept = [row for row in rows if row[0] > math.log(evidence.data.n) and row[1] > 0]
    found = np.array(kept, dtype=np.float64).reshape(-1, 3)
    return found[:, 0], found[:, 1], found[:, 2]


def _one_plus_cosine(site: Site, derivative: Derivative) -> float:
    """``½ ‖W/‖W‖ + G/‖G‖‖²``, without cancellation; NaN where G = 0."""
    flat = torch.cat([w.detach().flatten() for ws in site.layers for w in ws])
    slope = torch.cat([g.flatten() for gs in site.slope(derivative).gradients for g in gs])
    size = float(torch.linalg.vector_norm(slope))
    if size == 0:
        return math.nan
    gap = flat / torch.linalg.vector_norm(flat) + slope / size
    return 0.5 * float(gap @ gap)
