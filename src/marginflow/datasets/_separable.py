"""Synthetic data whose maximum margin is known by construction."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from marginflow._checks import real, whole
from marginflow._specs import Spec, integer, number
from marginflow.datasets._dataset import Dataset
from marginflow.errors import InputError, SpecificationError

_LARGEST = 2**28  # numbers, 2 GiB


def separable(
    n: int = 60,
    d: int = 20,
    margin: float = 0.1,
    seed: int = 0,
    supports: int | None = None,
) -> Dataset:
    """Draw binary data, linearly separable through the origin with ℓ2 margin ``margin``.

    With ``z_i = y_i x_i``, the maximum margin ``max_{‖w‖=1} min_i ⟨w, z_i⟩`` is the distance from
    the origin to the convex hull of the ``z_i``. For a random unit vector ``u``,

        z_j = margin·u + v_j,             v_j ⊥ u,  Σ_j α_j v_j = 0,  α_j > 0   (support points)
        z_i = (margin + s_i)·u + v_i,     v_i ⊥ u,  s_i ~ Exp(1)                (all others)

    so ``margin·u = Σ_j α_j z_j / Σ_j α_j`` lies in the hull while ``⟨u, z⟩ >= margin`` on it: the
    maximum margin is ``margin``, attained by ``u`` alone, up to rounding (1e-16 absolute). The
    ``v`` are Gaussian with E‖v‖² near 1; at most ``d`` support points keep the
    multipliers unique. The order is random, labels differ in number by at most one.

    Args:
        n: number of examples; a single one is ``z = margin·u``.
        d: number of features, at least 2.
        margin: the maximum margin > 0, in the units of x.
        seed: of the random numbers.
        supports: how many support points, from 2 to ``min(n, d)``; ``min(n//2, d)`` (but
            at least 2) unless given.

    Returns:
        A data set with ``x`` float64 of shape (n, d), ``max_margin`` and
        ``max_margin_direction`` = u, and no test set.

    Raises:
        InputError: an argument out of range.
    """
    n, d = whole("n", n, least=1), whole("d", d, least=2)
    margin, seed = real("margin", margin, above=0), whole("seed", seed, least=0)
    if n * d > _LARGEST:
        raise InputError(
            f"separable: expected n·d of at most {_LARGEST:,}, got n={n} and d={d}; make it smaller"
        )
    fewest, most = min(n, 2), min(n, d)
    k = max(fewest, min(n // 2, d)) if supports is None else whole("supports", supports, least=1)
    if not fewest <= k <= most:
        raise InputError(
            f"supports: expected {fewest} to {most} support points for n={n} and d={d}, got {k}"
        )

    rng = np.random.default_rng(seed)
    u = rng.standard_normal(d)
    u /= np.linalg.norm(u)
    v = rng.standard_normal((n, d)) / np.sqrt(d - 1)
    weights = rng.uniform(0.5, 1.5, k)
    v[:k] -= weights @ v[:k] / weights.sum()
    for _ in range(2):  # the second pass removes what rounding left of the first
        v -= np.outer(v @ u, u)
    heights = np.full(n, margin)
    heights[k:] += rng.exponential(size=n - k)
    z = np.outer(heights, u) + v
    labels: NDArray[np.int64] = rng.permutation(np.where(np.arange(n) % 2, -1, 1))
    x = labels[:, None] * rng.permutation(z)

    chosen = "" if supports is None else f",supports={supports}"
    return Dataset(
        torch.from_numpy(x),
        torch.from_numpy(labels),
        name=f"separable:n={n},d={d},margin={margin!r},seed={seed}{chosen}",
        max_margin=margin,
        max_margin_direction=torch.from_numpy(u),
    )


def load(spec: Spec) -> Dataset:
    """Load ``separable:n=60,d=20,margin=0.1,seed=0,supports=20``; see :func:`separable`.

    Raises:
        InputError: an argument without a name, an unknown option or one out of range.
    """
    if spec.args:
        raise SpecificationError(
            f"{spec.text!r}: expected options such as n=60, got {spec.args[0]!r}"
        )
    whole_numbers = dict.fromkeys(("n", "d", "seed", "supports"), integer)
    return separable(**spec.parsed({**whole_numbers, "margin": number}))
