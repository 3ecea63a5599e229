"""Steepest descent in any norm: ℓ/‖W‖^K never falls along the flow of that norm.

Not of Lyu & Zhu: for ℓ2 it is Lyu & Li (2020), for other norms Tsilivis, Gronich, Vardi & Kempe
(2025), for networks without an adversary. Derived anew in :func:`verify_steepest`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import nn

from marginflow._checks import real, whole
from marginflow.ascent import Adam, Falls, SteepestFlow, SteepestPath, get_geometry
from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.errors import InputError, NotHomogeneousError
from marginflow.flow import Jumps
from marginflow.theorems._verdict import Claim, Hypothesis, Verdict

_LARGEST = 20_000  # weights: three paths of some thousand steps take seconds, and not minutes
_FINER = (1, 2, 4)
_AGAIN = (
    1,
    4,
)  # where falls stay: a stiff ℓ (δ turns fast where ∇_x f is small) needs smaller steps
_LINKS = 1e-9
_VANISHING = 1 / 3  # what is left of the falls for steps a quarter as long; first order: 1/4
_STAYING = 0.75  # what is left at least of falls of the flow itself
_NEGLIGIBLE = 1e-4  # of the rise of ln(ℓ/‖W‖^K): too little to be told from a step's error
_POINTS = 50  # at which zigzagging paths are compared
_SLIDING = 2.0


@dataclass(frozen=True, eq=False)
class _Measured:
    """The same piece of the flow at three step sizes, coarsest first."""

    paths: tuple[SteepestPath, ...]
    jumps: Jumps
    examples: int

    @property
    def more_turns(self) -> float:
        """How much more ∇ℓ turns along the finest path than along the coarsest: 1 where it is smooth.

        Across a jump steps zigzag, as often as there are steps: 4.
        """
        coarsest, finest = (float(self.paths[k].turns.sum()) for k in (0, -1))
        return finest / coarsest if coarsest > 0 else 1.0

    @property
    def sliding(self) -> bool:
        """Whether the steps zigzag across something that they do not resolve."""
        return self.more_turns > _SLIDING

    @property
    def falls(self) -> tuple[Falls, ...]:
        """Of each path: from step to step, or between the same points of all where they zigzag."""
        apart = max(1, len(self.paths[0]) // _POINTS)
        return tuple(
            path.falls(every=apart * finer if self.sliding else 1)
            for path, finer in zip(self.paths, _FINER, strict=True)
        )

    @property
    def vanishing(self) -> bool:
        """Whether the falls go with the step."""
        first, last = self.falls[0].total, self.falls[-1].total
        return last == 0 or (math.isfinite(first) and last <= _VANISHING * first)

    @property
    def open(self) -> bool:
        """Whether smaller steps might still show that what is left of them is error."""
        first, last = self.falls[0].total, self.falls[-1].total
        height = self.paths[-1].log_ratio()
        negligible = last <= _NEGLIGIBLE * float(height.max() - height[0])
        return negligible or not math.isfinite(first) or last < _STAYING * first

    @property
    def links(self) -> tuple[float, float]:
        """Least ``(⟨W,∇ℓ⟩ − Kℓ)`` or ``(K(ℓ + ln n) − ⟨W,∇ℓ⟩)``, and ``(‖W‖‖∇ℓ‖_* − ⟨W,∇ℓ⟩)``.

        Relative to ``‖W‖‖∇ℓ‖_*``, over the points with ℓ > 0.
        """
        euler, hoelder = math.inf, math.inf
        for path in self.paths:
            inside = path.smoothed > 0
            most = (path.norms[path.geometry] * path.dual)[inside]
            low = path.order * path.smoothed[inside]
            high = low + path.order * math.log(self.examples)
            inner = path.inner[inside]
            sides = np.minimum(inner - low, high - inner) / most
            euler = min(euler, float(sides.min()))
            hoelder = min(hoelder, float(((most - inner) / most).min()))
        return euler, hoelder

    def __str__(self) -> str:
        last, falls = self.paths[-1], self.falls
        ratio = np.exp(last.log_ratio())
        euler, hoelder = self.links
        sums = ", ".join(f"{fall.total:.2g}" for fall in falls)
        each = last.falls()
        share = f"{each.count} of {each.pairs} steps"
        beside = ", ".join(
            f"{last.falls(name).count} in the norm {name}"
            for name in last.norms
            if name != last.geometry
        )
        between = f"between {falls[-1].pairs} points " if self.sliding else ""
        return (
            f"ℓ/‖W‖^K {ratio[0]:.4g} → {ratio[-1]:.4g} as ℓ {last.smoothed[0]:.3g} → "
            f"{last.smoothed[-1]:.4g}; sums of falls {between}{sums} for η = {self.paths[0].step:g}, "
            f"η/2, η/4, there on {share} ({beside}); least slack {euler:.2g} in "
            f"Kℓ ≤ ⟨W,∇ℓ⟩ ≤ K(ℓ + ln n), {hoelder:.2g} in ⟨W,∇ℓ⟩ ≤ ‖W‖‖∇ℓ‖_*"
        )


def verify_steepest(
    model: nn.Module,
    data: Dataset,
    attack: Attack | None = None,
    *,
    norm: str = "sign",
    steps: int = 300,
    step: float = 0.05,
) -> Verdict:
    """``ℓ/‖W‖^K`` never falls along steepest descent of ln L in the norm ‖·‖, once L < 1/n.

    With ``ℓ = −ln Σ e^{−m_i}``, ``q = softmax(−m)`` and ``g = ∇ℓ = Σ q_i ∇m_i`` the flow is
    ``dW/ds = ‖g‖_* V``, V ∈ argmax_{‖V‖ ≤ 1} ⟨V, g⟩, so that

        dℓ/ds = ⟨g, dW/ds⟩ = ‖g‖_*²,    d‖W‖/ds ≤ ‖dW/ds‖ = ‖g‖_*,

    whichever V is taken where there are several. The margins are homogeneous of degree
    ``K = Σ c_k`` in all of W, also under a scale invariant attack if ∇ goes through δ(W): Euler's
    identity gives ``⟨W, g⟩ = K Σ q_i m_i``. And ``m_i = ℓ − ln q_i``, so ``Σ q_i m_i = ℓ + H(q)`` with the
    entropy ``0 ≤ H ≤ ln n``. Together

        Kℓ ≤ ⟨W, g⟩ ≤ ‖W‖ ‖g‖_*,
        d ln(ℓ/‖W‖^K)/ds ≥ (‖g‖_*/(ℓ‖W‖)) (‖W‖‖g‖_* − Kℓ) ≥ 0    for ℓ > 0.

    Nothing but homogeneity of degree K in all of W is used: neither equal degrees nor a norm made of
    layers. In *another* norm the ratio may fall.

    The model's own flow is followed in float64 from its weights until L < 1/n, and from there three
    times over the same piece, by Euler's steps of η, η/2 and η/4 (:class:`SteepestFlow`); where falls
    stay, once more by steps of a quarter of these. sgn and UVᵀ jump where an entry or singular value of g
    passes 0; the steps then zigzag, while the flow goes on with a V between, which is a maximiser as
    well. A step of length τ is off by O(τ²), so falls that are not the flow's vanish like η.

    Where g itself jumps (a ReLU's kink), or turns without bound (FGM at ∇_x f = 0), steps may slide
    along the place: each may fall by O(η), by zigzag alone, so that such paths are compared at some
    fifty points. For ℓ2 they tend to the
    flow of least g between the sides, to which the proof applies. For other norms a mean of the sides'
    V need not be a maximiser for any g between them: with g = (5, 1, 1) and (1, −1, −5) on the sides
    signs slide with dℓ/ds = 4 per unit of length, the least ‖g‖₁ between is 5. Falls that stay prove
    nothing there, and the statement is set aside.

    Args:
        model: a network of at most 20 000 weights; it is copied.
        data: two classes.
        attack: δ, or None.
        norm: ``l2``, ``sign``, ``l1``, ``spectral``; or ``adam``, for which nothing is claimed and the share
            of falling steps is measured in the norm of ``sign``.
        steps: at the largest η.
        step: the largest η; ``steps · η`` is by how much ℓ grows, at most and to first order.

    Raises:
        SpecificationError: an unknown norm.
        InputError: too large a network, no step.
    """
    geometry = get_geometry(norm)
    whole("steps", steps, least=1)
    real("step", step, above=0.0)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if size > _LARGEST:
        raise InputError(
            f"model: expected at most {_LARGEST} weights, got {size}; judge a smaller network"
        )
    given = [
        Hypothesis("two classes and one output", data.binary),
        Hypothesis(
            "a scale invariant attack (Definition 1)", attack is None or attack.scale_invariant
        ),
    ]
    if isinstance(geometry, Adam):
        betas = "β₁ = {:g}, β₂ = {:g}".format(*geometry.betas)
        given.append(Hypothesis("steps without a memory of earlier gradients", False, betas))
    try:
        flow = SteepestFlow(model, data, attack, geometry=norm)
    except NotHomogeneousError as error:
        given.insert(0, Hypothesis("a homogeneous network", False, f"not {error.offender!r}"))
        return _claim(norm, given).set_aside() or _claim(norm, given).judge(None, "")
    given.insert(0, Hypothesis("a homogeneous network", True, f"K = {flow.order:g}"))
    if not data.binary:
        return _claim(norm, given).set_aside() or _claim(norm, given).judge(None, "")
    start = flow.separated()
    given.append(Hypothesis("L < 1/n", start is not None or None))
    if start is None:
        claim = _claim(norm, given)
        advice = "the steepest flow from these weights does not get there: train the network first"
        return claim.set_aside() or claim.judge(None, "L < 1/n was not reached", advice)
    for again in _AGAIN:
        paths = tuple(
            flow.follow(start, step=step / (k * again), steps=steps * k * again) for k in _FINER
        )
        found = _Measured(paths, flow.jumps(paths[-1]), data.n)
        if found.vanishing or found.jumps.loss > 0:
            break
    return _judge(norm, given, found)


def _judge(norm: str, given: list[Hypothesis], found: _Measured) -> Verdict:
    jumps = found.jumps
    given.append(
        Hypothesis(
            "ln L continuous along the path",
            jumps.loss == 0,
            f"it jumps by {jumps.loss:.1g}" if jumps.loss else "",
        )
    )
    zigzag = f"it turns {found.more_turns:.2g} times as much by steps a quarter as long"
    if jumps.field:
        zigzag += f", and jumps by {jumps.field:.1g} of itself"
    # Sufficient: falls that go with the step are no falls of the flow, on whatever it slides.
    given.append(
        Hypothesis(
            "∇ ln L continuous along the path, or its jumps crossed",
            not found.sliding,
            zigzag if found.sliding else "",
            needed=not found.vanishing,
        )
    )
    claim, text = _claim(norm, given), str(found)
    if unmet := claim.set_aside(text):
        return unmet
    if min(found.links) < -_LINKS:
        return claim.judge(False, text)
    if found.vanishing:
        return claim.judge(True, text)
    if found.open:
        return claim.judge(None, text, "the falls may be the steps' error: take smaller steps")
    return claim.judge(False, text)


def _claim(norm: str, hypotheses: list[Hypothesis]) -> Claim:
    return Claim(
        f"Steepest descent ({norm})",
        "ℓ/‖W‖^K never falls along steepest descent in the norm ‖·‖ once L < 1/n, ℓ = ln(1/(nL))",
        hypotheses,
        "sum of the falls of ln(ℓ/‖W‖^K) at three step sizes; slack of the inequalities that it follows "
        "from at every point, relative to ‖W‖‖∇ℓ‖_*",
        "falls vanish with the step; slack at least 0",
        f"a step's error is of second order, so their sum of first: for steps a quarter as long at most "
        f"{_VANISHING:.2g} of it is left; {_LINKS:g} for rounding",
    )
