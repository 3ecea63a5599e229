"""The same ℓ2-PGD by marginflow and by other people's attack libraries, where they are installed."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marginflow.attacks import PGD


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


class TwoLogits(nn.Module):
    """The same classifier with two outputs, [−f/2, f/2]: attack libraries know no single one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 2) of the classes −1 and +1."""
        f = self.model(x).reshape(-1, 1)
        return torch.cat([-f / 2, f / 2], dim=1)


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


def _torchattacks(model: nn.Module, x: Tensor, y: Tensor, how: Setting) -> Tensor:
    pgd: Any = importlib.import_module("torchattacks").PGDL2
    attack = pgd(
        TwoLogits(model), eps=how.eps, alpha=how.step_size, steps=how.steps, random_start=False
    )
    moved: Tensor = attack(x, (y > 0).long())
    return moved


def _foolbox(model: nn.Module, x: Tensor, y: Tensor, how: Setting) -> Tensor:
    foolbox: Any = importlib.import_module("foolbox")
    attack = foolbox.attacks.L2ProjectedGradientDescentAttack(
        abs_stepsize=how.step_size, steps=how.steps, random_start=False
    )
    wrapped = foolbox.PyTorchModel(TwoLogits(model).eval(), bounds=(0, 1), device=x.device)
    moved: Tensor = attack(wrapped, x, (y > 0).long(), epsilons=how.eps)[0]
    return moved


def _art(model: nn.Module, x: Tensor, y: Tensor, how: Setting) -> Tensor:
    evasion: Any = importlib.import_module("art.attacks.evasion")
    classification: Any = importlib.import_module("art.estimators.classification")
    classifier = classification.PyTorchClassifier(
        TwoLogits(model),
        nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        2,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = evasion.ProjectedGradientDescent(
        classifier, norm=2, eps=how.eps, eps_step=how.step_size, max_iter=how.steps, verbose=False
    )
    return torch.from_numpy(attack.generate(x.numpy(), (y > 0).long().numpy()))


OURS = "marginflow"
LOSS = 'marginflow, objective="loss"'
METHODS: dict[str, Method] = {
    OURS: _ours("margin"),
    LOSS: _ours("loss"),
    "ART": _art,
    "foolbox": _foolbox,
    "torchattacks": _torchattacks,
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
