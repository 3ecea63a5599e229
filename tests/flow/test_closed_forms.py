"""The flow against closed forms, the order of the explicit steps, and what a tolerance promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flow_problems import DATA, EXACT, field_of, one_example, product

import marginflow as mf
from marginflow.alignment import angle
from marginflow.flow import Follower, State, Tally
from marginflow.flow._steps import Steps
from marginflow.references import closed_forms, max_margin


@pytest.mark.parametrize("attack", [None, "exact-linear:p=2,eps=0.3", "fgm:eps=0.3"])
@pytest.mark.parametrize(
    ("depth", "closed_form"),
    [(1, closed_forms.one_layer_norm), (2, closed_forms.two_layer_norm)],
)
def test_one_example(depth: int, closed_form: object, attack: str | None) -> None:
    """``ρ(t)`` to 1e-8 at every ln t up to 10³, both derivatives of FGM included."""
    model, data = one_example(depth, 1.5, 0.2)
    flow = mf.gradient_flow(model, data, attack=attack, log_time=1000.0)
    slope = 1.5 - (0.0 if attack is None else 0.3)
    records = [r for r in flow.metrics if r["log_time"] is not None]
    times = [r["log_time"] for r in records]
    expected = closed_form(np.array(times), slope=slope, start=0.2)  # type: ignore[operator]
    found = np.array([np.prod(r["layer_norms"]) for r in records])
    worst = float(np.abs(found / expected - 1).max())
    print(f"L = {depth}, attack {attack}: worst relative error {worst:.2e} at {len(times)} times")
    assert worst <= 1e-8
    assert times[0] < -2.9
    assert times[-1] == pytest.approx(1000.0, rel=1e-8)
    assert times[-1] >= 1000.0


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_the_clock_against_raw_time(loss: str) -> None:
    """``dW/dt = −∇L`` integrated naively in t, as long as t is a number one can step through."""
    from scipy.integrate import solve_ivp

    data = mf.load("separable:n=6,d=3,margin=0.4,seed=2").to(dtype=torch.float64)
    model = mf.models.mlp(3, 4, 1, activation="squared-relu", seed=1).double()
    parameters = list(model.parameters())
    start = torch.cat([p.detach().reshape(-1) for p in parameters]).numpy()

    def rate(_: float, w: np.ndarray) -> np.ndarray:
        at = 0
        with torch.no_grad():
            for p in parameters:
                p.copy_(torch.from_numpy(w[at : at + p.numel()]).reshape(p.shape))
                at += p.numel()
        m = data.y * model(data.x).reshape(-1)
        value = torch.exp(-m) if loss == "exponential" else torch.log1p(torch.exp(-m))
        parts = torch.autograd.grad(value.mean(), parameters)
        return -torch.cat([g.reshape(-1) for g in parts]).numpy()

    raw = solve_ivp(rate, (0, math.e**6), start, method="DOP853", rtol=1e-11, atol=1e-12)
    again = mf.models.mlp(3, 4, 1, activation="squared-relu", seed=1).double()
    flow = mf.gradient_flow(again, data, loss=loss, log_time=6.0, rtol=1e-9)
    found = torch.cat([p.detach().reshape(-1) for p in flow.model.parameters()]).numpy()
    assert flow.log_time == pytest.approx(6.0, abs=1e-7)
    np.testing.assert_allclose(found, raw.y[:, -1], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(("descent", "order"), [(True, 2), (False, 1)])
def test_order_of_the_explicit_steps(descent: bool, order: int) -> None:
    """Heun's steps (with descent) are of order 2, Euler's of order 1, on a smooth field."""
    errors, sizes = [], [0.02, 0.01, 0.005, 0.0025]
    for eta in sizes:
        model, data = one_example(2, 1.5, 0.2)
        field = field_of(model, data)
        w = field.read()
        steps = Steps(field, 1e-5, Tally(), descent=descent, fixed=eta)
        state = State(w, -math.inf, field(w).log_loss, eta, False, "steps")
        goal = 1.2

        def passed(w: np.ndarray, log_time: float, log_loss: float, goal: float = goal) -> float:
            return math.log(np.linalg.norm(w)) - goal

        state = steps.advance(state, [passed], lambda *_: None, lambda _: False)
        rho = math.exp(2 * goal) / 2
        # ρ(t) inverted: 2 g t = Ei(gρ) − Ei(gρ₀).
        from scipy.special import expi

        exact = math.log((expi(1.5 * rho) - expi(1.5 * 0.2)) / 3.0)
        errors.append(abs(state.log_time - exact))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    print(f"descent {descent}: errors {errors}, order {slope:.3f}")
    assert slope == pytest.approx(order, abs=0.1)


def test_halving_the_tolerance_moves_the_result_by_no_more_than_it_promises() -> None:
    """``Flow.tolerance``: 1000 × tolerance, of W/‖W‖ and of ln t at a given ln‖W‖."""
    for rtol in (1e-6, 1e-8):
        ends = []
        for tolerance in (rtol, rtol / 2):
            flow = mf.gradient_flow(
                "deep-linear:4", DATA, attack=EXACT, log_norm=3.0, rtol=tolerance, seed=3
            )
            assert flow.reason == "log_norm"
            ends.append(
                (
                    flow,
                    np.concatenate([p.detach().numpy().ravel() for p in flow.model.parameters()]),
                )
            )
        (a, u), (b, v) = ends
        moved = np.linalg.norm(u / np.linalg.norm(u) - v / np.linalg.norm(v))
        clock = abs(a.log_time / b.log_time - 1)
        print(
            f"rtol {rtol:g}: direction moved by {moved / rtol:.2g} rtol, ln t by {clock / rtol:.2g} rtol"
        )
        assert moved <= 1000 * a.tolerance
        assert clock <= 1000 * a.tolerance


def test_two_layers_turn_to_the_svm_direction() -> None:
    """Section 3.1's limit, reached: the whole claim at ln t = 10⁶ is benchmarks/flow.py's."""
    flow = mf.gradient_flow("deep-linear:16", DATA, attack=EXACT, log_time=1e4, seed=0)
    data = mf.load(DATA)
    svm = max_margin(data.x.double().numpy(), data.y.double().numpy())
    turned = float(
        angle(torch.from_numpy(product(flow.model)), torch.from_numpy(svm.direction.copy()))
    )
    gap = svm.margin - 0.05 - flow.final["normalized_margin"]
    ratio = flow.final["margin"] / flow.log_time
    print(f"angle {turned:.2e}, gap {gap:.2e}, ργ̂_m/ln t {ratio:.6f}, {flow.steps} steps")
    assert flow.log_time >= 1e4
    assert turned <= 1e-3
    assert 0 < gap <= 2e-5
    assert ratio == pytest.approx(1, abs=2e-3)
    assert flow.falls == 0
    assert flow.notes == ("stiff from the start: no jump was found, 176 weights",)


def test_the_follower_is_the_same_for_detached_and_total_where_they_agree() -> None:
    ends = []
    for derivative in ("detached", "total"):
        flow = mf.gradient_flow(
            "deep-linear:6",
            DATA,
            attack="fgm:eps=0.05",
            derivative=derivative,
            log_time=50.0,  # type: ignore[arg-type]
        )
        ends.append(product(flow.model))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)
    assert Follower.__doc__
