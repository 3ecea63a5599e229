"""Lemmas 1, 2, 5, 6, 8 and Eqs. 36 and 68 on runs: they hold, and each can be made to fail."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from theorem_runs import (
    DATA,
    EPS,
    EXACT,
    GAMMA,
    SECTION_3_1,
    arrays,
    changed,
    deep,
    margins,
    product,
    trained,
)

import marginflow as mf
import marginflow.theorems._evidence as evidence_module
import marginflow.training._rates as rates_module
from marginflow.references import kappa
from marginflow.runs import Run
from marginflow.theorems import Evidence, Verdict, verify
from marginflow.theorems.eq_36 import eq_36
from marginflow.theorems.eq_68 import eq_68
from marginflow.theorems.lemma_1 import lemma_1
from marginflow.theorems.lemma_2 import lemma_2
from marginflow.theorems.lemma_5 import lemma_5
from marginflow.theorems.lemma_6 import lemma_6
from marginflow.theorems.lemma_7 import lemma_7
from marginflow.theorems.lemma_8 import lemma_8
from marginflow.training import Callback, Trainer, smoothness

lemma_8_module = importlib.import_module("marginflow.theorems.lemma_8")


def shown(verdict: Verdict) -> Verdict:
    print(f"\n{verdict.statement}: {verdict.outcome}; {verdict.measured}")
    return verdict


# Lemma 1


@pytest.mark.parametrize("depth", [2, 3])
def test_lemma_1_holds(depth: int, by_lemma_2: Run, settled: Any) -> None:
    run = by_lemma_2 if depth == 3 else settled(2)
    verdict = shown(lemma_1(Evidence(run)))
    assert verdict.outcome == "holds"
    assert float(verdict.measured.split()[0]) <= 1
    assert "printed" in verdict.measured


def test_lemma_1_takes_the_smallest_set_around_the_path(by_lemma_2: Run) -> None:
    """r, r̄ and R by numpy; β* from them."""
    x, _ = arrays(mf.load(DATA))
    path = by_lemma_2.trajectory().values()
    r = max(float(np.linalg.norm(w)) for weights in path for w in weights.values())
    low = min(float(np.linalg.norm(product(weights))) for weights in path)
    evidence = Evidence(by_lemma_2)
    assert evidence.radius == pytest.approx(max(1.0, r), rel=1e-13)
    assert evidence.floor == pytest.approx(low, rel=1e-12)
    expected = smoothness(3, r, low, EPS, data_norm=float(np.linalg.norm(x, axis=1).max()))
    assert evidence.smoothness_of_path == pytest.approx(expected, rel=1e-12)


def test_lemma_1_fails_with_a_corrupted_constant(
    by_lemma_2: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_module, "smoothness", lambda *a, **k: 1e-3 * smoothness(*a, **k))
    verdict = shown(lemma_1(Evidence(by_lemma_2)))
    assert verdict.outcome == "fails"
    assert float(verdict.measured.split()[0]) > 1


def test_lemma_1_by_power_iteration_is_lemma_1(
    by_lemma_2: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large networks go by power iteration: from below, and near."""
    module = importlib.import_module("marginflow.theorems.lemma_1")
    dense = float(lemma_1(Evidence(by_lemma_2)).measured.split()[0])
    monkeypatch.setattr(module, "_DENSE", 0)
    iterated = float(lemma_1(Evidence(by_lemma_2)).measured.split()[0])
    assert 0.9 * dense <= iterated <= dense * 1.01


def test_lemma_1_needs_time_for_the_norms_to_grow() -> None:
    verdict = lemma_1(Evidence(trained(5, lr=0.01, epochs=2)))
    assert verdict.outcome == "not reached"
    assert "not grown" in verdict.advice


# Lemma 2


def test_lemma_2_holds(by_lemma_2: Run) -> None:
    assert shown(lemma_2(Evidence(by_lemma_2))).outcome == "holds"


def test_lemma_2_holds_with_the_printed_constant() -> None:
    run = trained(5, lr="lemma2:constant=printed", epochs=40)
    assert shown(lemma_2(Evidence(run))).outcome == "holds"


def test_lemma_2_fails_where_the_constant_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """η = 1 on inputs of norm 40."""
    monkeypatch.setattr(rates_module, "smoothness", lambda *a, **k: 1.0)
    monkeypatch.setattr(rates_module.Lemma2, "_reach", lambda rate, trainer: 0.0)
    x, y = arrays(mf.load(DATA))
    scaled = mf.Dataset(torch.from_numpy(12 * x), torch.from_numpy(y).long())
    run = trained(5, data=scaled, epochs=30, lr="lemma2:floor=1e-6")
    verdict = shown(lemma_2(Evidence(run, scaled)))
    assert verdict.outcome == "fails"


def test_lemma_2_fails_on_a_rise_above_rounding(by_lemma_2: Run) -> None:
    for excess, outcome in ((1e-14, "holds"), (2e-13, "fails")):
        forged = changed(by_lemma_2, record=lambda r, e=excess: r.update(descent_excess=e))
        assert lemma_2(Evidence(forged)).outcome == outcome


def test_lemma_2_does_not_apply_below_the_floor() -> None:
    verdict = shown(lemma_2(Evidence(trained(5, lr="lemma2:floor=3", epochs=20))))
    assert verdict.outcome == "does not apply"
    assert "‖W_Π‖ stays above r̄ (20 steps below)" in verdict.measured


def test_lemma_2_after_one_step_is_not_reached() -> None:
    assert lemma_2(Evidence(trained(5, epochs=1))).outcome == "not reached"


# Lemma 5


def unit_data() -> mf.Dataset:
    """‖x_i‖ ≤ 1, as the paper assumes."""
    data = mf.load(DATA)
    return mf.Dataset(data.x / torch.linalg.vector_norm(data.x, dim=1).max(), data.y)


def unit_layers(*hidden: int) -> torch.nn.Module:
    model = deep(*hidden)
    with torch.no_grad():
        for p in model.parameters():
            p.div_(torch.linalg.matrix_norm(p))
    return model


@pytest.mark.parametrize(("epochs", "outcome"), [(300, "holds"), (3, "not reached")])
def test_lemma_5_on_a_run_that_leaves(epochs: int, outcome: str) -> None:
    data = unit_data()
    run = mf.train(unit_layers(5), data, attack="exact-linear:p=2,eps=0.02", lr=0.3, epochs=epochs)
    verdict = shown(lemma_5(Evidence(run, data)))
    assert verdict.outcome == outcome
    # the r with η β*(r, r̄, ε) = 1, by hand
    path = list(run.trajectory().values())
    low = min(float(np.linalg.norm(product(weights))) for weights in path)
    r = float(verdict.prediction.split()[3])
    assert 0.3 * smoothness(2, r, low, 0.02) == pytest.approx(1.0, rel=2e-3)
    largest = max(float(np.linalg.norm(w)) for weights in path for w in weights.values())
    assert (largest > r) == (outcome == "holds")
    assert max(float(np.linalg.norm(w)) for w in path[0].values()) < r


def test_lemma_5_is_about_starts_inside() -> None:
    verdict = lemma_5(Evidence(trained(5, 4, lr=0.3, epochs=5)))
    assert verdict.outcome == "does not apply"
    assert "W(0) ∈ S(r)" in verdict.measured
    verdict = lemma_5(Evidence(trained(5, 4, epochs=5)))
    assert "a constant step (lr = lemma2" in verdict.measured


# Lemma 6


def test_lemma_6_holds_and_measures_what_it_says(by_lemma_2: Run) -> None:
    verdict = shown(lemma_6(Evidence(by_lemma_2)))
    assert verdict.outcome == "holds"
    x, y = arrays(mf.load(DATA))
    path = list(by_lemma_2.trajectory().values())
    squares = [[float(np.sum(w.numpy() ** 2)) for w in weights.values()] for weights in path]
    growth = max(
        abs(now[k] - now[j]) - abs(squares[0][k] - squares[0][j])
        for now in squares
        for k in range(3)
        for j in range(3)
    )
    loss = float(np.log1p(np.exp(-margins(product(path[0]), x, y, EPS))).mean())
    assert float(verdict.measured.split()[0]) == pytest.approx(growth / (2 * loss), rel=1e-3)


def test_lemma_6_fails_on_forged_weights(by_lemma_2: Run) -> None:
    last = by_lemma_2.final["step"]

    def inflate(step: int, weights: dict[str, torch.Tensor]) -> None:
        if step == last:
            next(iter(weights.values())).mul_(2.0)

    assert lemma_6(Evidence(changed(by_lemma_2, weights=inflate))).outcome == "fails"


def test_lemma_6_with_a_constant_step() -> None:
    held = lemma_6(Evidence(trained(5, lr=0.01, epochs=50)))
    assert held.outcome == "holds"
    large = lemma_6(Evidence(trained(5, lr=0.5, epochs=50)))
    assert large.outcome == "does not apply"
    assert "η = 0.5, bound" in large.measured


# Eq. 36


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.2, "epochs": 60},
        {"lr": 0.2, "epochs": 30, "batch_size": 6},
        {"lr": 0.2, "epochs": 60, "loss": "exponential", "derivative": "total"},
        {"lr": 0.2, "epochs": 60, "attack": "fgsm:eps=0.05"},
        {"lr": "lemma2", "epochs": 60},
    ],
)
def test_eq_36_holds_for_any_plain_descent(options: dict[str, Any]) -> None:
    assert shown(eq_36(Evidence(trained(5, 4, **options)))).outcome == "holds"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 0.9, "lr": 0.05}, "without momentum (momentum 0.9)"),
        ({"lr": "loss-based"}, "epochs are undone"),
        ({"dtype": "float32", "lr": 0.1}, "float64 (float32)"),
    ],
)
def test_eq_36_does_not_apply(options: dict[str, Any], words: str) -> None:
    verdict = eq_36(Evidence(trained(5, 4, epochs=20, **options)))
    assert verdict.outcome == "does not apply"
    assert words in verdict.measured


def test_eq_36_fails_after_a_push() -> None:
    class Push(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == 20:
                next(iter(trainer.model.parameters())).detach()[0, 0] += 1e-6

    run = trained(5, 4, lr=0.1, epochs=40, callbacks=[Push()])
    assert shown(eq_36(Evidence(run))).outcome == "fails"


def test_eq_36_of_one_layer_has_nothing_to_say() -> None:
    assert eq_36(Evidence(trained(lr=0.1, epochs=5))).outcome == "not reached"


# Lemmas 7 and 8


def test_lemma_7_reads_kappa() -> None:
    run = trained(5, lr=0.1, epochs=2)
    verdict = shown(lemma_7(Evidence(run)))
    assert verdict.outcome == "holds"
    assert float(verdict.measured) == pytest.approx(kappa(*arrays(mf.load(DATA))).lower, rel=1e-5)
    few = "separable:n=10,d=6,margin=0.3,supports=3"
    verdict = lemma_7(Evidence(trained(5, data=few, lr=0.1, epochs=2)))
    assert verdict.outcome == "does not apply"
    assert "3 support vectors in 6 dimensions" in verdict.measured


def inner_product(w: np.ndarray, u: np.ndarray, x: np.ndarray, y: np.ndarray, eps: float) -> float:
    """``⟨P⊥w, ∇g(w)⟩`` over ``‖P⊥w‖ ‖∇g‖``, one example at a time; weights |ℓ′| up to a factor."""
    size = float(np.linalg.norm(w))
    m = [float(yi * (xi @ w)) - eps * size for xi, yi in zip(x, y, strict=True)]
    logs = [-v - math.log1p(math.exp(-abs(v))) if v > 0 else -math.log1p(math.exp(v)) for v in m]
    gradient = np.zeros_like(w)
    for log, xi, yi in zip(logs, x, y, strict=True):
        gradient -= math.exp(log - max(logs)) * (yi * xi - eps * w / size)
    across = w - (w @ u) * u
    return float(across @ gradient / np.linalg.norm(across) / np.linalg.norm(gradient))


@pytest.mark.parametrize("fraction", [0.0, 1 / 3, 0.9])
def test_lemma_8_holds_and_by_a_search_of_its_own(fraction: float) -> None:
    """Uniformly drawn predictors that meet the two conditions, none of the package's making."""
    eps = fraction * GAMMA
    run = trained(5, attack=f"exact-linear:p=2,eps={eps!r}", lr=0.1, epochs=3)
    evidence = Evidence(run)
    assert shown(lemma_8(evidence)).outcome == "holds"
    data = mf.load(DATA)
    x, y = arrays(data)
    assert data.max_margin_direction is not None
    u = data.max_margin_direction.numpy()
    phi = 2 * data.n / (math.e * kappa(x, y).lower)
    assert float(lemma_8(evidence).measured.split()[-1]) == pytest.approx(phi, rel=1e-3)
    rng, seen = np.random.default_rng(0), []
    while len(seen) < 150:
        w = rng.normal(size=6) * phi * rng.uniform(0.5, 3.0) + u * phi * rng.uniform(0, 30)
        across = float(np.linalg.norm(w - (w @ u) * u))
        if across >= phi and GAMMA * (w @ u) >= eps * np.linalg.norm(w):
            seen.append(inner_product(w, u, x, y, eps))
    print(f"\nε = {eps:.2f}: least cosine {min(seen):.4f} over {len(seen)} draws")
    assert min(seen) >= 0


def test_lemma_8_fails_without_its_threshold(
    by_lemma_2: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near ū the loss pushes W_Π out to w⊥*: the condition φ is needed."""
    monkeypatch.setattr(lemma_8_module, "threshold", lambda evidence, found: 1e-3)
    assert shown(lemma_8(Evidence(by_lemma_2))).outcome == "fails"


def test_lemma_8_needs_the_condition_that_its_statement_leaves_out() -> None:
    """At γ⟨w, ū⟩ < ε‖w‖ the ε-term may pull outwards no more, but κ no longer bounds Eq. (59)."""
    run = trained(5, attack=None, lr=0.1, epochs=3)
    evidence = Evidence(run)
    u, phi = evidence.svm_direction, 10.0
    ahead, behind = u + 20 * torch.eye(6).double()[0], -30 * u + 20 * torch.eye(6).double()[0]
    assert lemma_8_module.applies(evidence, ahead, phi) == bool(torch.dot(ahead, u) >= 0)
    assert not lemma_8_module.applies(evidence, behind, phi)
    assert not lemma_8_module.applies(evidence, 5 * u, phi)


# Eq. 68


def wedge() -> mf.Dataset:
    """Two support vectors (1, ±3): ū = e_1, γ = 1, κ = 3, φ = 4/(3e)."""
    x = torch.tensor([[1.0, 3.0], [-1.0, 3.0]], dtype=torch.float64)
    return mf.Dataset(x, torch.tensor([1, -1]))


def from_start(start: list[float], eps: float, epochs: int) -> Run:
    """A balanced network of two layers whose product begins at ``start``."""
    model = deep(2, features=2)
    w = torch.tensor(start, dtype=torch.float64)
    size = torch.linalg.vector_norm(w).sqrt()
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    first, last = model.parameters()
    with torch.no_grad():
        first.copy_(torch.outer(one, w / size))
        last.copy_(one.unsqueeze(0) * size)
    attack = f"exact-linear:p=2,eps={eps}" if eps else None
    return mf.train(model, wedge(), attack=attack, lr="lemma2", epochs=epochs)


@pytest.mark.parametrize(("start", "eps"), [([2.0, 1.5], 0.0), ([6.0, -9.0], 0.2)])
def test_eq_68_holds_far_from_the_svm_direction(start: list[float], eps: float) -> None:
    run = from_start(start, eps, 300)
    verdict = shown(eq_68(Evidence(run, wedge())))
    assert verdict.outcome == "holds"
    assert 0 < float(verdict.measured.split(";")[0]) <= 1
    # by hand, on pairs of neighbours while ‖P⊥W_Π‖ ≥ φ
    path = run.trajectory()
    losses = {r["step"]: math.exp(r["log_loss"]) for r in run.metrics}
    pairs = 0
    for (s, a), (t, b) in zip(list(path.items())[:-1], list(path.items())[1:], strict=True):
        if min(abs(product(a)[1]), abs(product(b)[1])) >= 4 / (3 * math.e):
            before, after = (next(iter(w.values())).numpy() for w in (a, b))
            across = [float(np.sum(w[:, 1] ** 2)) for w in (before, after)]
            assert across[1] <= across[0] + 2 * (losses[s] - losses[t]) + 1e-15
            pairs += 1
    assert pairs >= 3


def test_eq_68_fails_on_forged_weights() -> None:
    run = from_start([6.0, -9.0], 0.2, 300)

    def outwards(step: int, weights: dict[str, torch.Tensor]) -> None:
        if step >= 5:
            next(iter(weights.values()))[:, 1].mul_(1.5)

    assert eq_68(Evidence(changed(run, weights=outwards), wedge())).outcome == "fails"


@pytest.mark.parametrize(("start", "eps"), [([-3.0, 4.0], 0.0), ([-1.0, 10.0], 0.3)])
def test_eq_68_says_nothing_of_a_start_that_points_backwards(
    start: list[float], eps: float
) -> None:
    """There ‖W_1‖ falls at first (against Eq. 64), and Lemma 8 does not apply."""
    run = from_start(start, eps, 300)
    verdict = shown(eq_68(Evidence(run, wedge())))
    assert verdict.outcome == "not reached"


def test_eq_68_is_not_needed_near_the_svm_direction(by_lemma_2: Run) -> None:
    verdict = shown(eq_68(Evidence(by_lemma_2)))
    assert verdict.outcome == "not reached"
    assert "φ = 652" in verdict.measured


# What none of them is about


def section_3_1(run: Run, data: mf.Dataset | None = None) -> list[Verdict]:
    return [v for v in verify(run, data) if v.statement in SECTION_3_1]


def test_a_relu_network() -> None:
    run = mf.train("mlp:5", DATA, attack="fgm:eps=0.1", lr=0.1, epochs=20, dtype="float64")
    outcomes = {v.statement: v for v in section_3_1(run)}
    for name, verdict in outcomes.items():
        expected = "holds" if name == "Lemma 7" else "does not apply"
        assert verdict.outcome == expected, name
        if name != "Lemma 7":
            assert "a deep linear network with one output" in verdict.measured


@pytest.mark.parametrize("eps", [0.3, 0.4])
def test_a_budget_beyond_the_margin(eps: float) -> None:
    run = trained(5, 4, attack=f"exact-linear:p=2,eps={eps}", lr=0.1, epochs=20)
    for verdict in section_3_1(run):
        if verdict.statement in ("Eq. 36", "Lemma 7"):
            assert verdict.outcome == "holds"
            continue
        assert verdict.outcome == "does not apply"
        if verdict.statement != "Appendix B.5":
            assert f"Eq. (8): ε < γ_m (ε = {eps}, γ_m = 0.3)" in verdict.measured


def test_other_perturbations_losses_and_batches() -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"attack": "fgsm:eps=0.05"}, "Lemma 1", "the exact ℓ2 perturbation, Eq. (10)"),
        ({"attack": "fgsm:eps=0.05"}, "Theorem 2 (direction)", "the exact ℓ2 perturbation"),
        ({"loss": "exponential"}, "Lemma 8", "the logistic loss (exponential)"),
        ({"batch_size": 5}, "Lemma 6", "full-batch gradient descent (mini-batches)"),
        ({"momentum": 0.5}, "Lemma 6", "full-batch gradient descent (momentum 0.5)"),
        ({"keep_weights": False}, "Theorem 2 (direction)", "weights kept along the path"),
    ]
    for options, statement, words in cases:
        run = trained(5, 4, **{"lr": 0.05, "epochs": 5, **options})
        verdict = next(v for v in verify(run) if v.statement == statement)
        assert verdict.outcome == "does not apply", (options, statement)
        assert words in verdict.measured


def test_fgm_is_the_exact_perturbation_of_a_linear_network() -> None:
    one, two = (trained(5, 4, attack=a, lr=0.01, epochs=30) for a in (EXACT, "fgm:eps=0.1"))
    for a, b in zip(verify(one), verify(two), strict=True):
        assert (a.statement, a.outcome) == (b.statement, b.outcome)


def test_data_that_no_hyperplane_separates() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    data = mf.Dataset(x, torch.arange(30) % 2 * 2 - 1)
    run = mf.train(deep(4, features=3), data, lr=0.05, epochs=5)
    for verdict in section_3_1(run, data):
        assert verdict.outcome == ("holds" if verdict.statement == "Eq. 36" else "does not apply")
    assert "not linearly separable" in verify(run, data)[0].measured


def test_several_classes() -> None:
    run = mf.train("deep-linear:5", "digits:0,1,2,n=60", lr=0.1, epochs=2, dtype="float64")
    verdicts = section_3_1(run)
    assert all(v.outcome == "does not apply" for v in verdicts)
    assert "several classes" in verdicts[0].measured


@pytest.mark.parametrize("model", ["deep-linear", "deep-linear:2"])
def test_one_feature(model: str) -> None:
    """No direction is orthogonal to ū: nothing fails for want of one."""
    x = torch.tensor([[1.0], [2.0], [-1.5]], dtype=torch.float64)
    data = mf.Dataset(x, torch.tensor([1, 1, -1]))
    run = mf.train(
        model, data, attack="exact-linear:p=2,eps=0.1", lr="loss-based:fall=1", epochs=80,
        dtype="float64",
    )  # fmt: skip
    assert not [v.statement for v in verify(run, data) if v.outcome == "fails"]


def test_one_example() -> None:
    data = mf.Dataset(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.tensor([1]))
    run = mf.train(
        "deep-linear:2", data, attack="exact-linear:p=2,eps=0.1", lr="loss-based:fall=1",
        epochs=80, dtype="float64",
    )  # fmt: skip
    verdicts = {v.statement: v.outcome for v in verify(run, data)}
    assert "fails" not in verdicts.values()
    assert verdicts["Theorem 2 (direction)"] == "holds"
