"""Kinks of a network and jumps of δ(W): found by bisection, without reading a layer's type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from marginflow.attacks import Attack
from marginflow.errors import ModelError
from marginflow.losses import margins_of
from marginflow.norms import flat, per_example_norm
from marginflow.theorems._site import Site

_PAIRS = 32
_HALVINGS = 44
JUMP = 1e-6
"""Above this, relative, what is left after 44 halvings is a jump: a slope would be above 10⁷."""
_STEPS = (1e-6, 1e-8)
_GRID = 16
_SEGMENTS = 2
_SUSPECTS = 2


@dataclass(frozen=True, eq=False)
class Kinks:
    """Inputs on either side of a kink, 2⁻⁴⁴ of a segment between data apart.

    Attributes:
        below: inputs, (k, …).
        above: the same places from the other side.
        jumps: ``‖∇_x f(above) − ∇_x f(below)‖₂`` relative to the larger of the two, (k,).
        pairs: how many segments were searched.
    """

    below: Tensor
    above: Tensor
    jumps: Tensor
    pairs: int


def find_kinks(model: nn.Module, x: Tensor) -> Kinks | None:
    """Places where ∇_x f jumps, one on each of up to 32 segments between examples; None if nowhere.

    On each segment the half with the larger change of ∇_x f is kept: a continuous gradient
    changes ever less there, a jump stays.
    """
    generator = torch.Generator().manual_seed(0)
    low = x[:_PAIRS].clone()
    noise = torch.randn(low.shape, generator=generator, dtype=x.dtype)
    # Not between the examples themselves alone: there may be a single one.
    high = x.roll(-1, 0)[:_PAIRS] + noise * x.abs().max().clamp(min=1e-300)

    def gradient(points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        outputs = model(points).reshape(len(points), -1)
        mix = torch.linspace(1.0, 2.0, outputs.shape[1], dtype=outputs.dtype)
        value = (outputs @ mix).sum()
        (found,) = torch.autograd.grad(value, points, materialize_grads=True)
        return flat(found)

    at_low, at_high = gradient(low), gradient(high)
    size = torch.stack([at_low, at_high]).norm(dim=-1).max()
    for _ in range(_HALVINGS):
        middle = low + (high - low) / 2
        at_middle = gradient(middle)
        left = (at_middle - at_low).norm(dim=1) >= (at_high - at_middle).norm(dim=1)
        wide = left.reshape(-1, *(1 for _ in x.shape[1:]))
        low, high = torch.where(wide, low, middle), torch.where(wide, middle, high)
        at_low = torch.where(left.unsqueeze(1), at_low, at_middle)
        at_high = torch.where(left.unsqueeze(1), at_middle, at_high)
    if not bool(size > 0):
        return None
    larger = torch.maximum(at_low.norm(dim=1), at_high.norm(dim=1))
    jumps = (at_high - at_low).norm(dim=1) / larger.clamp(min=1e-9 * float(size))
    found = jumps > JUMP
    if not bool(found.any()):
        return None
    return Kinks(low[found], high[found], jumps[found], len(low))


@dataclass(frozen=True, eq=False)
class Jumps:
    """How δ(W) and the adversarial margins move with the weights.

    Attributes:
        shares: for each relative size h of a perturbation of the weights, the share of
            examples at the kept points whose δ moves by more than ε/1000.
        delta: largest ``‖Δδ_i‖/ε`` that was left after halving a piece of the path up to 44 times.
        margin: largest ``|Δm_i|`` left likewise, relative to the largest |m_i| there.
    """

    shares: dict[float, float]
    delta: float
    margin: float

    @property
    def found(self) -> bool:
        """Whether δ jumps."""
        return self.delta > JUMP

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.2g} at h = {h:g}" for h, share in self.shares.items())
        return (
            f"left after up to {_HALVINGS} halvings of the path: |Δm_i| = {self.margin:.2g} max |m|, "
            f"‖Δδ_i‖ = {self.delta:.2g} ε; beside it δ moves by over ε/1000 in a share of {shares}"
        )


def find_jumps(sites: Sequence[Site]) -> Jumps | None:
    """Search the path through ``sites`` for jumps of δ (Assumption 2), and small steps beside it.

    The polygon through the normalised sites stands for the path (δ does not change with the norms of
    the layers); of its segments the two on which some δ_i moves most are searched. One site
    alone is moved by 5 % in a random direction.
    """
    attack = sites[0].attack
    if attack is None or attack.eps == 0:
        return None
    units = [site.scaled((1 / site.norms).tolist()) for site in sites]
    segments = list(pairwise(units))
    moves = [float(_moved(a.delta, b.delta, attack.p).max()) for a, b in pairwise(sites)]
    if not segments:
        start, way = sites[0].weights, sites[0].direction(1)
        moved = {n: w + 0.05 * way[n] for n, w in start.items()}
        segments, moves = [(start, moved)], [0.0]
    ranked = sorted(range(len(segments)), key=lambda k: -moves[k])[:_SEGMENTS]
    searched = [_Segment(sites[0], attack, *segments[k]).search() for k in ranked]
    found = [f for f in searched if f is not None]
    if not found:
        return None
    shares = {h: _share(sites, attack, h) for h in _STEPS}
    return Jumps(shares, max(f[0] for f in found), max(f[1] for f in found))


def _share(sites: Sequence[Site], attack: Attack, h: float) -> float:
    moved, count = 0, 0
    for number, site in enumerate(sites):
        way = site.direction(number)
        with site.at({n: w + h * way[n] for n, w in site.weights.items()}) as model:
            draw = torch.Generator().manual_seed(0)
            found = attack(model, site.x, site.y, generator=draw).delta
        moves = _moved(found, site.delta, attack.p)
        moved += int((moves > 1e-3 * attack.eps).sum())
        count += len(moves)
    return moved / count


@dataclass(frozen=True, eq=False)
class _Segment:
    """The weights between two points."""

    site: Site
    attack: Attack
    start: dict[str, Tensor]
    end: dict[str, Tensor]

    def search(self) -> tuple[float, float] | None:
        """The largest jumps of δ, in units of ε, and of m, in units of the largest |m|.

        None where the segment meets weights that the attack refuses.
        """
        try:
            grid = [self.at(k / _GRID) for k in range(_GRID + 1)]
            scale = max(float(m.abs().max()) for _, m in grid) or 1.0
            found = [self._halved(piece, which, scale) for piece, which in self._suspects(grid)]
        except ModelError:
            # Where W_Π cancels to rounding, the exact attack cannot tell that f is linear.
            return None
        return max(f[0] for f in found), max(f[1] for f in found)

    def at(self, s: float, which: int | None = None) -> tuple[Tensor, Tensor]:
        """δ and m of all examples, or of one, at a point of the segment."""
        weights = {n: torch.lerp(w, self.end[n], s) for n, w in self.start.items()}
        part = slice(None) if which is None else slice(which, which + 1)
        x, y = self.site.x[part], self.site.y[part]
        with self.site.at(weights) as model:
            draw = torch.Generator().manual_seed(0)
            delta = self.attack(model, x, y, generator=draw).delta
            with torch.no_grad():
                return delta, margins_of(model(x + delta), y)

    def _suspects(self, grid: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
        """Pieces of the grid, each with an example, on which δ and then m is least like a line.

        A continuous network's margin can jump only where δ does; and a jump stands out in
        second differences, however far the values move.
        """
        deltas, margins = (torch.stack([point[k] for point in grid]) for k in (0, 1))
        moves = torch.stack([_moved(a, b, self.attack.p) for a, b in pairwise(deltas)])
        bends = torch.stack(
            [
                _moved(a + c, 2 * b, self.attack.p)
                for a, b, c in zip(deltas, deltas[1:], deltas[2:], strict=False)
            ]
        )
        likely = bends >= bends.max() / 2
        order = torch.where(likely, margins.diff(n=2, dim=0).abs(), -1.0).flatten()
        found = []
        for place in order.argsort(descending=True)[:_SUSPECTS].tolist():
            piece, which = divmod(place, bends.shape[1])
            later = bool(moves[piece + 1, which] > moves[piece, which])
            found.append((piece + later, which))
        return list(dict.fromkeys(found))

    def _halved(self, piece: int, which: int, scale: float) -> tuple[float, float]:
        """What is left of the moves of one example's ``δ/ε`` and ``m/scale``, halving the piece.

        The half with the larger move of δ is kept, or of m where δ does not move any more.
        """

        def moves(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[float, float]:
            delta = float(_moved(one[0], other[0], self.attack.p)) / self.attack.eps
            return delta, float((one[1] - other[1]).abs()) / scale

        low, high = piece / _GRID, (piece + 1) / _GRID
        at_low, at_high = self.at(low, which), self.at(high, which)
        left = moves(at_low, at_high)
        for _ in range(_HALVINGS):
            if max(left) < 1e-3 * JUMP:
                break
            middle = low + (high - low) / 2
            between = self.at(middle, which)
            below, above = moves(at_low, between), moves(between, at_high)
            if below >= above:
                high, at_high, left = middle, between, below
            else:
                low, at_low, left = middle, between, above
        return left


def _moved(one: Tensor, other: Tensor, p: float) -> Tensor:
    """``‖δ_i − δ_i′‖_p``, (n,)."""
    return per_example_norm(one - other, p)
