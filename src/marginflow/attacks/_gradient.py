"""Attacks that follow the input gradient of the margin: FGM, FGSM and PGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from marginflow._checks import real, whole
from marginflow.attacks._base import Attack, Query, is_zero
from marginflow.distributed import RowsGenerator
from marginflow.errors import SpecificationError
from marginflow.norms import as_exponent, dual_vector, flat, norm_name


class _FastGradient(Attack):
    """One step of length ε: ``δ = −ε d(∇_x m)``, d the dual vector of the norm."""

    @property
    def piecewise_constant(self) -> bool:
        """Signs do not change but by jumps."""
        return math.isinf(self.p)

    def _perturb(self, query: Query, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        gradient = query.gradient(query.x)
        return -self.eps * dual_vector(gradient, self.p), is_zero(gradient)


@dataclass(frozen=True, eq=False, init=False)
class FGM(_FastGradient):
    """The ℓ2 fast gradient method, Eq. (87): ``δ = −ε y ∇_x f / ‖∇_x f‖₂``.

    Args:
        eps: ε ≥ 0, in the units of x.
        bounds: range of x + δ, or None.
        objective: ``margin``, or ``loss`` for comparison.

    Raises:
        InputError: ε negative, NaN or infinite; bounds that are no interval.
    """

    name: ClassVar[str] = "fgm"

    def __init__(
        self, eps: float, *, bounds: tuple[float, float] | None = None, objective: str = "margin"
    ) -> None:
        super().__init__(eps, 2.0, bounds, objective)


@dataclass(frozen=True, eq=False, init=False)
class FGSM(_FastGradient):
    """The fast gradient sign method, ℓ∞, Eq. (89): ``δ = −ε y sgn(∇_x f)``.

    The sign is constant between its jumps, so ``detached`` and ``total`` agree
    wherever it does not flip. Arguments and errors as for :class:`FGM`.
    """

    name: ClassVar[str] = "fgsm"

    def __init__(
        self, eps: float, *, bounds: tuple[float, float] | None = None, objective: str = "margin"
    ) -> None:
        super().__init__(eps, math.inf, bounds, objective)


@dataclass(frozen=True, eq=False, init=False)
class PGD(Attack):
    """Projected gradient descent on the margin, Eq. (91).

    ``δ⁰ = 0`` (or uniform in the ball), ``δ^{j+1} = Π(δ^j − ξ d(∇_x m(x + δ^j)))`` with d
    the unit ℓ2 vector or the sign, Π the projection on the ball (and the bounds).

    Args:
        p: the norm, ``"l2"`` or ``"linf"``.
        eps: ε ≥ 0, in the units of x.
        steps: number of steps ≥ 1.
        step_size: ξ > 0; by default 2.5 ε/steps.
        random_start: begin uniformly in the ball; the call then takes a generator.
        bounds: range of x + δ, or None.
        objective: ``margin``, or ``loss`` for comparison.

    Raises:
        InputError: a number out of range.
        SpecificationError: another norm.

    Examples:
        >>> import marginflow as mf
        >>> data = mf.load("separable:n=20,d=6,margin=0.3")
        >>> model = mf.models.mlp(6, 8, 1, seed=0).double()
        >>> attack = mf.attacks.PGD("linf", eps=0.1, steps=5)
        >>> attack.spec
        'pgd-linf:steps=5,step=0.05,eps=0.1'
        >>> delta = attack(model, data.x, data.y).delta
        >>> delta.shape == data.x.shape, bool(delta.abs().max() <= 0.1)
        (True, True)
    """

    steps: int = 10
    step_size: float = 0.0
    random_start: bool = False

    name: ClassVar[str] = "pgd"

    def __init__(
        self,
        p: float | str,
        eps: float,
        *,
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = False,
        bounds: tuple[float, float] | None = None,
        objective: str = "margin",
    ) -> None:
        super().__init__(eps, as_exponent(p), bounds, objective)
        if self.p not in (2.0, math.inf):
            raise SpecificationError(f"PGD: expected the norm 'l2' or 'linf', got {p!r}")
        object.__setattr__(self, "steps", whole("steps", steps, least=1))
        if step_size is None:
            step_size = 2.5 * self.eps / steps
        elif self.eps > 0:
            real("step_size", step_size, above=0.0)
        object.__setattr__(self, "step_size", real("step_size", step_size, least=0.0))
        object.__setattr__(self, "random_start", bool(random_start))

    @property
    def random(self) -> bool:
        """Whether there is a random start."""
        return self.random_start

    @property
    def piecewise_constant(self) -> bool:
        """Signs do not change but by jumps, and the clamps to the ball and the bounds know no weights."""
        return math.isinf(self.p)

    def _spec_parts(self) -> list[str]:
        parts = [f"steps={self.steps}", f"step={self.step_size!r}"]
        return [*parts, "random=true"] if self.random_start else parts

    @property
    def spec(self) -> str:
        """The specification string that builds this attack again."""
        return f"pgd-{norm_name(self.p)}" + super().spec.removeprefix(self.name)

    def with_eps(self, eps: float) -> Self:
        """The same attack with another budget ε; its steps are the same part of it.

        Args:
            eps: ε ≥ 0, in the units of x.
        """
        other = super().with_eps(eps)
        if self.eps > 0:
            object.__setattr__(other, "step_size", self.step_size * (other.eps / self.eps))
        else:
            object.__setattr__(other, "step_size", 2.5 * other.eps / self.steps)
        return other

    def start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """δ⁰, shape of x: 0, or uniform in the ball and then inside the bounds.

        Args:
            x: examples, (n, …).
            generator: the source of the draw; unused without ``random_start``.
        """
        if not self.random_start:
            return torch.zeros_like(x)
        return self._admit(x, _uniform_in_ball(x, self.p, self.eps, generator))

    def _perturb(self, query: Query, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x = query.x
        delta = self.start(x, generator)
        dead = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        for step in range(self.steps):
            # At x itself, where it begins there: whoever wants the clean outputs has them then.
            gradient = query.gradient(x + delta if step or self.random_start else x)
            dead &= is_zero(gradient)
            delta = self._admit(x, delta - self.step_size * dual_vector(gradient, self.p))
        return delta, dead


def _uniform_in_ball(
    x: Tensor, p: float, radius: float, generator: torch.Generator | None
) -> Tensor:
    """Uniform in the ℓ2 or ℓ∞ ball, drawn on the generator's device in float64."""
    device = generator.device if generator is not None else torch.device("cpu")
    n, features = flat(x).shape
    rows = slice(0, n)
    if isinstance(generator, RowsGenerator):  # one process's part of a batch
        rows, n = generator.rows, generator.count
    if math.isinf(p):
        shape = (n, *x.shape[1:])
        draw = torch.rand(shape, generator=generator, dtype=torch.float64, device=device) * 2 - 1
        return (radius * draw[rows]).to(x)
    direction = torch.randn((n, features), generator=generator, dtype=torch.float64, device=device)
    u = torch.rand((n, 1), generator=generator, dtype=torch.float64, device=device)
    direction, u = direction[rows], u[rows]
    # In d dimensions the radius of a uniform point is distributed as u^{1/d}.
    length = radius * u ** (1 / features)
    point: Tensor = length * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return point.reshape(x.shape).to(x)
