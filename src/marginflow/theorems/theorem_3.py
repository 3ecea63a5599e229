"""Theorem 3 and Corollary 1: how fast the weights grow and the loss falls."""

from __future__ import annotations

import math

import numpy as np

from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import gradient_flow, of_the_objective, path_of
from marginflow.theorems._path import Path
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_FAR, _SETTLED = 50.0, 1e3
_SINCE = 10.0  # ln t since L < 1/n: before that t still counts the time that it took to get there
_RATIO = 0.01
_RATE = 0.05
_EXPONENT = 0.10
_DISCRETE = "the steps are discrete and not small: follow the gradient flow"
_FURTHER = "go further: the next terms are of the order ln ln t/ln t"


def theorem_3(evidence: Evidence) -> tuple[Verdict, ...]:
    """``ρ = Θ(ln t)``, ``L = Θ(1/(t (ln t)^{2−2/K}))`` and ``ρ_k ~ (ln t)^{1/K}`` for every layer.

    The paper's proof fails (Eq. 116), the statement does not: ``d ln(ℓ/ρ)/dt ≥ 0`` bounds ρ from both
    sides, and sharper ``ρ γ̂_m/ln t → 1``. The rates follow from ``d(1/L)/dt = ‖∇L‖²/L²``: up to
    1/ln t,

        1/(tL) = m² Σ_k c_k²/ρ_k²,   m = ρ γ̂_m,

    beside the share of the gradient across the weights, which tends to 0. That relation tells a slow
    approach from a wrong rate.
    """
    shared = (
        gradient_flow(evidence, needed=False),
        evidence.is_gradient_descent(),
        *of_the_objective(evidence),
    )
    return _growth(evidence, shared), _rate(evidence, shared), _corollary_1(evidence, shared)


def _growth(evidence: Evidence, shared: tuple[Hypothesis, ...]) -> Verdict:
    claim = Claim(
        "Theorem 3 (growth)",
        "ρ = Θ(ln t) → ∞, and ρ γ̂_m/ln t → 1",
        shared,
        "ρ γ̂_m/ln t at the end; falls of ρ since L < 1/n",
        "1; none",
        f"{_RATIO:.0%} from ln t = {_SETTLED:g} on: what is left is (2 − 2/K) ln ln t/ln t",
    )
    path = path_of(evidence)
    unmet = claim.set_aside("" if path is None else path.course())
    if unmet or path is None or not path.has_separated:
        return unmet or claim.judge(None, "L < 1/n was not reached", evidence.further)
    falls, largest = path.falls(path.log_rho[path.separated], logarithms=True)
    text = f"ρ {_power(path, path.separated.start)} → {_power(path, -1)}, {falls} falls"
    margin, log_time = path.series("margin"), path.series("log_time")
    if path.log_time > 1:
        half = int(np.nanargmin(np.abs(log_time - path.log_time / 2)))
        text = (
            f"{margin[-1] / path.log_time:.5g} at ln t = {path.log_time:.4g} "
            f"({margin[half]:.5g} / {log_time[half]:.4g} half way); {text}"
        )
    if evidence.is_flow and largest > evidence.slack:
        return claim.judge(False, text)
    if not _is_far(path):
        return claim.judge(None, text, f"ln t is still below {_FAR:g}: {evidence.further}")
    # ln(1/L) lies between m and m + ln n; a gradient across the weights adds at most 1.
    gap = path.log_time + _log_speed(path) - margin[-1]
    if not -1.0 <= gap <= math.log(path.n) + 1.0:
        return _judge(evidence, claim, False, text)
    close = abs(margin[-1] / path.log_time - 1) <= _RATIO and path.log_time >= _SETTLED
    return claim.judge(close or None, text, "" if close else _FURTHER)


def _rate(evidence: Evidence, shared: tuple[Hypothesis, ...]) -> Verdict:
    path = path_of(evidence)
    exponent = math.nan if path is None else 2 - 2 / path.order
    claim = Claim(
        "Theorem 3 (rate)",
        "L = Θ(1/(t (ln t)^{2−2/K}))",
        shared,
        "exponent of tL in ln t, fitted over the last third of ln ln t above ln t = 10",
        f"−(2 − 2/K) = {-exponent:.4g}",
        f"{_RATE:.0%}: next-order terms at finite ln t",
    )
    unmet = claim.set_aside("" if path is None else path.course())
    if unmet or path is None or not path.has_separated:
        return unmet or claim.judge(None, "L < 1/n was not reached", evidence.further)
    part = path.last_part()
    if part is None or not _is_past(path):
        return claim.judge(
            None, f"ln t = {path.log_time:.4g}", "ln t must span a decade above 10: go further"
        )
    slope = path.slope(path.log_tl, part)
    gap = float(-path.log_tl[-1] - _log_speed(path))
    text = (
        f"{slope:.4g} up to ln t = {path.log_time:.4g}; ln(1/(tL)) − ln(m² Σ c_k²/ρ_k²) = {gap:.2g}"
    )
    if abs(slope + exponent) <= _RATE * max(1.0, exponent):
        return claim.judge(True, text)
    explained = -20 / path.log_time <= gap <= 1.0
    if explained:
        return claim.judge(None, text, _FURTHER)
    return _judge(evidence, claim, False, text)


def _corollary_1(evidence: Evidence, shared: tuple[Hypothesis, ...]) -> Verdict:
    path = path_of(evidence)
    exponent = math.nan if path is None else 1 / path.order
    claim = Claim(
        "Corollary 1",
        "ρ_k → ∞ for every layer, like (ln t)^{1/K}",
        shared,
        "falls of the ρ_k since L < 1/n; exponents of ρ_k in ln t, fitted as for the rate",
        f"none; 1/K = {exponent:.4g} for each layer",
        f"{_EXPONENT:.0%}: layers keep the differences that they start with (Lemma 11)",
    )
    unmet = claim.set_aside("" if path is None else path.course())
    if unmet or path is None or not path.has_separated:
        return unmet or claim.judge(None, "L < 1/n was not reached", evidence.further)
    inside = path.norms[path.separated]
    found = [path.falls(column) for column in inside.T]
    count, largest = sum(f[0] for f in found), max(f[1] for f in found)
    growth = f"{inside[0].min():.4g} → {inside[-1].min():.4g} the smallest, {count} falls"
    if evidence.is_flow and largest > evidence.slack:
        return claim.judge(False, growth)
    part = path.last_part()
    if part is None or not _is_past(path):
        return claim.judge(None, growth, "ln t must span a decade above 10: go further")
    exponents = np.array([path.slope(np.log(column), part) for column in path.norms.T])
    text = f"{', '.join(f'{e:.3f}' for e in exponents)}; {growth}"
    if np.abs(exponents - exponent).max() <= _EXPONENT * exponent:
        return claim.judge(True, text)
    # What Lemma 11 leaves at finite norms: d ln ρ_k/d ln ρ = (c_k/ρ_k²)/Σ_j c_j²/ρ_j².
    inverse = path.degrees / np.square(path.norms[part][part.sum() // 2])
    whole = float(exponents @ path.degrees)
    expected = whole * inverse / (inverse @ path.degrees)
    apart = bool(np.abs(exponents - expected).max() > _EXPONENT * exponent)
    stalled = whole < 0.5 and path.log_time >= _SETTLED
    if apart or stalled:
        return _judge(evidence, claim, False, text)
    return claim.judge(None, text, _FURTHER)


def _judge(evidence: Evidence, claim: Claim, ok: bool, text: str) -> Verdict:
    """A verdict in which discrete steps are no counterexample."""
    if evidence.is_flow:
        return claim.judge(ok, text)
    return claim.judge(ok or None, text, "" if ok else _DISCRETE)


def _log_speed(path: Path) -> float:
    """``ln(m² Σ_k c_k²/ρ_k²)`` at the end."""
    margin = float(path.series("margin")[-1])
    if margin <= 0:
        return -math.inf
    return 2 * math.log(margin) + math.log(float(((path.degrees / path.norms[-1]) ** 2).sum()))


def _is_past(path: Path) -> bool:
    """Whether t is far beyond the time at which L fell below 1/n."""
    start = path.series("log_time")[path.separated][0]
    return bool(np.isnan(start)) or path.log_time - float(start) >= _SINCE


def _is_far(path: Path) -> bool:
    return path.log_time >= _FAR and _is_past(path)


def _power(path: Path, index: int) -> str:
    """ρ at one record, also where it overflows."""
    log = float(path.log_rho[index])
    return f"{math.exp(log):.4g}" if abs(log) < 700 else f"e^{log:.4g}"
