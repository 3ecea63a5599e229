"""Appendix B.3 on flows that were really followed: Eq. 20, Eq. 129, Lemma 12, Theorems 5 and 6."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from theorem_runs import changed

import marginflow as mf
from marginflow.runs import Run
from marginflow.theorems import Evidence, Verdict
from marginflow.theorems.eq_20 import eq_20
from marginflow.theorems.eq_129 import eq_129
from marginflow.theorems.lemma_12 import lemma_12
from marginflow.theorems.theorem_5 import theorem_5
from marginflow.theorems.theorem_6 import theorem_6

DATA = "separable:n=12,d=6,margin=0.3,seed=1"
EPS = 0.05
EXACT = f"exact-linear:p=2,eps={EPS}"
STATEMENTS: tuple[Callable[[Evidence], Verdict | tuple[Verdict, ...]], ...] = (
    theorem_5, eq_20, eq_129, lemma_12, theorem_6,
)  # fmt: skip
ALONG = {
    "Theorem 5 (ξ)", "Theorem 5 (χ)", "Theorem 5 (direction)", "Lemma 12", "Lemma 12 (rate)",
    "Theorem 6",
}  # fmt: skip


def judged(run: Run, **options: Any) -> dict[str, Verdict]:
    evidence = Evidence(run, **options)
    found: list[Verdict] = []
    for statement in STATEMENTS:
        verdict = statement(evidence)
        found.extend(verdict if isinstance(verdict, tuple) else (verdict,))
    return {v.statement: v for v in found}


def of(spec: str, attack: str, log_time: float) -> Run:
    schedule = [3.0, *np.geomspace(10, log_time, 1 + round(7 * math.log10(log_time / 10)))]
    return mf.gradient_flow(
        spec, DATA, attack=attack, log_time=log_time, schedule=schedule, seed=0
    ).run


@pytest.fixture(scope="module")
def flows() -> dict[int, Run]:
    """Generic starts of degree K = 2 and 3, far along."""
    return {2: of("deep-linear:8", EXACT, 1e4), 3: of("deep-linear:8,8", EXACT, 1e4)}


@pytest.fixture(scope="module")
def relu() -> Run:
    return of("mlp:16", "fgsm:eps=0.05", 20.0)


def by_hand(weights: dict[str, torch.Tensor], data: mf.Dataset) -> dict[str, float]:
    """Everything about one point from the printed formulas: exp, loops, numpy, autograd by hand.

    Margins are shifted by the smallest before ``exp``, which (130) allows: only ratios enter.
    """
    layers = [w.clone().requires_grad_() for w in weights.values()]
    product = layers[0]
    for w in layers[1:]:
        product = w @ product
    p = product[0]
    margins = data.y * (data.x.double() @ p) - EPS * p.norm()
    rows = []
    for m in margins:
        grads = torch.autograd.grad(m, layers, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]).numpy())
    m, jacobian = margins.detach().numpy(), np.array(rows)
    w = torch.cat([v.detach().flatten() for v in layers]).numpy()
    order, n, least = len(layers), len(m), m.min()
    slopes = np.exp(-(m - least))
    gradient = -(slopes @ jacobian) / n
    size = np.linalg.norm
    cosine = gradient @ w / size(gradient) / size(w)
    lam = size(w) * least ** ((order - 2) / order) * slopes / (n * size(gradient))
    v = w / least ** (1 / order)
    at_v = jacobian / least ** ((order - 1) / order)
    return {
        "height": float(least - math.log(slopes.mean())),
        "cosine": float(1 + cosine),
        "chi": float(size(v - lam @ at_v)),
        "xi": float((lam * (m / least - 1)).max()),
    }


def slope(pairs: list[tuple[float, float]]) -> float:
    height, values = np.log(np.array(pairs)).T
    return float(np.polyfit(height, values, 1)[0])


@pytest.mark.parametrize("order", [2, 3])
def test_exponents_of_a_generic_start(flows: dict[int, Run], order: int) -> None:
    """ξ ~ 1/ln(1/L), χ ~ (ln 1/L)^{−1/K} and 1 + cos ~ (ln 1/L)^{−2/K}, by other means."""
    data = mf.load(DATA)
    kept = flows[order].trajectory()
    points = [by_hand(kept[r["step"]], data) for r in flows[order].metrics if r["margin"] > 0]
    late = [p for p in points if p["height"] >= 1e3]
    assert len(late) >= 6
    assert late[-1]["height"] > 9e3
    found = {
        name: slope([(p["height"], p[name]) for p in late]) for name in ("xi", "chi", "cosine")
    }
    print(f"K = {order}:", {name: round(value, 4) for name, value in found.items()})
    assert found["xi"] == pytest.approx(-1, rel=0.15)
    assert found["chi"] == pytest.approx(-1 / order, rel=0.15)
    assert found["cosine"] == pytest.approx(-2 / order, rel=0.15)

    verdicts = judged(flows[order])
    for verdict in verdicts.values():
        assert verdict.outcome == "holds", verdict
    shown = verdicts["Lemma 12 (rate)"].measured
    assert float(shown.split()[1]) == pytest.approx(found["cosine"], rel=0.02)
    for name, key in (("Theorem 5 (ξ)", "xi"), ("Theorem 5 (χ)", "chi")):
        assert float(verdicts[name].measured.split()[0]) == pytest.approx(found[key], rel=0.02)
    last = verdicts["Theorem 6"].measured
    assert f"χ = {points[-1]['chi']:.3g}, ξ = {points[-1]['xi']:.3g}" in last


def test_relu_against_fgsm_is_outside_assumption_2(relu: Run) -> None:
    verdicts = judged(relu)
    for name in ALONG:
        assert verdicts[name].outcome == "does not apply"
        assert ["Assumption 2" in h.name for h in verdicts[name].unmet] == [True]
    assert "measured all the same: r 0." in verdicts["Theorem 5 (direction)"].measured
    assert verdicts["Eq. 129"].outcome == "holds"
    assert verdicts["Eq. 20"].outcome == "does not apply"


@pytest.mark.parametrize("log_time", [11.0, 80.0])
def test_too_short_a_flow_is_not_judged(flows: dict[int, Run], log_time: float) -> None:
    run = flows[2]
    metrics = [r for r in run.metrics if (r["log_time"] or 0) <= log_time]
    steps = {r["step"] for r in metrics}
    kept = {step: w for step, w in run.trajectory().items() if step in steps}
    verdicts = judged(Run(run.config, metrics, None, run.model, kept))
    for name in ALONG:
        assert verdicts[name].outcome == "not reached", verdicts[name]
        assert "follow the flow further" in verdicts[name].advice


def test_discrete_steps_are_not_the_flow() -> None:
    run = mf.train(
        "deep-linear:8", DATA, attack=EXACT, loss="exponential", lr=0.3, epochs=150, dtype="float64"
    )
    assert run.final["log_loss"] < -math.log(12)
    verdicts = judged(run)
    for name in ALONG:
        assert verdicts[name].outcome == "does not apply"
        assert "discrete steps" in verdicts[name].measured
    assert verdicts["Eq. 20"].outcome == verdicts["Eq. 129"].outcome == "holds"


def test_forged_alignment_fails(flows: dict[int, Run]) -> None:
    """1 + cos rising; and falling at half the rate, which ‖W‖ does not explain."""

    def rising(record: dict[str, Any]) -> None:
        record["one_plus_cosine"] = 1e-6 * max(1.0, -record["log_loss"]) ** 0.1

    def slow(record: dict[str, Any]) -> None:
        record["one_plus_cosine"] = max(1.0, -record["log_loss"]) ** -0.6

    verdicts = judged(changed(flows[2], record=rising))
    assert verdicts["Lemma 12"].outcome == verdicts["Lemma 12 (rate)"].outcome == "fails"
    verdicts = judged(changed(flows[2], record=slow))
    assert verdicts["Lemma 12"].outcome == "holds"
    assert verdicts["Lemma 12 (rate)"].outcome == "fails"


def test_forged_weights_fail(flows: dict[int, Run]) -> None:
    """A first layer pushed off, more the further the path: stationarity and r no longer fall."""
    run = flows[2]
    steps = sorted(run.trajectory())
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    push /= push.norm()

    def off(step: int, weights: dict[str, torch.Tensor]) -> None:
        first = next(iter(weights.values()))
        first += 0.6 * steps.index(step) / len(steps) * first.norm() * push

    verdicts = judged(changed(run, weights=off))
    for name in ("Theorem 5 (χ)", "Theorem 5 (direction)", "Theorem 6"):
        assert verdicts[name].outcome == "fails", verdicts[name]
    assert verdicts["Eq. 129"].outcome == "holds"


def test_a_perturbation_that_helps_breaks_eq_20(flows: dict[int, Run]) -> None:
    """The clean margin beside the one at x + δ, by the closed form ε ‖w‖₂/ρ; a finite set without 0."""
    run = flows[2]
    shown = judged(run)["Eq. 20"].measured
    kept = [list(w.values()) for w in run.trajectory().values()]
    kept = [kept[round(i * (len(kept) - 1) / 9)] for i in range(10)]
    normalised = [
        EPS * float((w[1] @ w[0]).norm()) / float(w[0].norm() * w[1].norm()) for w in kept
    ]
    assert float(shown.split("ρ ")[1].split()[0]) == pytest.approx(min(normalised), rel=5e-3)

    without = mf.attacks.FiniteSet(torch.eye(6, dtype=torch.float64)[:2] * EPS)
    run = mf.gradient_flow("deep-linear:4", DATA, attack=without, log_time=4.0, seed=0).run
    verdict = judged(run, attack=without)["Eq. 20"]
    assert verdict.outcome == "does not apply"
    assert "a set with δ = 0" in verdict.measured
