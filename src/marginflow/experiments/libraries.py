"""The same ℓ2-PGD by marginflow and by other people's attack libraries, where they are installed."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marginflow.attacks import PGD, Attack, from_art, from_foolbox, from_torchattacks


@dataclass(frozen=True)
class Setting:
    """The perturbation that every library is asked for: ℓ2-PGD from x itself, x + δ in [0, 1].

    Attributes:
        eps: the budget ε.
        steps: of the PGD.
        batch_size: examples at a time.
    """

    eps: float
    steps: int
    batch_size: int

    @property
    def step_size(self) -> float:
        """The usual 2.5 ε/steps."""
        return 2.5 * self.eps / self.steps


Method = Callable[[nn.Module, Tensor, Tensor, Setting], Tensor]
"""(model with one output, x, labels −1/+1, setting) ↦ x + δ."""


def _ours(objective: str) -> Method:
    def method(model: nn.Module, x: Tensor, y: Tensor, how: Setting) -> Tensor:
        attack = PGD(
            "l2",
            eps=how.eps,
            steps=how.steps,
            step_size=how.step_size,
            bounds=(0, 1),
            objective=objective,
        )
        return x + attack(model, x, y).delta

    return method


def _theirs(build: Callable[[Setting], Attack]) -> Method:
    def method(model: nn.Module, x: Tensor, y: Tensor, how: Setting) -> Tensor:
        return x + build(how)(model, x, y).delta

    return method


def _torchattacks(how: Setting) -> Attack:
    return from_torchattacks(
        "PGDL2", eps=how.eps, alpha=how.step_size, steps=how.steps, random_start=False
    )


def _foolbox(how: Setting) -> Attack:
    return from_foolbox(
        "L2PGD", eps=how.eps, abs_stepsize=how.step_size, steps=how.steps, random_start=False
    )


def _art(how: Setting) -> Attack:
    return from_art(
        "ProjectedGradientDescent",
        eps=how.eps,
        p=2,
        eps_step=how.step_size,
        max_iter=how.steps,
    )


OURS = "marginflow"
LOSS = 'marginflow, objective="loss"'
METHODS: dict[str, Method] = {
    OURS: _ours("margin"),
    LOSS: _ours("loss"),
    "ART": _theirs(_art),
    "foolbox": _theirs(_foolbox),
    "torchattacks": _theirs(_torchattacks),
}
"""Each by the name under which a figure shows it."""

MODULES = {"ART": "art", "foolbox": "foolbox", "torchattacks": "torchattacks"}
"""The module that a method of another library needs."""


def installed_methods() -> dict[str, Method]:
    """Those of :data:`METHODS` whose library is there."""
    return {
        name: method
        for name, method in METHODS.items()
        if name not in MODULES or importlib.util.find_spec(MODULES[name]) is not None
    }


def scaled(model: nn.Module, c: float) -> nn.Module:
    """A copy of ``model`` with every weight times c, in evaluation mode."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(c)
    return copied.eval()


def perturbed(method: Method, model: nn.Module, x: Tensor, y: Tensor, how: Setting) -> Tensor:
    """The perturbed examples x + δ, batch by batch."""
    batches = zip(torch.split(x, how.batch_size), torch.split(y, how.batch_size), strict=True)
    return torch.cat([method(model, xb, yb, how).detach() for xb, yb in batches])


@torch.no_grad()
def signed_outputs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The margins y f(x), (n,)."""
    outputs: Tensor = model(x).reshape(-1) * y
    return outputs


def share_right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of examples with a positive margin."""
    return float((signed_outputs(model, x, y) > 0).double().mean())
