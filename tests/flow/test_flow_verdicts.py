"""The statements of the paper on flows that were really followed."""

from __future__ import annotations

import numpy as np
import pytest
from flow_problems import DATA, EXACT, finite_set

import marginflow as mf

POINTWISE = {"Lemma 3", "Lemma 4", "Lemma 9", "Lemma 11", "Theorem 4 (identity)"}
PATH = {"Theorem 3 (growth)", "Theorem 3 (rate)", "Theorem 4 (monotone)", "Theorem 4 (γ̂_m)"}


def judged(flow: mf.Flow, **options: object) -> dict[str, mf.Verdict]:
    return {v.statement: v for v in mf.verify(flow, mf.load(DATA), **options)}  # type: ignore[arg-type]


def test_a_deep_linear_flow_meets_every_prediction() -> None:
    flow = mf.gradient_flow("deep-linear:16", DATA, attack=EXACT, log_time=2e3, seed=0)
    verdicts = judged(flow)
    for name in POINTWISE | PATH | {"Corollary 1", "Eq. 36", "Theorem 2 (direction)"}:
        assert verdicts[name].outcome == "holds", verdicts[name]
    assert not [v for v in verdicts.values() if v.outcome == "fails"]
    for name in ("Lemma 1", "Lemma 2", "Lemma 5"):
        assert verdicts[name].outcome == "does not apply"


@pytest.mark.parametrize("attack", ["fgsm:eps=0.05", "fgm:eps=0.05"])
def test_relu_against_fgsm_or_fgm_is_outside_assumption_2(attack: str) -> None:
    flow = mf.gradient_flow("mlp:16", DATA, attack=attack, log_time=12.0, seed=0)
    verdicts = judged(flow)
    for name in PATH:
        verdict = verdicts[name]
        assert verdict.outcome == "does not apply", verdict
        assert any("Assumption 2" in h.name for h in verdict.unmet), verdict
    shown = verdicts["Theorem 4 (monotone)"].measured
    assert f"{flow.falls / flow.separated_steps:.2%} of {flow.separated_steps} steps" in shown
    assert "ℓ/ρ" in shown
    assert "→" in shown
    for name in POINTWISE:
        assert verdicts[name].outcome == "holds", verdicts[name]


def test_lemma_11_with_step_corrections() -> None:
    """Euler's, Heun's and combined steps: exact once what finite steps add is taken off."""
    attack = finite_set(10)
    for chosen in ("fgsm:eps=0.05", attack):
        flow = mf.gradient_flow(
            "mlp:8,4,activation=leaky-relu", DATA, attack=chosen, log_time=6.0, seed=1
        )
        assert flow.final["method"] == "steps"
        norms, added = np.array(flow.final["layer_norms"]), flow.final["step_corrections"]
        start = np.array(flow.metrics[0]["layer_norms"])
        grown = norms**2 - start**2
        exact = grown - np.array(added)
        print(
            f"raw {np.ptp(grown) / norms.max() ** 2:.1e}, corrected {np.ptp(exact) / norms.max() ** 2:.1e}"
        )
        assert np.ptp(exact) <= 1e-12 * norms.max() ** 2
        assert np.ptp(grown) > 1e-7 * norms.max() ** 2, "the corrections matter"
        assert (
            judged(flow, attack=chosen if chosen is attack else None)["Lemma 11"].outcome == "holds"
        )


def test_detached_fgm_has_another_gradient() -> None:
    flow = mf.gradient_flow(
        "mlp:16,activation=squared-relu",
        DATA,
        attack="fgm:eps=0.05",
        derivative="detached",
        log_time=8.0,
    )
    verdicts = judged(flow)
    assert verdicts["Theorem 4 (identity)"].outcome == "does not apply"
    for name in ("Lemma 4", "Lemma 9", "Lemma 11"):
        assert verdicts[name].outcome == "holds", verdicts[name]


def test_relu_with_a_finite_set_is_monotone() -> None:
    attack = finite_set(10)
    flow = mf.gradient_flow("mlp:16", DATA, attack=attack, log_time=8.0, seed=0)
    assert flow.sliding
    verdicts = judged(flow, attack=attack)
    assert verdicts["Theorem 4 (monotone)"].outcome == "holds", verdicts["Theorem 4 (monotone)"]
    assert verdicts["Theorem 4 (identity)"].outcome == "holds"
    assert not [v for v in verdicts.values() if v.outcome == "fails"]
