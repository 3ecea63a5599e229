"""What the tables of refused calls share: an entry, small data, calls that would be over at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.errors import (
    InputError,
    MarginflowError,
)

DATA = mf.datasets.separable(8, 3, 0.3)
X, Y = DATA.x, DATA.y
EMPTY = torch.empty(0, 3)
LINEAR = mf.models.deep_linear(3, 2, 1, seed=0).double()
FGM = mf.attacks.FGM(0.1)


@dataclass(frozen=True)
class Call:
    """One call."""

    id: str
    call: Callable[[], Any]
    says: str
    error: type[MarginflowError] = InputError


def net(*widths: int) -> nn.Module:
    """A network for the data; without widths, one hidden layer."""
    return mf.models.mlp(3, *(widths or (4, 1)), seed=0).double()


def train(**options: Any) -> Any:
    """A training that would be over at once."""
    given = {"model": "mlp:2", "data": DATA, "epochs": 1, "out": "new"} | options
    return mf.train(given.pop("model"), given.pop("data"), **given)


def flow(**options: Any) -> Any:
    """A flow that would be over at once."""
    given = {"model": "deep-linear", "data": DATA, "log_time": 1.0, "out": "new"} | options
    return mf.gradient_flow(given.pop("model"), given.pop("data"), **given)


def maximize(**options: Any) -> Any:
    """An ascent that would be over at once."""
    given = {"model": "mlp:4", "data": DATA, "epochs": 1, "out": "new"} | options
    return mf.maximize(given.pop("model"), given.pop("data"), **given)


def margins(model: Any = LINEAR, x: Any = X, y: Any = Y, attack: Any = FGM, **options: Any) -> Any:
    """Margins of the data."""
    return mf.adversarial_margins(model, x, y, attack, **options)


def certificate(model: Any = LINEAR, x: Any = X, y: Any = Y, **options: Any) -> Any:
    """A certificate of the data."""
    return mf.kkt_certificate(model, x, y, **options)


def monitor(model: Any = LINEAR, data: Any = DATA, attack: Any = FGM, **options: Any) -> Any:
    """A monitor with a run directory."""
    return mf.Monitor(model, data, attack, **({"out": "new"} | options))


class Fork(nn.Module):
    """Outputs that are no tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Dice(nn.Module):
    """Outputs that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * torch.rand(1, dtype=x.dtype)
        return out


class Nothing(nn.Module):
    """A network without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)


def biased() -> nn.Module:
    """A network with a bias in a hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()


def zero() -> nn.Module:
    """A network of zeros."""
    model = net()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


def half_dead() -> nn.Module:
    """A network whose one unit is active on less than half of the examples."""
    model = net(1, 1)
    with torch.no_grad():
        weight = next(iter(model.parameters()))
        weight.copy_(X[:1])
    return model


def frozen() -> nn.Module:
    """A network without a trainable parameter."""
    return net().requires_grad_(False)


def closed_monitor() -> Any:
    """A measurement of a monitor that is closed."""
    with mf.Monitor(LINEAR, DATA, FGM) as open_one:
        open_one.measure(0)
    return open_one


def calls_of(*rows: tuple[Any, ...]) -> list[Call]:
    return [Call(*row) for row in rows]
