"""Steepest flows: descent of ln L in any norm, followed by small explicit steps.

Source: Tsilivis et al. (2025), steepest descent on homogeneous networks, with the perturbations of
Section 3.2.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from marginflow._checks import real, whole
from marginflow.ascent._steepest_step import get_geometry
from marginflow.attacks import Attack
from marginflow.datasets import Dataset
from marginflow.flow import Field, Jumps, jumps_between
from marginflow.homogeneity import measure_homogeneity
from marginflow.losses import Exponential

Array = NDArray[np.float64]

_BESIDE = ("l2", "sign")  # cheap norms, measured along every path
_ROUNDING = 1e-12  # a smaller fall of ln(ℓ/‖W‖^K) is none
_SUSPECTS = 6  # steps searched for a jump, by the turn of ∇ℓ and by the miss of ℓ each
_BEGINNING = 0.05  # η until L < 1/n
_PATIENCE = 4000  # such steps


@dataclass(frozen=True)
class Falls:
    """How often ``ln(ℓ/‖W‖^K)`` fell between neighbouring points of a path.

    Attributes:
        count: of times that it fell by more than 1e-12.
        largest: of the falls of ``ln(ℓ/‖W‖^K)``, 0 without one.
        total: ``Σ`` of all falls, ≥ 0.
        pairs: how many neighbours there were.
    """

    count: int
    largest: float
    total: float
    pairs: int


@dataclass(frozen=True, eq=False)
class SteepestPath:
    """Points of a steepest flow, T steps.

    Attributes:
        geometry: name of the norm.
        order: K.
        step: η, see :meth:`SteepestFlow.follow`.
        smoothed: ``ℓ = −ln Σ e^{−m_i}``, (T + 1,).
        margins: ``min_i m_i``, (T + 1,).
        dual: ``‖∇ℓ‖_*``, (T + 1,).
        inner: ``⟨W, ∇ℓ⟩``, (T + 1,).
        turns: ``‖∇ℓ(W_{t+1}) − ∇ℓ(W_t)‖₂/‖∇ℓ(W_t)‖₂``, (T,).
        norms: by name, ‖W‖ at each point, (T + 1,): the path's own, ``l2`` and ``sign``.
        weights: the last W, (N,).
        sharpest: ends of the steps, (N,) each, on which ∇ℓ turned most or ℓ missed its first-order
            change most.
    """

    geometry: str
    order: float
    step: float
    smoothed: Array
    margins: Array
    dual: Array
    inner: Array
    turns: Array
    norms: dict[str, Array]
    weights: Array
    sharpest: tuple[tuple[Array, Array], ...]

    def __len__(self) -> int:
        return len(self.smoothed) - 1

    def log_ratio(self, norm: str | None = None) -> Array:
        """``ln(ℓ/‖W‖^K)``, by default in the path's own norm; −∞ where ℓ ≤ 0.

        Shape (T + 1,).

        Args:
            norm: name of the norm; None takes the path's own.
        """
        inside = self.smoothed > 0
        ratio = np.full(len(inside), -np.inf)
        size = self.norms[norm or self.geometry][inside]
        ratio[inside] = np.log(self.smoothed[inside]) - self.order * np.log(size)
        return ratio

    def falls(self, norm: str | None = None, every: int = 1) -> Falls:
        """Falls of :meth:`log_ratio` between every so many steps; by ∞ where ℓ falls to 0 or below.

        Args:
            norm: as for :meth:`log_ratio`.
            every: take every so many-th point.
        """
        height = self.log_ratio(norm)[::every]
        before, after = height[:-1], height[1:]
        fell = after < before - _ROUNDING
        drops = before[fell] - after[fell]
        return Falls(
            int(fell.sum()),
            float(drops.max(initial=0.0)),
            float(drops.sum()),
            len(before),
        )

    def normalized_margin(self, norm: str | None = None) -> Array:
        """``min_i m_i/‖W‖^K``, (T + 1,).

        Args:
            norm: as for :meth:`log_ratio`.
        """
        return np.asarray(self.margins / self.norms[norm or self.geometry] ** self.order)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch's and numpy's linear algebra on one thread each, as before afterwards.

    The field is numpy's and the direction torch's: their threads spin while they wait for each other. On
    two cores a path took 30 times as long so.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


class SteepestFlow:
    """``dW/ds = ‖∇ℓ‖_* V``, ``V = argmax_{‖V‖ ≤ 1} ⟨V, ∇ℓ⟩``: steepest descent of ln L in a norm.

    ``ℓ = ln(1/(nL))`` with the exponential loss, so ``∇ℓ = −∇ ln L``, in float64 and through δ(W)
    where the inner maximum is not exact. The model is copied.

    Args:
        model: a multi-homogeneous network with one output.
        data: two classes.
        attack: δ, or None.
        geometry: name of the norm, or ``adam``.

    Attributes:
        name: of the norm.
        homogeneity: the measured layers.
        field: ``−∇ ln L`` of the copy.
        start: its weights at first, (N,).

    Raises:
        NotHomogeneousError: names what breaks homogeneity.
        DataError: more than two classes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        attack: Attack | None = None,
        *,
        geometry: str = "sign",
    ) -> None:
        self.name = get_geometry(geometry).name
        x = data.x.double().cpu()
        self.model = copy.deepcopy(model).double().cpu().eval()
        self.homogeneity = measure_homogeneity(self.model, x)
        self.field = Field(
            self.model, x, data.y.cpu(), loss=Exponential(), attack=attack, derivative="total"
        )
        self.start: Array = self.field.read()
        self._shapes = [p.shape for p in self.field.parameters]

    @property
    def order(self) -> float:
        """The order K of the network, ``Σ c_k``."""
        return self.homogeneity.order

    @_one_thread()
    def separated(self, patience: int = _PATIENCE) -> Array | None:
        """The first point of the flow with L < 1/n, or None if that takes more than ``patience`` steps.

        Its weights, (N,).

        Args:
            patience: most steps.
        """
        w, rule = self.start, get_geometry(self.name)
        for _ in range(patience):
            value = self.field(w)
            if value.smoothed > 0:
                return w
            if not (value.velocity.any() and w.any()):
                return None
            gradient = self._parts(value.velocity)
            length = _BEGINNING * min(rule.norm(self._parts(w)), 1 / rule.dual_norm(gradient))
            w = w + length * _vector(rule.direction(gradient))
        return None

    @_one_thread()
    def follow(self, w: Array, *, step: float, steps: int) -> SteepestPath:
        """Euler's steps ``W ← W + η min(‖W‖, 1/‖∇ℓ‖_*) V`` from w on.

        A step changes ℓ by η and W by η‖W‖ at most, to first order: the weights of the examples, which
        are softmax(−m), stay what the gradient took them for. Paths of the same ``η · steps`` run along
        the same piece of the flow.

        Args:
            w: where to start, (N,).
            step: η > 0.
            steps: T.

        Raises:
            InputError: no steps, or a step that is no positive number.
        """
        real("step", step, above=0.0)
        whole("steps", steps, least=1)
        rule = get_geometry(self.name)
        beside = {name: get_geometry(name) for name in _BESIDE if name != self.name}
        rows: list[tuple[float, ...]] = []
        turns: list[float] = []
        suspects = _Suspects()
        here = self.field(w)
        while True:
            parts, gradient = self._parts(w), self._parts(here.velocity)
            norm, dual = rule.norm(parts), rule.dual_norm(gradient)
            others = [geometry.norm(parts) for geometry in beside.values()]
            inner = float(w @ here.velocity)
            rows.append((here.smoothed, here.margin, dual, inner, norm, *others))
            if len(turns) == steps or dual == 0:
                break
            moved = w + step * min(norm, 1 / dual) * _vector(rule.direction(gradient))
            there = self.field(moved)
            change = there.velocity - here.velocity
            turns.append(float(np.linalg.norm(change) / np.linalg.norm(here.velocity)))
            miss = abs(there.smoothed - here.smoothed - float(here.velocity @ (moved - w)))
            suspects.add(turns[-1], miss, (w, moved))
            w, here = moved, there
        smoothed, margins, duals, inners, *norms = np.array(rows).T
        return SteepestPath(
            self.name,
            self.order,
            step,
            smoothed,
            margins,
            duals,
            inners,
            np.array(turns),
            dict(zip((self.name, *beside), norms, strict=True)),
            w,
            suspects.found,
        )

    @_one_thread()
    def jumps(self, path: SteepestPath) -> Jumps:
        """The largest jumps of ∇ℓ and ℓ on the path's sharpest steps: 0 where there is none.

        Args:
            path: of this flow.
        """
        found = [jumps_between(self.field, a, b) for a, b in path.sharpest]
        return Jumps(
            max((jump.field for jump in found), default=0.0),
            max((jump.loss for jump in found), default=0.0),
        )

    def _parts(self, vector: Array) -> Sequence[Tensor]:
        sizes = [math.prod(shape) for shape in self._shapes]
        parts = torch.split(torch.from_numpy(vector), sizes)
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _vector(parts: Sequence[Tensor]) -> Array:
    return torch.cat([part.reshape(-1) for part in parts]).numpy()


class _Suspects:
    """The steps on which something may have jumped: those that are least like a straight line."""

    def __init__(self) -> None:
        self._ranked: dict[str, list[tuple[float, int, tuple[Array, Array]]]] = {
            "turn": [],
            "miss": [],
        }
        self._count = 0

    def add(self, turn: float, miss: float, ends: tuple[Array, Array]) -> None:
        self._count += 1
        for kind, value in (("turn", turn), ("miss", miss)):
            heap = self._ranked[kind]
            heapq.heappush(heap, (value, self._count, ends))
            if len(heap) > _SUSPECTS:
                heapq.heappop(heap)

    @property
    def found(self) -> tuple[tuple[Array, Array], ...]:
        unique = {count: ends for heap in self._ranked.values() for _, count, ends in heap}
        return tuple(unique[count] for count in sorted(unique))
