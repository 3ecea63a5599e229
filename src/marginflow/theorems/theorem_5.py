"""Theorem 5: the direction of the weights becomes that of a KKT point of the max-margin problem."""

from __future__ import annotations

import math

import numpy as np

from marginflow.theorems._certificates import TAU, Certificates
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import along_the_flow, path_of
from marginflow.theorems._path import Array
from marginflow.theorems._verdict import Claim, Verdict
from marginflow.theorems.lemma_12 import resolution

_TOLERANCE = 0.15
_SETTLED = 1e3
_ROUNDING = 1e-9
_ACCURATE = 1e-7  # of r: a residual of 1e-8 is as good as 0 where 1 − r² is what is solved for
_FIT = "exponent in ln(1/L), fitted over the last four of at most eight points above ln(1/L) = 10"
SLIDES = "the flow slides along a jump of its field; the certificate has the gradient of one side"


def theorem_5(evidence: Evidence) -> tuple[Verdict, ...]:
    """``V = W/m_min^{1/K}`` is a (χ, ξ)-approximate KKT point of (19), and χ, ξ → 0 (Definition 3).

    With the paper's multipliers (130), their missing 1/n put in:

        ξ = max_i λ_i (m_i/m_min − 1) ≤ ‖W‖²/(e K m_min^{1+2/K}),   ξ ~ 1/ln(1/L),
        χ = ‖V − Σ λ_i ∂m_i(V)‖ = ‖W‖ m_min^{−1/K} sqrt(2(1 + cos(W, ∇L))),   χ ~ (ln 1/L)^{−1/K},

    the latter from a generic start, see Lemma 12. Either may fall faster: ξ with a single support
    vector, χ from a balanced start. The third verdict needs neither rate nor the paper's multipliers:
    the distance to the cone of the nearly active gradients shrinks.
    """
    shared = along_the_flow(evidence)
    path = path_of(evidence)
    order = math.nan if path is None else path.order
    found = evidence.certificates
    complementarity = Claim(
        "Theorem 5 (ξ)",
        "complementarity ξ → 0 like 1/ln(1/L), within its bound",
        shared,
        f"{_FIT}; largest ξ/bound",
        "−1, or less; at most 1",
        f"{_TOLERANCE:.0%}: next-order terms at finite ln(1/L); {_ROUNDING:g}",
    )
    stationarity = Claim(
        "Theorem 5 (χ)",
        "stationarity χ → 0 like (ln 1/L)^{−1/K} from a generic start",
        shared,
        _FIT,
        f"−1/K = {-1 / order:.4g}, or less",
        f"{_TOLERANCE:.0%}: next-order terms at finite ln(1/L)",
    )
    direction = Claim(
        "Theorem 5 (direction)",
        "W/‖W‖ tends to the direction of a KKT point of min ½‖W‖² s.t. m_i ≥ 1",
        shared,
        f"relative residual r of the best multipliers on the examples with m_i ≤ {1 + TAU:g} m_min, "
        "over the same points",
        "falls from each to the next",
        f"none above {_ACCURATE:g}, the accuracy of r",
    )
    claims = (complementarity, stationarity, direction)
    texts = _measured(found)
    unmet = [claim.set_aside(text) for claim, text in zip(claims, texts, strict=True)]
    if any(unmet) or not found.found:
        return tuple(
            verdict or claim.judge(None, "no kept point has L < 1/n", evidence.further)
            for claim, verdict in zip(claims, unmet, strict=True)
        )
    if sliding(evidence):
        return tuple(c.judge(None, text, SLIDES) for c, text in zip(claims, texts, strict=True))
    return (
        _complementarity(evidence, complementarity, texts[0]),
        _stationarity(evidence, stationarity, texts[1], order),
        _direction(evidence, direction, texts[2]),
    )


def _complementarity(evidence: Evidence, claim: Claim, text: str) -> Verdict:
    found = evidence.certificates
    share = max(c.complementarity / c.complementarity_bound for c in found.found)
    text = f"{text}; {share:.3g} of the bound"
    if share > 1 + _ROUNDING:
        return claim.judge(False, text)
    # While the gap of a near support vector still grows to 1, ξ stands still: slow is no failure.
    return _rate(evidence, claim, found.complementarity, -1.0, 0.0, text)


def _stationarity(evidence: Evidence, claim: Claim, text: str, order: float) -> Verdict:
    found = evidence.certificates
    if found.found[-1].cosine_gap <= resolution(evidence):
        return claim.judge(None, text, "1 + cos is below what the integrator resolves")
    slowest = -1 / order * (1 - _TOLERANCE)
    return _rate(evidence, claim, found.stationarity, -1 / order, slowest, text)


def _rate(
    evidence: Evidence,
    claim: Claim,
    values: Array,
    predicted: float,
    slowest: float,
    text: str,
) -> Verdict:
    """Whether the values fall as predicted; a failure if slower than ``slowest``, far along the path."""
    found = evidence.certificates
    if not found.reaches:
        return claim.judge(None, text, f"ln(1/L) must span a decade above 10: {evidence.further}")
    slope = found.exponent(values)
    text = f"{slope:.4g} up to ln(1/L) = {found.height[-1]:.4g}; {text}"
    if slope <= predicted * (1 - _TOLERANCE):
        return claim.judge(True, text)
    if slope >= slowest and found.height[-1] >= _SETTLED:
        return claim.judge(False, text)
    return claim.judge(None, text, evidence.further)


def _direction(evidence: Evidence, claim: Claim, text: str) -> Verdict:
    found = evidence.certificates
    if not found.reaches:
        return claim.judge(None, text, f"ln(1/L) must span a decade above 10: {evidence.further}")
    values = np.maximum(found.residual[found.last], _ACCURATE)
    there = bool(values[-1] <= _ACCURATE)
    if there or bool((np.diff(values) < 0).all()):
        return claim.judge(True, text)
    # An example that leaves the support on the way makes r rise once: the whole stretch decides.
    rises = bool(values[-1] >= values[0])
    return claim.judge(False if rises else None, text, "" if rises else evidence.further)


def _measured(found: Certificates) -> tuple[str, str, str]:
    """What is shown for each of the three verdicts: the first value, the last, and r in words."""
    if not found.found:
        return "", "", ""
    first, last = found.found[0], found.found[-1]
    used, n = len(last.support), len(last.margins)
    words = "" if last.residual <= 0.7 else ": far from a KKT point, as networks in practice are"
    return (
        f"ξ {first.complementarity:.3g} → {last.complementarity:.3g}",
        f"χ {first.stationarity:.3g} → {last.stationarity:.3g}",
        f"r {first.residual:.4g} → {last.residual:.4g} on {used} of {n} examples, "
        f"{last.residuals.best:.4g} on all{words}",
    )


def sliding(evidence: Evidence) -> bool:
    """Whether the flow ran along a surface on which its field jumps."""
    return any(record.get("sliding") for record in evidence.run.metrics)
