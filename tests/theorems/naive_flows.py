"""Gradient flows as runs, by naive means: explicit steps of the network, or the reduced equation.

Nothing here calls marginflow.theorems.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import marginflow as mf
from marginflow.attacks import Attack, Derivative
from marginflow.references import reduced_flow
from marginflow.runs import Run

Array = NDArray[np.float64]
Weights = list[torch.Tensor]


def net(*widths: int, activation: str = "relu", seed: int = 0) -> torch.nn.Module:
    return mf.models.mlp(*widths, activation=activation, seed=seed).double()


def log_loss(m: torch.Tensor, loss: str) -> torch.Tensor:
    """``ln L``, the textbook formula (margins stay below 700 here)."""
    if loss == "exponential":
        return torch.logsumexp(-m, dim=0) - math.log(len(m))
    return torch.log(torch.nn.functional.softplus(-m).mean())


def put(model: torch.nn.Module, weights: Weights) -> None:
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)


def gradient(
    model: torch.nn.Module,
    data: mf.Dataset,
    attack: Attack | None,
    derivative: Derivative,
    loss: str,
) -> tuple[float, Weights]:
    """``ln L`` and ``∇ ln L`` at x + δ(W), with the random start of seed 0."""
    x = data.x
    if attack is not None:
        draw = torch.Generator().manual_seed(0)
        x = x + attack(model, data.x, data.y, derivative=derivative, generator=draw).delta
    value = log_loss(data.y * model(x).reshape(-1), loss)
    return value.item(), list(torch.autograd.grad(value, list(model.parameters())))


def config_of(model: torch.nn.Module, data: mf.Dataset, **more: Any) -> dict[str, Any]:
    layers = [
        {"name": layer.name, "parameters": list(layer.parameters), "degree": layer.degree}
        for layer in mf.measure_homogeneity(model, data.x).layers
    ]
    attack = more.get("attack", "none")
    return {
        "kind": "flow",
        "data": data.name,
        "data_sha256": data.fingerprint(),
        "classes": list(data.classes),
        "examples": data.n,
        "model_spec": "network",
        "model": getattr(model, "config", None),
        "attack": "none",
        "measure_with": attack,
        "loss": "exponential",
        "lr": None,
        "batch_size": data.n,
        "epochs": None,
        "momentum": 0.0,
        "derivative": "total",
        "seed": 0,
        "dtype": "float64",
        "device": "cpu",
        "layers": layers,
        "keep_weights": True,
        "rtol": 1e-9,
        "method": "naive",
        "ended": "steps",
        **more,
    }


def separate(
    model: torch.nn.Module, data: mf.Dataset, attack: Attack | None, loss: str = "exponential"
) -> torch.nn.Module:
    """Descend by steps of 2 % until L < 1/(2n): where the flow then begins."""
    for _ in range(4000):
        value, slopes = gradient(model, data, attack, "detached", loss)
        if value < -math.log(2 * data.n):
            return model
        size = 0.02 * norm(list(model.parameters())) / norm(slopes)
        put(
            model,
            [p.detach() - size * g for p, g in zip(model.parameters(), slopes, strict=True)],
        )
    raise AssertionError("never separated")


def norm(parts: Weights) -> float:
    return math.sqrt(sum(float(p.detach().square().sum()) for p in parts))


def naive_flow(
    model: torch.nn.Module,
    data: mf.Dataset,
    attack: Attack | None = None,
    *,
    derivative: Derivative = "total",
    loss: str = "exponential",
    steps: int = 300,
    size: float = 1e-3,
    order: int = 1,
    every: int = 30,
    **more: Any,
) -> Run:
    """``dW/ds = −∇ ln L`` with ``dt = ds/L`` by Euler's steps, or the classical fourth order's.

    A step moves the weights by ``size`` of their norm.
    """
    homogeneity = mf.measure_homogeneity(model, data.x)
    monitor = mf.Monitor(
        model, data, attack, loss=loss, homogeneity=homogeneity, schedule="every", strong=None
    )
    kept: dict[int, dict[str, torch.Tensor]] = {}
    log_time = -math.inf
    counts: dict[str, Any] = {
        "separated_steps": 0, "falls": 0, "largest_fall": 0.0, "falls_by_total": 0,
        "largest_fall_by_total": 0.0, "margin_falls": 0,
    }  # fmt: skip

    def slope(weights: Weights) -> tuple[float, Weights]:
        put(model, weights)
        return gradient(model, data, attack, derivative, loss)

    def heights() -> tuple[float, float, float]:
        """ℓ/ρ, ``ℓ/‖W‖^K`` and γ̂_m."""
        m = mf.adversarial_margins(model, data.x, data.y, attack, homogeneity=homogeneity)
        rho, total = homogeneity.norm_product(model), homogeneity.total_norm(model)
        low = -torch.logsumexp(-m.values, dim=0).item()
        return low / rho, low / total**homogeneity.order, m.min / rho

    def record(step: int) -> None:
        kept[step] = {n: v.detach().clone() for n, v in model.state_dict().items()}
        start = log_time == -math.inf
        entry = monitor.measure(
            step, log_time=None if start else log_time, evaluations=order * step, jumps=0,
            sliding=False, log_norm=math.log(homogeneity.total_norm(model)), **counts,
        )  # fmt: skip
        entry["log_tl"] = None if start else log_time + entry["log_loss"]

    before = heights()
    record(0)
    for step in range(1, steps + 1):
        w = [p.detach().clone() for p in model.parameters()]
        value, g = slope(w)
        ds = size * norm(w) / norm(g)
        speeds, fields = [-value], [g]
        for share in (0.5, 0.5, 1.0) if order == 4 else ():
            ahead = [a - share * ds * b for a, b in zip(w, fields[-1], strict=True)]
            value, g = slope(ahead)
            speeds.append(-value)
            fields.append(g)
        shares = np.array([1, 2, 2, 1]) / 6 if order == 4 else np.ones(1)
        mean = [sum(c * f[k] for c, f in zip(shares, fields, strict=True)) for k in range(len(w))]
        put(model, [a - ds * b for a, b in zip(w, mean, strict=True)])
        dt = math.log(ds) + float(np.logaddexp.reduce(np.log(shares) + np.array(speeds)))
        log_time = float(np.logaddexp(log_time, dt))
        after = heights()
        if before[0] > 0:
            counts["separated_steps"] += 1
            for k, name in enumerate(("fall", "fall_by_total")):
                drop = (before[k] - after[k]) / before[k]
                if drop > 1e-12:
                    counts[name.replace("fall", "falls")] += 1
                counts[f"largest_{name}"] = max(counts[f"largest_{name}"], drop)
            counts["margin_falls"] += after[2] < before[2]
        before = after
        if step % every == 0:
            record(step)
    config = config_of(
        model, data, attack="none" if attack is None else attack.spec, derivative=derivative,
        loss=loss, **more,
    )  # fmt: skip
    return Run(config, monitor.records, None, copy.deepcopy(model), kept)


def balanced(p: Array, units: list[torch.Tensor], model: torch.nn.Module) -> None:
    """Layers of rank one and equal norms with product p."""
    size = float(np.linalg.norm(p)) ** (1 / len(units))
    chain = [torch.from_numpy(p / np.linalg.norm(p)), *units]
    put(model, [size * torch.outer(above, below) for below, above in pairwise(chain)])


def balanced_flow(
    depth: int, log_times: Array, data: mf.Dataset, *, eps: float = 0.1, start: Array, **more: Any
) -> Run:
    """The flow of a balanced deep linear network of ``depth`` layers, far out, by its product."""
    widths = [len(start), *([3] * (depth - 1)), 1]
    model = mf.models.deep_linear(*widths, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    units = [torch.randn(w, generator=generator, dtype=torch.float64) for w in widths[1:-1]]
    units = [u / torch.linalg.vector_norm(u) for u in units]
    units.append(torch.ones(1, dtype=torch.float64))
    flow = reduced_flow(
        data.x.numpy(), data.y.numpy(), start, depth=depth, log_times=log_times, eps=eps
    )
    assert flow.success
    attack = mf.attacks.ExactLinear(2.0, eps) if eps else None
    balanced(flow.weights[0], units, model)
    monitor = mf.Monitor(model, data, attack, loss="exponential", schedule="every", strong=None)
    kept = {}
    for step, (clock, p) in enumerate(zip(flow.log_time, flow.weights, strict=True)):
        balanced(p, units, model)
        kept[step] = {n: v.detach().clone() for n, v in model.state_dict().items()}
        entry = monitor.measure(step, log_time=float(clock))
        entry["log_tl"] = float(clock) + entry["log_loss"]
    config = config_of(model, data, attack="none" if attack is None else attack.spec, **more)
    return Run(config, monitor.records, None, model, kept)
