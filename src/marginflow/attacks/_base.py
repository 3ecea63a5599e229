"""What every attack is: a rule that maps weights to perturbations inside a ball.

Subclasses compute; the final :meth:`Attack.__call__` keeps the promises: the ball, the
pixel bounds, the count of dead inputs, and a model left as it was found.

Source: the perturbations of Section 3.2 (Definition 1).
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn

from marginflow._checks import choice, real
from marginflow.errors import DataError, InputError, ModelError
from marginflow.homogeneity import evaluation_mode
from marginflow.losses import get_loss, margins_of
from marginflow.norms import as_exponent, flat, norm_name, project

Derivative = Literal["detached", "total"]
"""How δ(W) enters a derivative by W: held fixed (Algorithm 1), or differentiated through (Section 3.2)."""

Objective = Callable[[Tensor], Tensor]
"""Inputs (n, …) ↦ what the attack makes small, per example (n,)."""


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What an attack found.

    Attributes:
        delta: δ, of the shape and dtype of x, ``‖δ_i‖_p ≤ ε`` to one rounding.
        dead_inputs: (n,) bool, the examples whose input gradient was 0 at every step
            (0/0 has no direction; their perturbation is 0 but for a random start).
        clean: the outputs at x, (n,), (n, 1) or (n, C), if the attack came past them; without
            gradient.
    """

    delta: Tensor
    dead_inputs: Tensor
    clean: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Attack(ABC):
    """A perturbation rule with budget ε in the ℓp norm.

    Attributes:
        eps: the budget ε ≥ 0, in the units of x.
        p: the exponent of the norm, in [1, ∞].
        bounds: (low, high), the range in which x + δ must stay, or None. The clamp
            depends on x alone, so it keeps scale invariance; it never moves δ out of the ball.
        objective: ``margin`` (the paper's), or ``loss`` as other libraries do, which
            is not scale invariant and fades when the loss underflows.
        name: the word that its :attr:`spec` begins with.

    Raises:
        InputError: an eps, p or bounds that are no numbers, or out of range.
        SpecificationError: an unknown norm or objective.
    """

    eps: float
    p: float
    bounds: tuple[float, float] | None = None
    objective: str = "margin"

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    """Whether δ minimises the margin exactly. Then ``detached`` and ``total`` agree (Danskin) for every
    loss of the margin, which cross-entropy of several classes is not."""

    differentiable: ClassVar[bool] = True
    """Whether ``derivative="total"`` is offered."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", real("eps", self.eps, least=0.0))
        object.__setattr__(self, "p", as_exponent(self.p))
        choice("objective", self.objective, ("margin", "loss"))
        object.__setattr__(self, "bounds", as_bounds(self.bounds))

    @property
    def scale_invariant(self) -> bool:
        """Whether δ(aW) = δ(W) for a > 0 (Definition 1): true of the margin objective."""
        return self.objective == "margin"

    @property
    def random(self) -> bool:
        """Whether the attack draws random numbers and so needs a generator."""
        return False

    @property
    def piecewise_constant(self) -> bool:
        """Whether δ(W) is constant between its jumps, so that ``detached`` and ``total`` mostly agree."""
        return False

    @property
    def spec(self) -> str:
        """The specification string that builds this attack again."""
        parts = [*self._spec_parts(), f"eps={self.eps!r}"]
        if self.bounds is not None:
            parts.append(f"bounds={self.bounds[0]!r}..{self.bounds[1]!r}")
        if self.objective != "margin":
            parts.append(f"objective={self.objective}")
        return f"{self.name}:{','.join(parts)}"

    def __str__(self) -> str:
        return self.spec

    def with_eps(self, eps: float) -> Self:
        """The same attack with another budget ε.

        Args:
            eps: ε ≥ 0, in the units of x.

        Raises:
            InputError: ε negative or not finite.
        """
        other = copy.copy(self)
        object.__setattr__(other, "eps", real("eps", eps, least=0.0))
        return other

    @final
    def with_bounds(self, bounds: tuple[float, float] | None) -> Self:
        """The same attack with other bounds.

        Args:
            bounds: (low, high), the range of x + δ, or None.

        Raises:
            InputError: bounds that are no interval.
        """
        other = copy.copy(self)
        object.__setattr__(other, "bounds", as_bounds(bounds))
        return other

    @final
    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        derivative: Derivative = "detached",
        generator: torch.Generator | None = None,
    ) -> Perturbation:
        """The perturbations of the examples ``x`` under ``model``.

        The model is evaluated in evaluation mode and put back as it was; its ``.grad``
        fields and the global random state are not touched.

        Args:
            model: maps (n, …) to outputs (n,), (n, 1) or (n, C).
            x: examples, (n, …), of the model's dtype and device.
            y: labels, (n,): −1/+1 for one output, 0 … C − 1 for C outputs.
            derivative: ``detached`` returns a constant δ; ``total`` one that autograd
                differentiates by the weights.
            generator: the source of a random start; required by attacks with one, so
                that the draw can be shared between models.

        Returns:
            the perturbation with ``‖δ_i‖_p ≤ ε``.

        Raises:
            DataError: labels that do not fit, examples outside ``bounds``.
            InputError: a missing generator, an unknown derivative.
            ModelError: a model that the attack does not apply to.
        """
        choice("derivative", derivative, ("detached", "total"))
        if self.random and generator is None:
            raise InputError(
                f"{self.name} with a random start needs generator=torch.Generator().manual_seed(…)"
            )
        x = x.detach()
        if x.ndim == 0 or y.shape != x.shape[:1]:
            raise DataError(
                f"expected as many labels as examples, got {tuple(y.shape)} for {tuple(x.shape)}"
            )
        self.check_bounds(x)
        query = Query(model, x, y, self.objective, total=derivative == "total")
        with evaluation_mode(model), torch.enable_grad():
            return self.answer(query, generator)

    @final
    def answer(self, query: Query, generator: torch.Generator | None = None) -> Perturbation:
        """The perturbations of the examples of ``query``, whose inputs are already checked.

        Args:
            query: the model and its examples, (n, …).
            generator: of a random start.

        Raises:
            InputError: an attack of one's own gives something else than finite numbers of the shape,
                dtype and device of x, with the dead inputs as (n,) bool.
        """
        answer = self._perturb(query, generator)
        # Ours are tested; a pass over δ would cost more than a step of a small network.
        if not type(self).__module__.startswith("marginflow."):
            answer = self._checked(query, answer)
        delta, dead = answer
        delta = self._admit(query.x, delta)
        return Perturbation(delta if query.total else delta.detach(), dead, query.clean)

    def check_bounds(self, x: Tensor) -> None:
        """Refuse examples outside ``bounds``.

        Args:
            x: examples, (n, …).

        Raises:
            DataError: a value outside.
        """
        if self.bounds is None or not x.numel():
            return
        # Compared as tensors: the bounds are then rounded to the precision of x.
        least, most = torch.aminmax(x)
        if not bool((least >= self.bounds[0]) & (most <= self.bounds[1])):
            raise DataError(
                f"examples: expected values in the bounds [{self.bounds[0]:g}, {self.bounds[1]:g}], got "
                f"[{float(least):g}, {float(most):g}]; scale the data or drop the bounds"
            )

    def _checked(self, query: Query, answer: object) -> tuple[Tensor, Tensor]:
        """``answer`` if it is what :meth:`_perturb` promises.

        Raises:
            InputError: it is not.
        """
        x, who = query.x, f"the attack {self.name!r}"
        if (
            not isinstance(answer, tuple)
            or len(answer) != 2
            or not all(isinstance(part, Tensor) for part in answer)
        ):
            raise InputError(
                f"{who}: expected _perturb to return two tensors (δ, dead inputs), got "
                f"{type(answer).__name__}"
            )
        delta, dead = answer
        if (delta.shape, delta.dtype, delta.device) != (x.shape, x.dtype, x.device):
            raise InputError(
                f"{who}: expected δ of the shape, dtype and device of query.x, "
                f"{tuple(x.shape)} {x.dtype} on {x.device}, got {tuple(delta.shape)} {delta.dtype} on "
                f"{delta.device}; start from query.x.new_zeros(query.x.shape)"
            )
        if (dead.shape, dead.dtype, dead.device) != (x.shape[:1], torch.bool, x.device):
            raise InputError(
                f"{who}: expected the dead inputs as ({len(x)},) torch.bool on {x.device}, got "
                f"{tuple(dead.shape)} {dead.dtype} on {dead.device}"
            )
        finite = torch.isfinite(flat(delta.detach())).all(dim=1)
        # Of a network that gives NaN there no attack can say better: whoever asked meets it in the outputs.
        if bool(finite.all()) or not self._sound(query, ~finite):
            return delta, dead
        places = torch.nonzero(~finite).flatten().tolist()
        value = delta.detach()[places[0]].flatten()
        value = value[~torch.isfinite(value)][0]
        raise InputError(
            f"{who}: expected finite δ, got {float(value):g} for {len(places)} of {len(x)} examples, the "
            f"first of them number {places[0]} of the batch; where the gradient is 0 return 0 and "
            "mark the example as dead"
        )

    @staticmethod
    def _sound(query: Query, chosen: Tensor) -> bool:
        """Whether the outputs at the ``chosen`` examples themselves are finite."""
        with torch.no_grad():
            outputs = query.outputs(query.x.detach())
        return bool(torch.isfinite(flat(outputs))[chosen].all())

    def _admit(self, x: Tensor, delta: Tensor) -> Tensor:
        """``delta`` inside the ball and, with it, ``x + delta`` inside the bounds."""
        delta = project(delta, self.p, self.eps)
        if self.bounds is not None:
            # For x in the bounds both limits have 0 between them: |δ| only shrinks.
            low, high = (x.new_tensor(bound) for bound in self.bounds)
            delta = torch.minimum(torch.maximum(delta, low - x), high - x)
            # x + (bound − x) may round to the far side of the bound; one ulp of δ brings it back.
            moved = x + delta.detach()
            back = torch.nextafter(delta.detach(), torch.zeros_like(x))
            delta = torch.where((moved < low) | (moved > high), back, delta)
        return delta

    def _spec_parts(self) -> list[str]:
        return []

    @abstractmethod
    def _perturb(self, query: Query, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """δ, shape of x, and the dead inputs, (n,) bool."""


class Query:
    """What an attack may ask of a model: its outputs, objectives and input gradients.

    Args:
        model: maps (n, …) to outputs (n,), (n, 1) or (n, C).
        x: examples, (n, …).
        y: labels, (n,).
        objective: ``margin`` or ``loss``.
        total: whether δ is to be differentiated by the weights.

    Attributes:
        clean: the outputs at x itself, (n,), (n, 1) or (n, C), once an objective was asked for
            there; without gradient.
    """

    clean: Tensor | None = None

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, objective: str, *, total: bool
    ) -> None:
        self.model = model
        self.x = x
        self.y = y
        self.objective = objective
        self.total = total
        self._checked = False

    def outputs(self, z: Tensor) -> Tensor:
        """Outputs of the model at the inputs z.

        Args:
            z: inputs, (n, …).

        Returns:
            (n,), (n, 1) or (n, C).

        Raises:
            ModelError: a model whose output is no tensor.
        """
        outputs = self.model(z)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"the model: expected a tensor as output, got {type(outputs).__name__}"
            )
        return outputs

    def margins(self, z: Tensor) -> Tensor:
        """``y f(z)``, or ``f[y] − f[j*]`` with j* the runner-up at z; (n,).

        Args:
            z: inputs, (n, …).
        """
        return self._margins(self.outputs(z))

    def _margins(self, outputs: Tensor) -> Tensor:
        margins = margins_of(outputs, self.y, checked=self._checked)
        self._checked = True
        return margins

    def gradient(self, z: Tensor) -> Tensor:
        """``∇_z`` of the margin, or of −loss for the loss objective; shape of z.

        With ``total`` the result can be differentiated by the weights (and by z,
        where z itself depends on them).

        Args:
            z: inputs, (n, …).

        Raises:
            ModelError: outputs that are no tensor, or do not depend on the inputs.
        """
        at_x = z is self.x
        if not z.requires_grad:
            z = z.detach().requires_grad_()
        outputs = self.outputs(z)
        if at_x:
            self.clean = outputs.detach()
        if self.objective == "margin":
            value = self._margins(outputs)
        else:
            one = outputs.ndim == 1 or outputs.shape[1] == 1
            loss = get_loss("logistic" if one else "cross-entropy")
            value = -loss.values(loss.scores(outputs, self.y))
        gradient: Tensor | None = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(
                value.sum(), z, create_graph=self.total, allow_unused=True
            )
        if gradient is None:
            raise ModelError(
                "the model's outputs do not depend on its inputs; there is nothing to attack"
            )
        return gradient


def as_bounds(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    """(low, high) as floats, or None.

    Raises:
        InputError: anything else.
    """
    if bounds is None:
        return None
    try:
        low, high = bounds
    except (TypeError, ValueError):
        raise InputError(f"bounds: expected (low, high), got {bounds!r}") from None
    low, high = real("bounds", low), real("bounds", high)
    if not low < high:
        raise InputError(f"bounds: expected low < high, got {low:g} and {high:g}")
    return low, high


def is_zero(g: Tensor) -> Tensor:
    """Which examples have a gradient of 0, (n,) bool."""
    return ~flat(g.detach()).any(dim=1)


def describe_norm(p: float) -> str:
    """``ℓ2``, ``ℓ∞`` … for people."""
    return "ℓ∞" if math.isinf(p) else "ℓ" + norm_name(p)[1:]
