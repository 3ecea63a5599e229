"""Theorem 4: what grows along the flow, and what need not."""

from __future__ import annotations

import numpy as np
import torch

from marginflow.attacks import Derivative
from marginflow.theorems._evidence import Evidence
from marginflow.theorems._hypotheses import (
    gradient_flow,
    homogeneous,
    of_the_objective,
    path_of,
    scale_invariant,
    true_derivative,
    two_classes,
)
from marginflow.theorems._path import Path
from marginflow.theorems._site import Layers, Site, pushforward
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_IDENTITY = 1e-9
_REST = 1e-3


def theorem_4(evidence: Evidence) -> tuple[Verdict, ...]:
    """The identity behind Eq. (18), what follows from it along the path, and what does not.

    With P_kG the part of G across W_k,

        Σ_i |ℓ′(m_i)| dγ̂_i/dt = (n/ρ) Σ_k ‖P_kG_k‖² ≥ 0,

    exactly, at every point where the derivative through δ(W) exists, with equal or unequal degrees.
    It follows that ``ℓ/ρ`` and ``ℓ/‖W‖^K``, ``ℓ = ln(1/(nL))``, grow along the flow once L < 1/n:
    ``d ln(ℓ/ρ)/dt ≥ (1/ν) Σ ‖P_kG_k‖²``. It does *not* follow that γ̂_m grows: the gaps between
    support vectors are O(1/ρ), against the theorem's ω(1/ρ).
    """
    shared = (gradient_flow(evidence, needed=True), *of_the_objective(evidence))
    return _identity(evidence), _monotone(evidence, shared), _least_margin(evidence, shared)


def _identity(evidence: Evidence) -> Verdict:
    derivative: Derivative = evidence.config["derivative"]
    claim = Claim(
        "Theorem 4 (identity)",
        "Σ_i |ℓ′(m_i)| dγ̂_i/dt = (n/ρ) Σ_k ‖P_kG_k‖² ≥ 0 where dW/dt = −G",
        (
            homogeneous(evidence),
            two_classes(evidence),
            scale_invariant(evidence),
            true_derivative(evidence),
        ),
        "largest |left − right| / right over points, the left side by a directional derivative "
        "of the margins through δ(W)",
        "0",
        f"{_IDENTITY:g} of the right side, which counts for no less than {_REST:g} of (n/ρ)‖G‖², "
        "whose small rest it may be",
    )
    unmet = claim.inapplicable
    if not evidence.sites or not evidence.data.binary:
        return unmet or claim.judge(None, "no point to examine")
    if not evidence.differentiable:
        return unmet or claim.judge(None, "another library's δ cannot be differentiated through")
    pairs = [_sides(site, derivative) for site in evidence.sites]
    errors = [
        abs(left - right) / max(right, _REST * whole) for left, right, whole in pairs if whole
    ]
    if not errors:
        return unmet or claim.judge(None, "the gradient vanishes at every point")
    shares = [right / whole for _, right, whole in pairs if whole]
    text = (
        f"{max(errors):.1e} ({evidence.where}); Σ‖P_kG_k‖² is {min(shares):.2g} to {max(shares):.2g} "
        "of ‖G‖²"
    )
    return claim.set_aside(text) or claim.judge(max(errors) <= _IDENTITY, text)


def _sides(site: Site, derivative: Derivative) -> tuple[float, float, float]:
    """Both sides of the identity times ``ρ/(n e^{2r})``, r = ln L, and ``‖G‖²/e^{2r}``."""
    slope = site.slope(derivative)
    moved, radial = _motion(site, slope.gradients)
    left = float((slope.weights * (moved - slope.margins * radial)).mean())
    square = torch.stack(
        [torch.stack([g.square().sum() for g in gs]).sum() for gs in slope.gradients]
    )
    across = _across(site, slope.gradients)
    return left, float(across.sum()), float(square.sum())


def _motion(site: Site, gradients: Layers) -> tuple[torch.Tensor, float]:
    """dm_i/dt, (n,), and d ln ρ/dt along dW/dt = −G, in units of the loss."""
    way = tuple(tuple(-g for g in gs) for gs in gradients)
    (moved,) = pushforward(site.adversarial_margins(), site.layers, [way])
    radial = (site.degrees * site.inner(way) / site.norms.square()).sum()
    return moved, float(radial)


def _across(site: Site, gradients: Layers) -> torch.Tensor:
    """``‖P_kG_k‖²``, (L,), from the projection itself: no difference of squares."""
    radial = site.inner(gradients) / site.norms.square()
    return torch.stack(
        [
            torch.stack(
                [(g - a * w.detach()).square().sum() for w, g in zip(ws, gs, strict=True)]
            ).sum()
            for ws, gs, a in zip(site.layers, gradients, radial, strict=True)
        ]
    )


def _monotone(evidence: Evidence, shared: tuple[Hypothesis, ...]) -> Verdict:
    claim = Claim(
        "Theorem 4 (monotone)",
        "ℓ/ρ and ℓ/‖W‖^K never fall once L < 1/n, ℓ = ln(1/(nL))",
        shared,
        "largest relative fall of either on a step or between records; least "
        "d ln(ℓ/ρ)/dt − (1/ν) Σ‖P_kG_k‖² at kept points, relative to d ln ρ/dt",
        "no fall; at least 0",
        f"{evidence.slack:g}: rounding, or the integrator's rtol = {evidence.rtol:g} up to 1e-6; "
        f"{_IDENTITY:g}",
    )
    path = path_of(evidence)
    unmet = claim.set_aside("" if path is None else path.course())
    if unmet or path is None or not path.has_separated:
        return unmet or claim.judge(None, "L < 1/n was not reached", "follow the flow further")
    largest = max(
        _on_steps(path, "largest_fall"),
        _on_steps(path, "largest_fall_by_total"),
        path.falls(path.smoothed[path.separated])[1],
        path.falls(path.smoothed_by_total[path.separated])[1],
    )
    excess = [e for site in evidence.sites if (e := _excess(site, evidence)) is not None]
    bound = f"{min(excess):.2g} at {len(excess)} points" if excess else "no kept point"
    text = f"{largest:.2g}; {bound}; {path.course()}"
    ok = largest <= evidence.slack and min(excess, default=0.0) >= -_IDENTITY
    return claim.judge(ok, text)


def _excess(site: Site, evidence: Evidence) -> float | None:
    """``(d ln(ℓ/ρ)/dt − (1/ν) Σ‖P_kG_k‖²)/(d ln ρ/dt)``, or None where L ≥ 1/n."""
    slope = site.slope(evidence.config["derivative"])
    if site.smoothed <= 0:
        return None
    moved, radial = _motion(site, slope.gradients)
    growth = float((torch.softmax(-slope.margins, dim=0) * moved).sum()) / site.smoothed - radial
    bound = float(_across(site, slope.gradients).sum()) / slope.nu
    return (growth - bound) / radial


def _on_steps(path: Path, name: str) -> float:
    values = path.series(name)
    return float(np.nanmax(values)) if bool(np.isfinite(values).any()) else 0.0


def _least_margin(evidence: Evidence, shared: tuple[Hypothesis, ...]) -> Verdict:
    claim = Claim(
        "Theorem 4 (γ̂_m)",
        "γ̂_m may fall on the way, but never below what ℓ/ρ has reached",
        shared,
        "least γ̂_m(t) − max_{s≤t} ℓ(s)/ρ(s), relative to the latter; falls of γ̂_m are counted, not judged",
        "at least 0 (as ℓ ≤ m_min ≤ ℓ + ln n, and ℓ/ρ grows)",
        f"{evidence.slack:g}, as for ℓ/ρ",
    )
    path = path_of(evidence)
    unmet = claim.set_aside("" if path is None else _margin_course(path))
    if unmet or path is None or not path.has_separated:
        return unmet or claim.judge(None, "L < 1/n was not reached", "follow the flow further")
    margin = path.series("normalized_margin")[path.separated]
    reached = np.maximum.accumulate(path.smoothed[path.separated])
    least = float(((margin - reached) / reached).min())
    return claim.judge(least >= -evidence.slack, f"{least:.3g}; {_margin_course(path)}")


def _margin_course(path: Path) -> str:
    if not path.has_separated:
        return "L < 1/n was not reached"
    values = path.series("normalized_margin")[path.separated]
    text = f"γ̂_m {values[0]:.5g} → {values[-1]:.5g} since L < 1/n"
    last = path.records[-1]
    steps = last.get("separated_steps")
    if steps and last.get("margin_falls") is not None:
        return f"{text}, falling on {last['margin_falls'] / steps:.2%} of {steps} steps"
    count, largest = path.falls(values)
    most = f", by {largest:.2g} at most" if count else ""
    return f"{text}, falling between {count} of {len(values) - 1} neighbouring records{most}"
