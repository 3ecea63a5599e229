"""The library's own gradient, integrated as a flow, against the reduced equation of the product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

import marginflow as mf
from marginflow.attacks import Derivative
from marginflow.engine import AutogradEngine
from marginflow.losses import get_loss
from marginflow.models import linear_layers, load_weights
from marginflow.references import reduced_flow


def balanced(depth: int, d: int, seed: int) -> tuple[torch.nn.Module, NDArray[np.float64]]:
    """A network with ``W_{k+1}ᵀW_{k+1} = W_kW_kᵀ``: rank one, aligned, equal norms; and its product."""
    rng = np.random.default_rng(seed)
    sizes = [d, *[4] * (depth - 1), 1]
    units = [v / np.linalg.norm(v) for v in (rng.normal(size=s) for s in sizes)]
    units[-1] = np.ones(1)
    model = mf.models.deep_linear(*sizes).double()
    weights = {}
    for k, name in enumerate(model.state_dict()):
        weights[name] = torch.from_numpy(0.9 * np.outer(units[k + 1], units[k]))
    load_weights(model, weights)
    return model, 0.9**depth * units[0]


@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize(
    ("depth", "p"), [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0), (2, 3.0), (3, 3.0)]
)
def test_the_networks_flow_is_the_reduced_one(depth: int, p: float, derivative: Derivative) -> None:
    data = mf.load("separable:n=15,d=5,margin=0.4,seed=3")
    model, start = balanced(depth, 5, seed=7)
    attack = mf.attacks.ExactLinear(p, 0.1)
    engine = AutogradEngine(model, get_loss("exponential"), attack, derivative)
    sizes = [w.numel() for w in engine.parameters]

    def field(_: float, flat: NDArray[np.float64]) -> NDArray[np.float64]:
        with torch.no_grad():
            parts = torch.split(torch.from_numpy(flat.copy()), sizes)
            for parameter, part in zip(engine.parameters, parts, strict=True):
                parameter.copy_(part.reshape(parameter.shape))
        gradients = engine(data.x, data.y).gradients
        return -torch.cat([g.reshape(-1) for g in gradients]).numpy()

    log_times = np.log([0.5, 2.0, 8.0, 30.0])
    flat = torch.cat([w.detach().reshape(-1) for w in engine.parameters]).numpy()
    done = solve_ivp(
        field, (0, 31), flat, "DOP853", t_eval=np.exp(log_times), rtol=1e-12, atol=1e-14
    )
    reduced = reduced_flow(
        data.x.numpy(), data.y.numpy(), start, depth=depth, log_times=log_times, eps=0.1, p=p,
        clock="time", rtol=1e-12, atol=1e-14,
    )  # fmt: skip
    assert done.success
    assert reduced.success
    worst = 0.0
    for column, expected in zip(done.y.T, reduced.weights, strict=True):
        field(0.0, column)  # puts the weights into the network
        product = linear_layers(model)[0]
        for w in linear_layers(model)[1:]:
            product = w @ product
        difference = np.linalg.norm(product.numpy()[0] - expected) / np.linalg.norm(expected)
        worst = max(worst, float(difference))
    print(f"L = {depth}, p = {p:g}, {derivative}: {worst:.1e}")
    assert worst < 1e-10
