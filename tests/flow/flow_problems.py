"""Small problems for the tests of the flow."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import marginflow as mf
from marginflow.flow import Field
from marginflow.losses import get_loss

DATA = "separable:n=20,d=10,margin=0.22,seed=1"
EXACT = "exact-linear:p=2,eps=0.05"


def finite_set(features: int, count: int = 8, eps: float = 0.05) -> mf.attacks.FiniteSet:
    """Random perturbations of length ε."""
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(count, features, dtype=torch.float64, generator=generator)
    return mf.attacks.FiniteSet(eps * deltas / deltas.norm(dim=1, keepdim=True))


def field_of(
    model: nn.Module,
    data: mf.Dataset,
    attack: object = None,
    *,
    loss: str = "exponential",
    derivative: str = "total",
    closed: bool = True,
) -> Field:
    """The field of a model in float64, in closed form where there is one (unless not ``closed``)."""
    return Field(
        model,
        data.x,
        data.y,
        loss=get_loss(loss),
        attack=mf.attacks.build(attack),  # type: ignore[arg-type]
        derivative=derivative,  # type: ignore[arg-type]
        closed=closed,
    )


def one_example(depth: int, norm: float, rho: float) -> tuple[nn.Module, mf.Dataset]:
    """One example of that norm, and an aligned balanced linear network of product norm ρ."""
    direction = torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64)
    data = mf.Dataset((norm * direction).unsqueeze(0), torch.tensor([1]))
    model = mf.models.deep_linear(3, *([4] * (depth - 1)), 1, seed=0).double()
    side = rho ** (1 / depth)
    left = torch.nn.functional.normalize(torch.arange(1.0, 5.0, dtype=torch.float64), dim=0)
    ends = [direction, *([left] * (depth - 1)), torch.ones(1, dtype=torch.float64)]
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(side * torch.outer(ends[k + 1], ends[k]))
    return model, data


def product(model: nn.Module) -> np.ndarray:
    """W_Π of a deep linear network with one output, (d,)."""
    total = None
    for parameter in model.parameters():
        total = parameter.detach() if total is None else parameter.detach() @ total
    assert total is not None
    return total.reshape(-1).numpy()
