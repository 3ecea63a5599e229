"""The two recursions that maximise a linear predictor's margin, with their certificates.

Both are written for signed examples ``z_i = y_i x_i`` in units in which ``max_i ‖z_i‖₂ = 1``, and
both are generators: each ``next`` evaluates the gradient at the present weights, offers what
that proves to :class:`Found`, and on the following call takes the step.

**The game.** With 1/p + 1/q = 1, over all w ≠ 0,

    γ* = max_w (min_i <w, z_i> − ε‖w‖_q)/‖w‖₂ = min_{α in the simplex} dist(Σ_i α_i z_i, εB_p)

if that is positive. Write ``D(α)`` for the distance and ``w(α) = v − P(v)`` at ``v = Σ α_i z_i``, P the
nearest point of the ball; ``½D²`` is convex in α with derivative ``<z_i, w(α)>``, which is
1-Lipschitz from ℓ1 to ℓ∞ in these units (``v ↦ v − P(v)`` does not expand).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from marginflow.ascent._nearest import NearestInBall, lp_norm
from marginflow.norms import dual_exponent, dual_vector

# A restart when D² − γ² has fallen to this share of what it was at the last one.
_RESTART_SHARE = 0.2
# Squares of lengths below this are rounding, in units of the largest ‖z_i‖₂².
_ROUNDING = 1e-15
# With restarts w(α) itself is tried as the predictor so often: it costs one product with z.
_TRY_EVERY = 10
# The new start keeps so much of the uniform multipliers at most, for examples that wake up later.
_MOST_UNIFORM = 0.1


class Found:
    """The best of both sides so far: a direction with its margin, multipliers with their bound."""

    def __init__(self, z: Tensor, eps: float, p: float) -> None:
        self.z = z
        self.eps = eps
        self.p = p
        self.nearest = NearestInBall(p, eps)
        n = len(z)
        self.alpha = z.new_full((n,), 1.0 / n)
        self.bound = math.inf
        self.direction = torch.zeros_like(z[0])
        self.margin = -math.inf

    def residual(self, v: Tensor) -> Tensor:
        """``v − P(v)``."""
        return v - self.nearest(v) if self.eps > 0.0 else v

    def offer_multipliers(self, alpha: Tensor, v: Tensor) -> Tensor:
        """Keep α if ``D(α)``, at ``v = Σ α_i z_i``, is the least so far; w(α) is returned."""
        w = self.residual(v)
        self.offer_bound(alpha, float(torch.linalg.vector_norm(w)))
        return w

    def offer_bound(self, alpha: Tensor, bound: float) -> None:
        """Keep α if its bound, at least ``D(α)``, is the least so far."""
        if bound < self.bound:
            self.bound, self.alpha = bound, alpha

    def offer_weights(self, w: Tensor, zw: Tensor) -> None:
        """Keep the direction of w if its margin is the largest so far; ``zw = z w``."""
        size = float(torch.linalg.vector_norm(w))
        if size == 0.0:
            return
        margin = self.margin_of(w, zw) / size
        if margin > self.margin:
            self.margin, self.direction = margin, w / size

    def margin_of(self, w: Tensor, zw: Tensor) -> float:
        """``min_i <w, z_i> − ε‖w‖_q``, not divided by ‖w‖₂."""
        least = float(zw.min())
        if self.eps == 0.0:
            return least
        return least - self.eps * lp_norm(w, dual_exponent(self.p))

    @property
    def squares_apart(self) -> float:
        """``D² − max(γ, 0)²``, what the guarantees of both methods bound."""
        return self.bound**2 - max(self.margin, 0.0) ** 2


def dual_acceleration(found: Found, step_size: float, adaptive: bool) -> Iterator[None]:
    """Ji, Srebro & Telgarsky 2021, *Fast margin maximization via dual acceleration*.

    Their recursion, with g = ∇ln L at W, for t = 0, 1, …:

        u ← t/(t+1)·(u + g);   W ← W − θ(u + g).

    Let α be the average of the softmax weights q_s of steps s <= t, weighted by s, and
    ``v = Σ_i α_i z_i``. Then ``−u = (t/2)·v`` and ``−(u + g) = (t+2)/2·v'`` with
    ``v' = (t·v − 2g)/(t + 2)``. Under attack v' is replaced by ``v' − P(v')``: the same accelerated
    mirror descent (entropy, from the uniform multipliers), on ``½D²`` instead of ``½‖v‖²``. The
    perturbation ``P(v')`` is the worst one for the predictor ``v' − P(v')``.

    **Guarantee**, θ <= 1, not adaptive, after t >= 1 steps: ``D² − γ² <= 8 ln n/(θ t(t + 3))``, D the
    best bound so far and γ the margin of the present W, if positive. Proof: sum Tseng's inequality
    (2008, *On accelerated proximal gradient methods*, Section 3) and keep both sides. With the
    steps' weights (s+2)/2, of sum A = t(t+3)/4, and w̄ = W/(θA),

        A·½D² <= min_q [A<q, z w̄> + KL(q, uniform)/θ] − A(½‖w̄‖² + ε‖w̄‖_q),

    whose right side is at most ``A·½γ² + (ln n)/θ``: take for q the example with the least margin.

    **Adaptive**: each time ``D² − γ²`` has fallen to a fifth, a restart takes the best α as the prior
    of the softmax and W = 0. The proof asks of θ only that successive softmax weights q', q have
    ``½‖Σ_i (q_i − q'_i) z_i‖² <= KL(q, q')/θ``; by Pinsker's inequality θ = 1 always does. So θ
    doubles at each restart and the inequality is watched: a step that breaks it ends in a restart
    with θ halved, down to ``step_size``. For p = 1, ∞ or ε = 0 the squared distance between two polyhedra
    grows quadratically, and restarts converge at a linear rate; seen for other p too.
    """
    z = found.z
    n = len(z)
    log_prior = z.new_full((n,), -math.log(n))
    reference, theta = 1.0, step_size
    while True:
        weights, scores = torch.zeros_like(z[0]), z.new_zeros(n)
        alpha, v = z.new_zeros(n), torch.zeros_like(z[0])
        log_q, pull = log_prior, v
        for t in count():
            log_q_before, pull_before = log_q, pull
            log_q = torch.log_softmax(log_prior - scores, dim=0)
            q = log_q.exp()
            pull = q @ z  # −g
            too_long = False
            if t > 0 and theta > step_size:
                leap = float(torch.linalg.vector_norm(pull - pull_before)) ** 2 / 2.0
                too_long = leap > max(_ROUNDING, float(q @ (log_q - log_q_before)) / theta)
            share = 2.0 / (t + 1.0) if t > 0 else 1.0
            alpha = torch.lerp(alpha, q, share)
            v = torch.lerp(v, pull, share)
            w = found.offer_multipliers(alpha, v)
            found.offer_weights(weights, scores)
            if adaptive and t % _TRY_EVERY == _TRY_EVERY - 1:
                found.offer_weights(w, z @ w)
            yield
            if too_long:
                theta /= 4.0  # half of what it was, after the doubling below
                break
            if adaptive and found.squares_apart < _RESTART_SHARE * reference:
                break
            ahead = torch.lerp(v, pull, 2.0 / (t + 2.0))
            weights = weights + theta * (t + 2.0) / 2.0 * found.residual(ahead)
            scores = z @ weights
        theta = max(2.0 * theta, step_size)
        reference = max(found.squares_apart, 0.0)
        uniform = min(_MOST_UNIFORM, reference) + torch.finfo(torch.float64).eps
        log_prior = torch.log((1.0 - uniform) * found.alpha + uniform / n)


def normalized_descent(found: Found, step_size: float) -> Iterator[None]:
    """``W ← W − η g``, g = ∇ln L at the exact worst perturbations: ``−g = Σ_i q_i z_i − u``.

    u = ``ε·dual_vector(W)``, for which ``<u, W> = ε‖W‖_q``. The weights carry their own bound: they
    are ``ηt(Σ_i ᾱ_i z_i − ū)`` with the averages of q and u over the steps, so ``γ* <= ‖W‖₂/(ηt)``.
    The present q, with its nearest perturbation, is the other bound, and for ε = 0 the better one.
    (Ji & Telgarsky 2021, *Characterizing the implicit bias via a primal-dual analysis*: for the
    multipliers this is mirror descent.)

    Guarantee for ε = 0 and η <= 1, after t steps: ``D² − γ² <= 2 ln n/(ηt)``. Under attack the same
    rate is seen, not proven.
    """
    z = found.z
    weights, scores = torch.zeros_like(z[0]), z.new_zeros(len(z))
    mean = z.new_zeros(len(z))
    for t in count():
        if t > 0:
            found.offer_bound(mean, float(torch.linalg.vector_norm(weights)) / (step_size * t))
        q = torch.softmax(-scores, dim=0)
        pull = q @ z
        found.offer_multipliers(q, pull)
        found.offer_weights(weights, scores)
        yield
        mean = torch.lerp(mean, q, 1.0 / (t + 1.0))
        step = pull
        if found.eps > 0.0:
            step = pull - found.eps * dual_vector(weights[None], found.p)[0]
        weights = weights + step_size * step
        scores = z @ weights
