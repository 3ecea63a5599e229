"""Appendix B.5: the ℓp adversary turns W_Π to the robust direction, away from the SVM's."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from theorem_runs import arrays, changed, product, trained

import marginflow as mf
from marginflow.alignment import angle
from marginflow.references import max_margin, robust_svm
from marginflow.runs import Run
from marginflow.theorems import Evidence, verify
from marginflow.theorems.appendix_b5 import appendix_b5

FEW = "separable:n=20,d=6,margin=0.3,supports=3"
"""Three support vectors: with six, both problems have the same active set and direction."""


@pytest.mark.parametrize(
    ("p", "eps", "attack", "hidden"),
    [
        (np.inf, 0.05, "exact-linear:p=inf,eps=0.05", (4,)),
        (np.inf, 0.05, "fgsm:eps=0.05", (5, 4)),
        (1.5, 0.25, "exact-linear:p=1.5,eps=0.25", (4,)),
        (3.0, 0.15, "exact-linear:p=3,eps=0.15", (4,)),
    ],
)
def test_the_direction_is_the_robust_one(
    p: float, eps: float, attack: str, hidden: tuple[int, ...]
) -> None:
    data = mf.load(FEW)
    x, y = arrays(data)
    robust = torch.from_numpy(robust_svm(x, y, eps, p=p).direction)
    svm = torch.from_numpy(np.array(max_margin(x, y).direction))
    run = trained(*hidden, data=data, attack=attack, lr="loss-based:fall=10", epochs=1200)
    path = [torch.from_numpy(product(weights)) for weights in run.trajectory().values()]
    to_robust = [angle(w, robust) for w in path]
    to_svm, apart = angle(path[-1], svm), angle(robust, svm)
    print(
        f"\n{attack}: {to_robust[0]:.3f} → {to_robust[-1]:.5f} rad from the robust direction, "
        f"{to_svm:.5f} from the SVM's; the oracles are {apart:.5f} apart; "
        f"ln(1/L) = {-run.final['log_loss']:.0f}"
    )
    assert apart > 0.1
    assert to_robust[-1] < apart / 10
    assert to_svm > 0.9 * apart
    quarter = len(path) // 4
    assert to_robust[-1] < min(to_robust[-3 * quarter], to_robust[-2 * quarter])

    verdict = appendix_b5(Evidence(run, data))
    assert verdict.outcome == "holds"
    assert f"{to_robust[-1]:.3g} rad, SVM {to_svm:.3g} rad" in verdict.measured
    # the bound: no normalised margin under this attack exceeds the robust one
    best = robust_svm(x, y, eps, p=p).margin
    assert all(r["normalized_margin"] <= best * (1 + 1e-9) for r in run.metrics)


def quick(**options: Any) -> Run:
    return trained(4, **{"data": FEW, "lr": 0.1, "epochs": 20, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attack": "exact-linear:p=2,eps=0.1"}, "p ≠ 2 (p = 2 is Theorem 2) (p = 2)"),
        ({"attack": "fgm:eps=0.1"}, "p ≠ 2"),
        ({"attack": "pgd-linf:eps=0.05,steps=2"}, "an exact ℓp perturbation (pgd-linf"),
        ({"attack": None}, "an exact ℓp perturbation (none)"),
        ({"attack": "fgsm:eps=0.05,bounds=-9..9"}, "an exact ℓp perturbation (fgsm"),
        ({"attack": "fgsm:eps=0.4"}, "Eq. (143): ε below the largest feasible (ε = 0.4 of 0.18"),
        ({"attack": "fgsm:eps=0.05", "keep_weights": False}, "weights kept"),
    ],
)
def test_where_it_does_not_apply(options: dict[str, Any], words: str) -> None:
    verdict = appendix_b5(Evidence(quick(**options)))
    assert verdict.outcome == "does not apply"
    assert words in verdict.measured


def test_a_short_run_is_not_reached_and_says_what_to_do() -> None:
    verdict = appendix_b5(Evidence(quick(attack="fgsm:eps=0.05")))
    assert verdict.outcome == "not reached"
    assert "train longer" in verdict.advice


def test_it_fails_on_a_path_that_turns_away() -> None:
    run = trained(4, data=FEW, attack="fgsm:eps=0.05", lr="loss-based:fall=10", epochs=200)
    path = run.trajectory()
    first, last = next(iter(path.values())), path[run.final["step"]]

    def backwards(step: int, weights: dict[str, torch.Tensor]) -> None:
        if step in (0, run.final["step"]):
            for name, w in weights.items():
                w.copy_((last if step == 0 else first)[name])

    assert appendix_b5(Evidence(changed(run, weights=backwards))).outcome == "fails"


def test_the_l2_statements_do_not_apply_to_it() -> None:
    verdicts = {v.statement: v for v in verify(quick(attack="fgsm:eps=0.05"))}
    for name in ("Lemma 1", "Lemma 6", "Theorem 2 (direction)"):
        assert verdicts[name].outcome == "does not apply"
        assert "the exact ℓ2 perturbation, Eq. (10), or none (fgsm" in verdicts[name].measured
    assert verdicts["Eq. 36"].outcome == "holds"


def test_it_fails_on_a_path_that_settles_on_the_svm_direction() -> None:
    """Standard training, passed off as adversarial: the rival of the claim must not be excused."""
    data = mf.load("separable:n=20,d=4,margin=0.3,seed=5")
    run = mf.train(
        mf.models.deep_linear(4, 5, 1, seed=1).double(), data, lr="loss-based", epochs=1500
    )
    forged = dataclasses.replace(
        run, config={**run.config, "attack": "exact-linear:p=inf,eps=0.12"}
    )
    verdict = appendix_b5(Evidence(forged, data))
    print(verdict.measured)
    assert verdict.outcome == "fails"


def test_kept_weights_are_seen_on_any_network(tmp_path: Path) -> None:
    """What is not met is the linear network, not the weights that the user did keep."""
    run = mf.train(
        "mlp:4", FEW, attack="fgsm:eps=0.05", epochs=3, keep_weights=True, out=tmp_path / "run"
    )
    measured = appendix_b5(Evidence(run)).measured
    assert "a deep linear network" in measured
    assert "keep_weights" not in measured


def test_without_its_oracle_the_other_statements_are_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = quick(attack="exact-linear:p=3,eps=0.05")
    expected = {v.statement: v.outcome for v in verify(run)}
    monkeypatch.setitem(sys.modules, "clarabel", None)
    verdicts = {v.statement: v for v in verify(run)}
    alone = verdicts.pop("Appendix B.5")
    assert alone.outcome == "not reached"
    assert "'clarabel': pip install 'marginflow[oracles]'" in alone.advice
    assert {name: v.outcome for name, v in verdicts.items()} == {
        name: outcome for name, outcome in expected.items() if name != "Appendix B.5"
    }
