"""The methods of margin maximisation, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from marginflow._checks import choice, unknown
from marginflow._specs import interval, number, parse, word
from marginflow.ascent._adam import Adam
from marginflow.ascent._method import Method, Range, checked_share, velocities_of
from marginflow.ascent._steepest_step import get_geometry, steepest_step
from marginflow.ascent._steps import RunningSize, relative_step, sphere_step
from marginflow.errors import SpecificationError

if TYPE_CHECKING:
    from marginflow.ascent._ascent import Ascent

_NORMS = ("l2", "sign", "spectral", "adam")


class Spheres(Method):
    """Annealed ascent on the product of unit spheres, with momentum and hard examples.

    Every layer keeps norm 1, so margins are normalised margins. With T the tangential part of
    ``∇ ln L_τ``, of length 1 over all layers together (:func:`sphere_step`),

        v ← μ v + T/‖T‖,    Ŵ_k ← (Ŵ_k − a v_k)/‖·‖.

    The gradient is that of ln L: that of L underflows once τ γ̂ passes about 100, and a normalised
    step then destroys the network. Large angular steps at first are what finds features with large
    margins; small steps from the start stay near the initial weights, as SGD does.

    Source: marginflow.

    Args:
        angle: the angular step a in radians, first and last; falling.
        tau: the temperature in units of 1/median |γ̂_i|, first and last; rising.
        momentum: μ in [0, 1).
        hard: share of each batch drawn from the hardest examples, in [0, 1).
        pool: the share of all examples that counts as hardest, in (0, 1].

    Raises:
        InputError: a number out of range, an angle that rises, a temperature that falls.
    """

    name = "spheres"
    length = "angle"

    def __init__(
        self,
        angle: Range = (0.01, 1e-4),
        tau: Range = (1.0, 200.0),
        momentum: float = 0.9,
        hard: float = 0.8,
        pool: float = 0.1,
    ) -> None:
        super().__init__(angle, tau, hard, pool)
        self.momentum = checked_share(f"{self.name}: momentum", momentum)

    def own(self) -> Mapping[str, str]:
        """The momentum."""
        return {"momentum": repr(self.momentum)}

    def move(self, trainer: Ascent, gradients: Sequence[Tensor], log_loss: float) -> None:
        """One step on the spheres."""
        velocities = velocities_of(trainer)
        sphere_step(
            trainer.layers,
            [[gradients[i] for i in places] for places in trainer.places],
            [[velocities[i] for i in places] for places in trainer.places],
            angle=trainer.learning_rate,
            momentum=self.momentum,
            norms=[1.0] * len(trainer.layers),
            names=[layer.name for layer in trainer.homogeneity.layers],
        )


class Polish(Spheres):
    """:class:`Spheres` from a trained network, with smaller steps.

    Balancing the layers, each to norm 1, changes no decision and no normalised margin. The
    network must separate the perturbed data.

    Source: marginflow.
    """

    name = "polish"
    separated = True

    def __init__(
        self,
        angle: Range = (0.005, 1e-4),
        tau: Range = (1.0, 200.0),
        momentum: float = 0.9,
        hard: float = 0.8,
        pool: float = 0.1,
    ) -> None:
        super().__init__(angle, tau, momentum, hard, pool)

    def warmed(self) -> Spheres:
        """The schedules of :class:`Spheres`, which begin with longer steps at a low temperature."""
        return Spheres(momentum=self.momentum, hard=self.hard, pool=self.pool)


class Relative(Method):
    """Relative normalised steps, ``W ← W − η‖W‖ w_B G/‖G‖`` with ``G = ∇ ln L``.

    w_B is the weight of the batch, from a running estimate (:class:`RunningSize`) of ‖∇L_B‖ =
    ``e^{ln L_B}‖∇ ln L_B‖``: without it batches of small loss would count as much as those that matter.
    The weights are free to grow, from balanced layers; τ is relative to the margins that they have.

    Source: marginflow.

    Args:
        step: η, first and last; falling.
        tau, hard, pool: as for :class:`Spheres`.
    """

    name = "relative"

    def __init__(
        self,
        step: Range = (0.02, 3e-4),
        tau: Range = (1.0, 200.0),
        hard: float = 0.8,
        pool: float = 0.1,
    ) -> None:
        super().__init__(step, tau, hard, pool)

    def move(self, trainer: Ascent, gradients: Sequence[Tensor], log_loss: float) -> None:
        """One relative step, the running estimates in the state."""
        running = RunningSize(log_mean=self.state.get("log_size"))
        relative_step(
            trainer.engine.parameters,
            gradients,
            step=trainer.learning_rate,
            running=running,
            log_loss=log_loss,
        )
        if running.log_mean is not None:
            self.state["log_size"] = running.log_mean


class Steepest(Method):
    """Relative steps of steepest descent in another norm, ``W ← W − η‖W‖ V``; a reference.

    ``V = argmax_{‖V‖≤1} ⟨V, ∇ ln L⟩``: the normalised gradient for ``l2``, its signs for ``sign``,
    ``U Vᵀ`` in each layer for ``spectral``; ``adam`` steps by ``m̂/√v̂`` in the norm of ``sign``. Each
    seeks the margin in its own norm, :meth:`Geometry.normalized_margin`.

    Source: the norms of Tsilivis et al. (2025).

    Args:
        norm: ``l2``, ``sign``, ``spectral`` or ``adam``.
        step: η, first and last; falling.
        tau, hard, pool: as for :class:`Spheres`.

    Attributes:
        geometry: its norm, with what it remembers.

    Raises:
        SpecificationError: an unknown norm.
    """

    name = "steepest"

    def __init__(
        self,
        norm: str = "sign",
        step: Range = (3e-3, 3e-5),
        tau: Range = (1.0, 200.0),
        hard: float = 0.8,
        pool: float = 0.1,
    ) -> None:
        super().__init__(step, tau, hard, pool)
        self.norm = choice("steepest: norm", norm, _NORMS)
        self.geometry = get_geometry(norm)

    def own(self) -> Mapping[str, str]:
        """The norm, as in :attr:`spec`."""
        return {"norm": self.norm}

    def tensors(self) -> dict[str, Tensor]:
        """The memory of Adam.

        Returns:
            by name, of the same shapes as the weights.
        """
        return self.geometry.state() if isinstance(self.geometry, Adam) else {}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with this memory."""
        if isinstance(self.geometry, Adam):
            self.geometry.restore(tensors)

    def measured(self, trainer: Ascent, margin: float) -> dict[str, float]:
        """``matching_margin``: ``min_i m_i/‖W‖^K`` in this norm."""
        order = trainer.homogeneity.order
        weights = trainer.engine.parameters
        return {"matching_margin": self.geometry.normalized_margin(weights, margin, order)}

    def move(self, trainer: Ascent, gradients: Sequence[Tensor], log_loss: float) -> None:
        """One step in the norm."""
        steepest_step(trainer.engine.parameters, gradients, self.geometry, trainer.learning_rate)


_METHODS: dict[str, type[Method]] = {c.name: c for c in (Spheres, Polish, Relative, Steepest)}
_ELSEWHERE = ("dual", "loss-based", "normalized")
"""Methods of mf.maximize that are no steps of an ascent."""
_PARSERS: Mapping[str, Callable[[str, str], Any]] = {
    "angle": interval,
    "step": interval,
    "tau": interval,
    "momentum": number,
    "hard": number,
    "pool": number,
    "norm": word,
}
_OPTIONS = {
    "spheres": ("angle", "tau", "momentum", "hard", "pool"),
    "polish": ("angle", "tau", "momentum", "hard", "pool"),
    "relative": ("step", "tau", "hard", "pool"),
    "steepest": ("norm", "step", "tau", "hard", "pool"),
}


def build_method(method: str | Method) -> Method:
    """A method from its specification (``spheres``, ``polish:angle=0.005..1e-4``), or itself.

    Source: marginflow.

    Args:
        method: a specification such as ``spheres:tau=1..100``, or a method.

    Raises:
        SpecificationError: an unknown name or option.
        InputError: a number out of range.
    """
    if isinstance(method, Method):
        return method
    spec = parse(method, "method")
    if spec.name not in _METHODS:
        raise unknown("method", spec.name, (*_METHODS, *_ELSEWHERE))
    if spec.args:
        raise SpecificationError(f"method {method!r}: {spec.args[0]!r} has no name")
    parsers = {key: _PARSERS[key] for key in _OPTIONS[spec.name]}
    return _METHODS[spec.name](**spec.parsed(parsers))
