"""The network's own gradient flow, integrated through the engine, against the reduced equation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

import marginflow as mf
from marginflow.attacks import Derivative
from marginflow.engine import AutogradEngine
from marginflow.losses import get_loss
from marginflow.models import linear_layers
from marginflow.references import largest_feasible_eps, reduced_flow

Array = NDArray[np.float64]
START = np.array([0.3, -0.2, 0.4, 0.1])
TIMES = np.array([0.05, 0.5, 3.0, 12.0])


def balanced(widths: tuple[int, ...]) -> torch.nn.Module:
    """A network with product START and ``W_{k+1}ᵀW_{k+1} = W_kW_kᵀ``: rank one and in line."""
    model = mf.models.deep_linear(*widths, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    units = [torch.from_numpy(START)]
    units += [torch.randn(w, generator=generator, dtype=torch.float64) for w in widths[1:-1]]
    units += [torch.ones(1, dtype=torch.float64)]
    units = [u / torch.linalg.vector_norm(u) for u in units]
    size = float(np.linalg.norm(START)) ** (1 / (len(widths) - 1))
    with torch.no_grad():
        for p, (below, above) in zip(model.parameters(), pairwise(units), strict=True):
            p.copy_(size * torch.outer(above, below))
    return model


def network_flow(
    model: torch.nn.Module, engine: AutogradEngine, data: mf.Dataset
) -> tuple[Array, int]:
    """``dW/dt = −∇L(W)`` for all weights at once; the product at TIMES."""
    sizes = [p.numel() for p in model.parameters()]

    def put(flat: Array) -> None:
        parts = torch.split(torch.from_numpy(flat.copy()), sizes)
        with torch.no_grad():
            for p, part in zip(model.parameters(), parts, strict=True):
                p.copy_(part.reshape(p.shape))

    def field(_: float, flat: Array) -> Array:
        put(flat)
        gradients = engine(data.x, data.y).gradients
        return -torch.cat([g.reshape(-1) for g in gradients]).numpy()

    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    solution = solve_ivp(
        field, (0.0, TIMES[-1]), start, t_eval=TIMES, method="DOP853", rtol=1e-12, atol=1e-13
    )
    assert solution.success
    products = []
    for column in solution.y.T:
        put(column)
        first, *rest = linear_layers(model)
        for w in rest:
            first = w @ first
        products.append(first[0].numpy())
    return np.array(products), int(solution.nfev)


@pytest.mark.parametrize(
    ("widths", "p", "loss", "derivative"),
    [
        ((4, 3, 1), 2.0, "exponential", "total"),
        ((4, 3, 1), 2.0, "exponential", "detached"),
        ((4, 5, 1), 3.0, "logistic", "total"),
        ((4, 3, 2, 1), 2.0, "logistic", "detached"),
        ((4, 3, 2, 1), 3.0, "exponential", "total"),
        ((4, 3, 2, 1), 3.0, "exponential", "detached"),
        ((4, 2, 1), None, "logistic", "detached"),
    ],
)
def test_the_reduced_equation(
    widths: tuple[int, ...], p: float | None, loss: str, derivative: Derivative
) -> None:
    data = mf.load("separable:n=8,d=4,margin=0.4")
    x, y = data.x.numpy(), data.y.numpy()
    eps = 0.0 if p is None else 0.3 * largest_feasible_eps(x, y, p=p)
    attack = None if p is None else mf.attacks.ExactLinear(p, eps)
    model = balanced(widths)
    found, evaluations = network_flow(
        model, AutogradEngine(model, get_loss(loss), attack, derivative), data
    )
    reduced = reduced_flow(
        x, y, START, depth=len(widths) - 1, eps=eps, p=2.0 if p is None else p, loss=loss,
        log_times=np.log(TIMES), clock="time", rtol=1e-12, atol=1e-13,
    )  # fmt: skip
    error = float(np.abs(found - reduced.weights).max())
    moved = float(np.linalg.norm(found[-1] - START))
    print(
        f"\nL = {len(widths) - 1}, p = {p}, {loss}, {derivative}: {error:.1e} after a way of "
        f"{moved:.2f} ({evaluations} gradients)"
    )
    assert error < 1e-10
    assert moved > 0.5


def test_an_unbalanced_network_goes_another_way() -> None:
    """The equation needs the balance: without it the same product moves otherwise."""
    data = mf.load("separable:n=8,d=4,margin=0.4")
    model = balanced((4, 3, 1))
    first, last = model.parameters()
    with torch.no_grad():
        first.mul_(2.0)
        last.div_(2.0)
    found, _ = network_flow(model, AutogradEngine(model, get_loss("exponential"), None), data)
    reduced = reduced_flow(
        data.x.numpy(), data.y.numpy(), START, depth=2, log_times=np.log(TIMES), clock="time"
    )
    assert float(np.abs(found - reduced.weights).max()) > 1e-2
