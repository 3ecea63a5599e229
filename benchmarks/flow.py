"""How far the gradient flow is followed, and how far raw time gets with the same tolerance.

Four measurements, each of which can be left out:

    python benchmarks/flow.py                         # all but MNIST, about three minutes
    python benchmarks/flow.py --only linear raw
    MARGINFLOW_DATA=DATA python benchmarks/flow.py --only mnist

linear  two layers (10-16-1, n = 20, ℓ2, ε = 0.05) to ln t = 10⁶: the angle to the max-margin
        direction, γ_m − ε − γ̂_m, ργ̂_m/ln t
deep    three and four layers to ln t = 10⁵
raw     the same two-layer flow as dW/dt = −∇L in t itself, by scipy's integrators with the same
        tolerance and 30 s each: the ln t that they reach
kinks   ℓ/ρ along flows with and without jumps of ln L: how often it falls
mnist   3-vs-8, 1000 examples, 784-64-1, FGSM 16/255, to ln t = 300 by explicit steps

docs/flow.md explains the results.
"""

from __future__ import annotations

import argparse
import functools
import math
import signal
import time
from collections.abc import Callable
from types import FrameType

import numpy as np
import torch
from scipy.integrate import BDF, DOP853, LSODA, OdeSolver, Radau

import marginflow as mf
from marginflow.alignment import angle
from marginflow.flow import Field
from marginflow.losses import get_loss
from marginflow.references import MaxMargin, max_margin

DATA = "separable:n=20,d=10,margin=0.22,seed=1"
EPS = 0.05
ATTACK = f"exact-linear:p=2,eps={EPS}"
RTOL = 1e-8


def svm_of(spec: str) -> MaxMargin:
    data = mf.load(spec)
    return max_margin(data.x.double().numpy(), data.y.double().numpy())


def turned(model: torch.nn.Module, svm: MaxMargin) -> float:
    layers = [layer.detach() for layer in model.parameters()]
    product = functools.reduce(lambda below, above: above @ below, layers).reshape(-1)
    return float(angle(product, torch.from_numpy(svm.direction.copy())))


def follow(spec: str, log_time: float, seed: int) -> None:
    svm = svm_of(DATA)
    started = time.perf_counter()
    flow = mf.gradient_flow(spec, DATA, attack=ATTACK, log_time=log_time, seed=seed)
    seconds = time.perf_counter() - started
    gap = svm.margin - EPS - flow.final["normalized_margin"]
    print(
        f"{spec:20s} seed {seed}: ln t = {flow.log_time:.7g} in {seconds:5.1f} s, {flow.steps} steps, "
        f"{flow.evaluations} evaluations, {flow.jacobians} Jacobians; angle to the SVM "
        f"{turned(flow.model, svm):.2e} rad, γ_m − ε − γ̂_m = {gap:.1e}, ργ̂_m/ln t = "
        f"{flow.final['margin'] / flow.log_time:.6f}",
        flush=True,
    )


def raw(name: str, limit: float, seed: int) -> None:
    """``dW/dt = −∇L`` in t itself: the field is e^{ln L} times ours."""
    data = mf.load(DATA).to(dtype=torch.float64)
    model = mf.models.build("deep-linear:16", input_shape=data.shape, outputs=1, seed=seed).double()
    attack = mf.attacks.build(ATTACK)
    field = Field(
        model, data.x, data.y, loss=get_loss("exponential"), attack=attack, derivative="total"
    )

    def rate(_: float, w: np.ndarray) -> np.ndarray:
        value = field(w)
        return math.exp(value.log_loss) * value.velocity

    def jacobian(_: float, w: np.ndarray) -> np.ndarray:
        value = field(w)
        # ∇L = L ∇ln L, so ∂(L v) = L (∂v − v vᵀ).
        inner = field.jacobian(w) - np.outer(value.velocity, value.velocity)
        return math.exp(value.log_loss) * inner

    w = field.read()
    solvers: dict[str, Callable[..., OdeSolver]] = {
        "BDF": BDF, "DOP853": DOP853, "LSODA": LSODA, "Radau": Radau
    }  # fmt: skip
    options = {} if name == "DOP853" else {"jac": jacobian}
    atol = RTOL * float(np.linalg.norm(w)) / math.sqrt(len(w))
    solver = solvers[name](rate, 0.0, w, math.inf, rtol=RTOL, atol=atol, **options)

    def out_of_time(_: int, __: FrameType | None) -> None:
        raise TimeoutError("stopped by the clock")

    previous = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, limit)
    started, at, ended = time.perf_counter(), 0.0, "failed: the step size underflowed"
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            while solver.status == "running":
                at = float(solver.t)
                solver.step()
                if not math.isfinite(solver.t):
                    ended = "failed: L underflows, and t leaves the range of float64"
                    break
    except (TimeoutError, OverflowError) as error:
        ended = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    seconds = time.perf_counter() - started
    print(
        f"raw time, {name:7s}: ln t = {math.log(at):7.2f} after {seconds:5.1f} s ({ended})",
        flush=True,
    )


def kinks(seed: int) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(8, 10, dtype=torch.float64, generator=generator)
    finite = mf.attacks.FiniteSet(EPS * deltas / deltas.norm(dim=1, keepdim=True))
    cases: list[tuple[str, mf.attacks.Attack | str | None, float, float | None]] = [
        ("mlp:16,activation=squared-relu", f"fgm:eps={EPS}", 1000.0, None),
        ("mlp:16", finite, 100.0, None),
        ("mlp:16", None, 100.0, None),
    ]
    # Where ln L jumps the falls do not go away with the step.
    for finer in (1e-3, 2e-4):
        cases += [
            ("mlp:16", f"fgsm:eps={EPS}", 100.0, finer),
            ("mlp:16", f"fgm:eps={EPS}", 100.0, finer),
            ("mlp:16,activation=squared-relu", f"fgsm:eps={EPS}", 100.0, finer),
        ]
    for spec, attack, log_time, rtol in cases:
        started = time.perf_counter()
        flow = mf.gradient_flow(
            spec,
            DATA,
            attack=attack,
            log_time=log_time,
            rtol=rtol,
            seed=seed,
        )
        separated = [r for r in flow.metrics if r["separated_steps"]]
        growth = separated[-1]["smoothed_margin"] - separated[0]["smoothed_margin"]
        name, share = getattr(attack, "name", attack), flow.falls / flow.separated_steps
        print(
            f"{spec:32s} {name!s:14s} rtol {flow.tolerance:g}, ln t = {flow.log_time:6.1f}: "
            f"ℓ/ρ fell on {flow.falls} of {flow.separated_steps} steps ({share:.1%}), "
            f"largest {flow.final['largest_fall']:.1e}; net growth of ℓ/ρ {growth:+.3g}; "
            f"γ̂_m fell on {flow.final['margin_falls']}; {time.perf_counter() - started:.1f} s",
            flush=True,
        )
        for note in flow.notes:
            print(f"    {note}")


def mnist(seed: int, log_time: float) -> None:
    started = time.perf_counter()
    flow = mf.gradient_flow(
        "mlp:64", "mnist:3,8,n=1000", attack="fgsm:eps=16/255", log_time=log_time, seed=seed
    )
    print(flow)
    print(
        f"{time.perf_counter() - started:.0f} s, {len(flow.metrics)} measurements; ργ̂_m/ln t = "
        f"{flow.final['margin'] / flow.log_time:.4f}; ℓ/ρ fell on {flow.falls} of "
        f"{flow.separated_steps} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of the gradient flow.")
    parts = ["linear", "deep", "raw", "kinks", "mnist"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts[:-1])
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for each raw integrator")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {DATA}, {ATTACK}, rtol {RTOL:g}"
    )
    if "linear" in arguments.only:
        follow("deep-linear:16", 1e6, arguments.seed)
    if "deep" in arguments.only:
        follow("deep-linear:16,16", 1e5, arguments.seed)
        follow("deep-linear:16,16,16", 1e5, arguments.seed)
    if "raw" in arguments.only:
        for name in ("LSODA", "BDF", "Radau", "DOP853"):
            raw(name, arguments.limit, arguments.seed)
    if "kinks" in arguments.only:
        kinks(arguments.seed)
    if "mnist" in arguments.only:
        mnist(arguments.seed, 300.0)


if __name__ == "__main__":
    main()
