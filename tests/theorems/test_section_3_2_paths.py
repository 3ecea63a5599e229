"""Section 3.2 along a path: gradient flows by naive means, far out by the reduced equation, and forged."""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from naive_flows import balanced_flow, gradient, naive_flow, net, separate
from theorem_runs import changed

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, Derivative, ExactLinear, FiniteSet
from marginflow.runs import Run
from marginflow.theorems import Evidence, Verdict, verify
from marginflow.theorems.eq_36 import eq_36
from marginflow.theorems.lemma_10 import lemma_10
from marginflow.theorems.lemma_11 import lemma_11
from marginflow.theorems.theorem_3 import theorem_3
from marginflow.theorems.theorem_4 import _excess, theorem_4

DELTAS = torch.tensor(
    [[0.1, 0.0, -0.1, 0.0], [0.0, -0.2, 0.0, 0.1], [0.0, 0.1, 0.1, -0.1], [0.0, 0.0, 0.0, 0.0]]
).double()
FINITE = FiniteSet(DELTAS)
LINEAR = "separable:n=8,d=4,margin=0.4"
START = np.array([0.3, -0.2, 0.4, 0.1])


def data() -> mf.Dataset:
    """Not linearly separable: the flow meets kinks and flips of signs."""
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return mf.Dataset(x, torch.sign(x[:, 0] * x[:, 1] + 0.3).long())


@functools.cache
def flow(
    activation: str,
    attack: Attack | None,
    derivative: Derivative = "total",
    loss: str = "exponential",
    order: int = 1,
    steps: int = 150,
) -> Run:
    """From L < 1/(2n) on, by steps of a thousandth of ‖W‖."""
    model = separate(net(4, 8, 1, activation=activation, seed=2), data(), attack)
    return naive_flow(
        model, data(), attack, derivative=derivative, loss=loss, order=order, steps=steps
    )


SMOOTH, SIGNS, BALL = FGM(0.1), FGSM(0.1), FGM(0.2)


def by_name(verdicts: tuple[Verdict, ...]) -> dict[str, Verdict]:
    return {v.statement: v for v in verdicts}


def path_verdicts(
    run: Run, attack: Attack | None = None, d: mf.Dataset | None = None
) -> dict[str, Verdict]:
    e = Evidence(run, data() if d is None else d, attack=attack)
    return by_name((*theorem_3(e), *theorem_4(e), lemma_11(e)))


def shown(verdict: Verdict) -> Verdict:
    print(f"\n{verdict.statement}: {verdict.outcome}; {verdict.measured}")
    return verdict


# Where the theorem applies


@pytest.mark.parametrize("order", [1, 4])
def test_a_smooth_network_and_a_smooth_attack(order: int) -> None:
    run = flow("squared-relu", SMOOTH, order=order)
    found = path_verdicts(run)
    assert run.final["falls"] == run.final["falls_by_total"] == 0
    for name in ("monotone", "γ̂_m", "identity"):
        assert shown(found[f"Theorem 4 ({name})"]).outcome == "holds"
    for name in ("Theorem 3 (growth)", "Theorem 3 (rate)", "Corollary 1"):
        assert found[name].outcome == "not reached"
    # Euler's steps break the conservation law by their own error, those of fourth order do not
    assert shown(found["Lemma 11"]).outcome == ("fails" if order == 1 else "holds")


@pytest.mark.parametrize(
    ("attack", "derivative"), [(None, "detached"), (FINITE, "detached"), (FINITE, "total")]
)
def test_an_exact_maximum_on_a_relu_network(attack: Attack | None, derivative: Derivative) -> None:
    """ℓ/ρ grows although δ jumps; γ̂_m falls on many steps, and that is no failure."""
    run = flow("relu", attack, derivative)
    found = path_verdicts(run, attack)
    assert shown(found["Theorem 4 (monotone)"]).outcome == "holds"
    assert run.final["falls"] == 0
    assert run.final["margin_falls"] > 20
    least = found["Theorem 4 (γ̂_m)"]
    assert shown(least).outcome == "holds"
    assert f"{run.final['margin_falls'] / 150:.2%} of 150 steps" in least.measured


def test_the_bound_of_the_slope_by_differences() -> None:
    """d ln(ℓ/ρ)/dt − (1/ν) Σ ‖P_kG_k‖² in units of d ln ρ/dt, from two short steps along −∇L."""
    e = Evidence(flow("squared-relu", SMOOTH), data())
    site, d = e.sites[3], data()
    model = site.model
    log_loss, g = gradient(model, d, SMOOTH, "total", "exponential")
    start = [p.detach().clone() for p in model.parameters()]
    degrees = site.homogeneity.degrees

    def at(h: float) -> tuple[float, float]:
        with torch.no_grad():
            for p, w, v in zip(model.parameters(), start, g, strict=True):
                p.copy_(w - h * v)
        ell = -gradient(model, d, SMOOTH, "total", "exponential")[0] - math.log(d.n)
        rho = sum(
            c * math.log(float(p.detach().norm()))
            for c, p in zip(degrees, model.parameters(), strict=True)
        )
        return math.log(ell) - rho, rho

    (up, rho_up), (down, rho_down) = at(1e-5), at(-1e-5)
    at(0.0)
    x = d.x + SMOOTH(model, d.x, d.y).delta
    m = d.y * model(x).detach().reshape(-1)
    nu = float((torch.exp(-m) * m).mean()) / math.exp(log_loss)
    across = 0.0
    for w, v in zip(start, g, strict=True):
        unit = w / w.norm()
        across += float((v - (v * unit).sum() * unit).square().sum())
    expected = ((up - down) / 2e-5 - across / nu) / ((rho_up - rho_down) / 2e-5)
    assert _excess(site, e) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.1


def test_a_deep_linear_flow_and_the_statements_of_section_3_1() -> None:
    d = mf.load(LINEAR)
    attack = ExactLinear(2.0, 0.1)
    model = separate(mf.models.deep_linear(4, 3, 3, 1, seed=0).double(), d, attack)
    for p in model.parameters():
        p.data *= 1.1
    run = naive_flow(model, d, attack, order=4, steps=150, size=2e-3, every=15, loss="logistic")
    found = by_name(verify(run, d))
    for name in ("Lemma 1", "Lemma 2", "Lemma 5"):
        assert found[name].outcome == "does not apply"
        assert "gradient descent with steps (a gradient flow)" in found[name].measured
    for name in ("Lemma 6", "Eq. 36", "Lemma 7", "Lemma 8", "Lemma 11", "Lemma 4", "Lemma 9"):
        assert shown(found[name]).outcome == "holds"
    assert "fails" not in {v.outcome for v in found.values()}
    # The law of Eq. 36 by numpy
    path = [[w.numpy() for w in weights.values()] for weights in run.trajectory().values()]
    size = max(float(np.sum(w**2)) for weights in path for w in weights)
    balances = [[b.T @ b - a @ a.T for a, b in pairwise(w)] for w in path]
    drift = max(
        float(np.linalg.norm(now - then))
        for row in balances
        for now, then in zip(row, balances[0], strict=True)
    )
    assert float(found["Eq. 36"].measured) == pytest.approx(drift / size, rel=1e-2)
    moved = changed(run, weights=lambda step, w: next(iter(w.values())).mul_(1 + 1e-7 * (step > 0)))
    assert eq_36(Evidence(moved, d)).outcome == "fails"
    loose = changed(moved, config={"rtol": 1e-7})
    assert eq_36(Evidence(loose, d)).outcome == "holds"


# Where it does not


@pytest.mark.parametrize(
    ("activation", "attack", "words", "least"),
    [
        ("relu", SIGNS, "the signs of ∇_x f jump", 0.2),
        ("relu", BALL, "∇_x f jumps at kinks", 0.2),
        ("squared-relu", SIGNS, "the signs of ∇_x f jump", 0.02),
        ("relu", PGD("l2", eps=0.2, steps=2, step_size=0.1), "∇_x f jumps at kinks", 0.05),
    ],
)
def test_assumption_2_is_violated(
    activation: str, attack: Attack, words: str, least: float
) -> None:
    run = flow(activation, attack)
    found = path_verdicts(run)
    share = run.final["falls"] / run.final["separated_steps"]
    for name in ("Theorem 3 (growth)", "Theorem 4 (monotone)", "Theorem 4 (γ̂_m)"):
        verdict = found[name]
        assert verdict.outcome == "does not apply"
        assert "Assumption 2" in verdict.measured
        assert words in verdict.measured
    text = shown(found["Theorem 4 (monotone)"]).measured
    assert share > least
    assert f"falling on {share:.2%} of 150 steps" in text
    first, last = (r["smoothed_margin"] for r in (run.metrics[0], run.metrics[-1]))
    assert last > first
    assert f"ℓ/ρ {first:.4g} → {last:.4g}" in text
    assert found["Theorem 4 (identity)"].outcome == "holds"


def test_a_derivative_with_delta_held_fixed() -> None:
    found = path_verdicts(flow("squared-relu", BALL, "detached"))
    for name in ("Theorem 3 (rate)", "Corollary 1", "Theorem 4 (monotone)", "Theorem 4 (identity)"):
        assert found[name].outcome == "does not apply"
        assert "detached, and the two gradients differ by" in found[name].measured


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"loss": "logistic"}, "the exponential loss (logistic)"),
        ({"measure_with": "fgsm:eps=0.3"}, "margins measured under the attack trained against"),
        ({"kind": "train"}, "the gradient flow, Eq. (16) (discrete steps)"),
    ],
)
def test_what_else_a_path_needs(config: dict[str, Any], words: str) -> None:
    run = changed(flow("squared-relu", SMOOTH), config=config)
    for name in ("Theorem 4 (monotone)", "Theorem 4 (γ̂_m)"):
        verdict = path_verdicts(run)[name]
        assert verdict.outcome == "does not apply"
        assert words in verdict.measured


def test_a_dead_input_that_comes_to_life() -> None:
    """δ jumps from 0 to ε where ∇_x f was 0; that is over once L < 1/n."""
    run = flow("squared-relu", SMOOTH)
    dead = changed(run, weights=lambda step, w: w["linear1.weight"].copy_(revived(step, w)))
    evidence = Evidence(dead, data())
    found = lemma_10(evidence)
    assert shown(found).outcome == "does not apply"
    assert "δ jumps by 1 ε on the path" in found.measured
    assert evidence.sites[0].smoothed < 0 < evidence.sites[1].smoothed
    for name in ("Theorem 4 (monotone)", "Theorem 4 (γ̂_m)"):
        assert path_verdicts(dead)[name].outcome == "holds"


def revived(step: int, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """At the start no unit sees the first example."""
    w = weights["linear1.weight"]
    if step:
        return w
    x = data().x[0]
    along = (w @ x) / (x @ x)
    return w - torch.outer(along + along.abs() + 0.01, x)


def test_before_the_examples_are_separated() -> None:
    d = data()
    run = naive_flow(net(4, 8, 1, activation="squared-relu", seed=2), d, SMOOTH, steps=20, every=5)
    assert run.final["log_loss"] > -math.log(d.n)
    found = path_verdicts(run)
    for name in ("Theorem 3 (growth)", "Corollary 1", "Theorem 4 (monotone)", "Theorem 4 (γ̂_m)"):
        assert found[name].outcome == "not reached"
        assert "L < 1/n was not reached" in found[name].measured


# Far out


@functools.cache
def far(depth: int, end: float) -> Run:
    times = np.concatenate([np.linspace(-3, 9.5, 10), np.geomspace(10, end, 30)])
    return balanced_flow(depth, times, mf.load(LINEAR), start=START)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_theorem_3_far_out(depth: int) -> None:
    run, d = far(depth, 3e4), mf.load(LINEAR)
    found = path_verdicts(run, d=d)
    for name in ("Theorem 3 (growth)", "Theorem 3 (rate)", "Corollary 1"):
        assert shown(found[name]).outcome == "holds"
    clock = np.array([r["log_time"] for r in run.metrics])
    ratio = run.final["margin"] / clock[-1]
    assert float(found["Theorem 3 (growth)"].measured.split()[0]) == pytest.approx(ratio, rel=1e-4)
    # The exponents by a straight line of their own, over the last third of ln ln t
    logs = np.log(clock[clock >= 10])
    part = logs >= logs[-1] - (logs[-1] - math.log(10)) / 3
    log_tl = np.array([r["log_loss"] + r["log_time"] for r in run.metrics])[clock >= 10]
    slope = np.polyfit(logs[part], log_tl[part], 1)[0]
    assert float(found["Theorem 3 (rate)"].measured.split()[0]) == pytest.approx(slope, abs=2e-3)
    assert slope == pytest.approx(-(2 - 2 / depth), abs=0.01)
    norms = np.log([r["layer_norms"][0] for r in run.metrics])[clock >= 10]
    exponent = np.polyfit(logs[part], norms[part], 1)[0]
    assert float(found["Corollary 1"].measured.split(",")[0].split(";")[0]) == pytest.approx(
        exponent, abs=1e-3
    )
    # The sharper law: what t L tends to
    k = np.sum(1 / np.square(run.final["layer_norms"]))
    gap = -log_tl[-1] - math.log(run.final["margin"] ** 2 * k)
    assert abs(gap) < 1 / clock[-1]
    for name in ("Theorem 4 (monotone)", "Theorem 4 (γ̂_m)", "Theorem 4 (identity)", "Lemma 11"):
        if (depth, name) != (1, "Lemma 11"):
            assert found[name].outcome == "holds"


@pytest.mark.parametrize(
    ("end", "growth", "rate"),
    [
        (30.0, "not reached", "not reached"),
        (60.0, "not reached", "not reached"),
        (400.0, "not reached", "holds"),
    ],
)
def test_theorem_3_on_the_way(end: float, growth: str, rate: str) -> None:
    found = path_verdicts(far(2, end), d=mf.load(LINEAR))
    assert found["Theorem 3 (growth)"].outcome == growth
    assert found["Theorem 3 (rate)"].outcome == rate
    assert "further" in found["Theorem 3 (growth)"].advice


# Nothing that cannot fail


def forged(run: Run, **values: Any) -> Run:
    """The last record with other entries."""
    return changed(
        run,
        record=lambda r: (
            r.update(values) if r is not None and r["step"] == run.final["step"] else None
        ),
    )


@pytest.mark.parametrize("name", ["largest_fall", "largest_fall_by_total"])
def test_the_monotone_statement_fails_on_a_fall_on_a_step(name: str) -> None:
    run = flow("squared-relu", SMOOTH)
    for fall, outcome in ((9e-10, "holds"), (2e-9, "fails"), (1e-3, "fails")):
        verdict = path_verdicts(forged(run, **{name: fall}))["Theorem 4 (monotone)"]
        assert verdict.outcome == outcome  # rtol = 1e-9


def test_the_monotone_statement_fails_on_falling_records() -> None:
    run = flow("squared-relu", SMOOTH)
    found = path_verdicts(forged(run, smoothed_margin=0.9 * run.metrics[-2]["smoothed_margin"]))
    assert shown(found["Theorem 4 (monotone)"]).outcome == "fails"
    # ℓ/‖W‖^K falls where one layer is blown up and ℓ/ρ is kept
    norms = [40 * run.final["layer_norms"][0], run.final["layer_norms"][1] / 1600]
    found = path_verdicts(forged(run, layer_norms=norms))
    assert found["Theorem 4 (monotone)"].outcome == "fails"


def test_the_margin_must_not_fall_below_what_was_reached() -> None:
    run = flow("relu", FINITE, "detached")
    reached = max(r["smoothed_margin"] for r in run.metrics)
    for factor, outcome in ((1.001, "holds"), (0.999, "fails")):
        found = path_verdicts(forged(run, normalized_margin=factor * reached), FINITE)
        assert found["Theorem 4 (γ̂_m)"].outcome == outcome


def test_the_growth_fails() -> None:
    run, d = far(2, 3e4), mf.load(LINEAR)
    for values in (
        {"margin": 1.5 * run.final["margin"]},
        {"margin": 0.5 * run.final["margin"]},
        {"layer_norms": [0.9 * r for r in run.metrics[-2]["layer_norms"]]},
    ):
        verdict = path_verdicts(forged(run, **values), d=d)["Theorem 3 (growth)"]
        assert shown(verdict).outcome == "fails"


@pytest.mark.parametrize("power", [-1.0, 0.3, 1.0])
def test_the_rate_fails(power: float) -> None:
    """L falls faster or slower by a power of ln t."""

    def bend(r: dict[str, Any]) -> None:
        if r["log_time"] > 1:
            r["log_tl"] += power * math.log(r["log_time"])

    verdict = path_verdicts(changed(far(2, 3e4), record=bend), d=mf.load(LINEAR))[
        "Theorem 3 (rate)"
    ]
    assert shown(verdict).outcome == "fails"


def test_corollary_1_fails_on_a_layer_that_stalls() -> None:
    run, d = far(2, 3e4), mf.load(LINEAR)

    def slow(r: dict[str, Any]) -> None:
        clock = max(r["log_time"], 1.0)
        first, last = r["layer_norms"]
        r["layer_norms"] = [first / clock**0.3, last * clock**0.3]

    def stop(r: dict[str, Any]) -> None:
        r["layer_norms"][0] = min(r["layer_norms"][0], run.metrics[-5]["layer_norms"][0])

    def fall(r: dict[str, Any]) -> None:
        if r["step"] == run.final["step"]:
            r["layer_norms"][1] *= 0.5

    for forgery in (slow, stop, fall):
        verdict = path_verdicts(changed(run, record=forgery), d=d)["Corollary 1"]
        assert shown(verdict).outcome == "fails"
    stopped = changed(run, record=lambda r: r["layer_norms"].__setitem__(0, 5.0))
    assert path_verdicts(stopped, d=d)["Corollary 1"].outcome == "fails"


def test_lemma_11_fails_on_a_flow() -> None:
    run = flow("squared-relu", SMOOTH, order=4)
    size = max(run.final["layer_norms"])
    for drift, outcome in ((1e-8, "holds"), (4e-7, "fails")):
        norms = list(run.final["layer_norms"])
        norms[1] = math.sqrt(norms[1] ** 2 + drift * size**2)
        assert path_verdicts(forged(run, layer_norms=norms))["Lemma 11"].outcome == outcome


# Training runs


def test_a_training_run_is_no_counterexample() -> None:
    """Steps that grow: measured, never held against the theorem."""
    d = mf.load(LINEAR)
    model = mf.models.deep_linear(4, 3, 1, seed=0).double()
    run = mf.train(
        model, d, attack="exact-linear:p=2,eps=0.1", loss="exponential",
        lr="loss-based:fall=1", epochs=400,
    )  # fmt: skip
    assert run.final["log_time"] > 100
    found = path_verdicts(run, d=d)
    for name in ("Theorem 3 (growth)", "Theorem 3 (rate)", "Corollary 1"):
        assert shown(found[name]).outcome in ("holds", "not reached")
        unmet = [h for h in found[name].hypotheses if h.met is False]
        assert [h.detail for h in unmet] == ["discrete steps"]
    for name in ("Theorem 4 (monotone)", "Theorem 4 (γ̂_m)"):
        assert found[name].outcome == "does not apply"
        assert "since L < 1/n" in shown(found[name]).measured
        assert "neighbouring records" in found[name].measured

    def bend(r: dict[str, Any]) -> None:
        r["log_loss"] *= 1.5
        r["margin"] *= 2
        r["layer_norms"] = [r["layer_norms"][0], 5.0]

    for verdict in theorem_3(Evidence(changed(run, record=bend), d)):
        assert verdict.outcome == "not reached"
        assert "discrete" in verdict.advice or "further" in verdict.advice


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch_size": 4}, "mini-batches"), ({"momentum": 0.5}, "momentum 0.5")],
)
def test_stochastic_descent_is_not_about_the_path(options: dict[str, Any], words: str) -> None:
    run = mf.train(net(4, 8, 1, seed=2), data(), loss="exponential", lr=0.05, epochs=3, **options)
    for verdict in theorem_3(Evidence(run, data())):
        assert verdict.outcome == "does not apply"
        assert words in verdict.measured


def test_weights_that_were_not_kept() -> None:
    run = flow("squared-relu", SMOOTH)
    bare = Run({**run.config, "keep_weights": False}, run.metrics, None, run.model)
    found = by_name(verify(bare, data()))
    for name in ("Lemma 3", "Lemma 4", "Lemma 9", "Lemma 10", "Theorem 4 (identity)"):
        assert found[name].outcome == "holds"
        assert "final weights only, 8 examples" in found[name].measured
    assert found["Theorem 4 (monotone)"].outcome == "holds"


def test_a_path_without_time_or_with_overflowing_norms() -> None:
    """ρ = 10^308 is hardly a float64, and a run of no epoch has no time: nothing fails, nothing breaks."""
    d = mf.load(LINEAR)
    model = separate(mf.models.deep_linear(4, 3, 1, seed=0).double(), d, None)
    for p in model.parameters():
        p.data *= 1.5
    run = mf.train(model, d, loss="exponential", lr=0.1, epochs=0, keep_weights=True)
    for verdict in theorem_3(Evidence(run, d)):
        assert verdict.outcome == "not reached"
    huge = changed(
        far(2, 3e4),
        record=lambda r: r.update(layer_norms=[1e151 * v for v in r["layer_norms"]]),
    )
    assert "e^" in theorem_3(Evidence(huge, d))[0].measured


def test_a_flow_on_disk_without_a_checkpoint() -> None:
    """The kept weights are enough."""
    run = flow("squared-relu", SMOOTH)
    bare = Run(run.config, run.metrics, None, None, run.weights)
    kept = by_name(verify(bare, data()))
    assert kept["Lemma 4"].outcome == kept["Theorem 4 (identity)"].outcome == "holds"
    assert kept == by_name(verify(run, data()))
