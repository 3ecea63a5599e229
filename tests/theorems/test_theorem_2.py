"""Theorem 2 on networks of two, three and four layers: the bound, the direction, the exponents."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from theorem_runs import DATA, EPS, GAMMA, arrays, changed, margins, product, trained

import marginflow as mf
from marginflow.alignment import measure_alignment
from marginflow.references import max_margin
from marginflow.runs import Run
from marginflow.theorems import Evidence, Verdict
from marginflow.theorems.theorem_2 import theorem_2

every_depth = pytest.mark.parametrize("depth", [2, 3, 4])
Settled = Callable[[int], Run]


def judged(run: Run, data: mf.Dataset | None = None) -> dict[str, Verdict]:
    found = {
        v.statement.removeprefix("Theorem 2 ").strip("()"): v
        for v in theorem_2(Evidence(run, data))
    }
    assert list(found) == ["direction", "rank one", "alignment"]
    return found


@every_depth
def test_it_holds(depth: int, settled: Settled) -> None:
    for name, verdict in judged(settled(depth)).items():
        print(f"\nL = {depth}, {name}: {verdict.measured}")
        assert verdict.outcome == "holds"
        assert verdict.unmet == ()
        assert any(h.met is False and not h.needed for h in verdict.hypotheses)  # the step bound


@every_depth
def test_no_margin_exceeds_the_bound_and_the_gap_closes(depth: int, settled: Settled) -> None:
    """γ̂_m ≤ γ_m − ε at every measured point, with numpy's margins and norms."""
    run = settled(depth)
    x, y = arrays(mf.load(DATA))
    records = {r["step"]: r for r in run.metrics}
    gaps, angles = [], []
    u = mf.load(DATA).max_margin_direction
    assert u is not None
    for step, weights in run.trajectory().items():
        p = product(weights)
        rho = math.prod(float(np.linalg.norm(w)) for w in weights.values())
        value = float(margins(p, x, y, EPS).min()) / rho
        assert records[step]["normalized_margin"] == pytest.approx(value, rel=1e-9, abs=1e-13)
        assert value <= GAMMA - EPS + 1e-14
        if value > 0:
            gaps.append(GAMMA - EPS - value)
            cosine = min(1.0, float(p @ u.numpy()) / float(np.linalg.norm(p)))
            angles.append(math.acos(cosine))
    # the gap shrinks from decade to decade of the measurements
    parts = [max(part) for part in np.array_split(gaps, 4)]
    print(f"\nL = {depth}: gap to γ_m − ε, four stretches: {', '.join(f'{g:.2g}' for g in parts)}")
    assert all(b < a for a, b in pairwise(parts))
    assert gaps[-1] < 0.03 * (GAMMA - EPS)
    assert angles[-1] < 0.005
    assert angles[-1] < angles[0] / 50


@every_depth
def test_the_exponents(depth: int, settled: Settled) -> None:
    """−2 for 1 − (σ/‖W‖)² and −4 for 1 − ⟨u, v⟩², fitted here over the last third of ln σ."""
    points = [
        measure_alignment(tuple(weights.values()))
        for weights in settled(depth).trajectory().values()
    ]
    for attribute, exponent in (("rank_one_gaps", -2), ("neighbour_gaps", -4)):
        fits = []
        for k in range(depth - 1):
            sigma = np.log([float(p.spectral[k]) for p in points])
            gap = np.log([float(getattr(p, attribute)[k]) for p in points])
            late = sigma >= sigma[0] + 2 / 3 * (sigma.max() - sigma[0])
            fits.append(float(np.polyfit(sigma[late], gap[late], 1)[0]))
        print(f"\nL = {depth}, {attribute}: {', '.join(f'{f:.3f}' for f in fits)}")
        np.testing.assert_allclose(fits, exponent, rtol=0.1)
    # all at once: the product's norm tends to the product of the norms
    assert points[-1].product_gap < 0.02
    assert points[-1].product_gap < points[0].product_gap / 30
    assert all(0 <= float(r) <= 1 for p in points for r in p.ratios)


@every_depth
def test_all_layers_grow_together_and_the_products_of_balances_stay(
    depth: int, settled: Settled
) -> None:
    """``‖W_k‖_F² − ‖W_j‖_F²`` stays bounded while each grows without (Lemmas 1 and 6)."""
    path = list(settled(depth).trajectory().values())
    squares = np.array([[float(w.square().sum()) for w in weights.values()] for weights in path])
    assert np.all(squares[-1] > 50 * squares[0])
    spread = squares.max(axis=1) - squares.min(axis=1)
    assert spread[-1] < 0.1 * squares[-1].min()


def test_the_direction_is_that_of_another_svm(settled: Settled) -> None:
    """scikit-learn's, through a door of its own: no intercept, a large C."""
    from sklearn.svm import SVC

    x, y = arrays(mf.load(DATA))
    machine = SVC(kernel="linear", C=1e10, tol=1e-10).fit(
        np.vstack([x, -x]),
        np.append(y, -y),  # mirrored, so the intercept is 0
    )
    u = machine.coef_[0] / np.linalg.norm(machine.coef_)
    p = product(settled(3).trajectory()[settled(3).final["step"]])
    ours = np.array(max_margin(x, y).direction)
    assert np.linalg.norm(u - ours) < 1e-4
    assert np.linalg.norm(p / np.linalg.norm(p) - u) < 3e-3


# It can fail


def test_a_margin_beyond_the_bound_fails(settled: Settled) -> None:
    room = GAMMA - EPS
    for excess, outcome in ((1e-6, "fails"), (1e-11, "holds")):

        def forge(record: dict[str, Any], excess: float = excess) -> None:
            if record["step"] == settled(2).final["step"]:
                record["normalized_margin"] = room * (1 + excess)

        assert judged(changed(settled(2), record=forge))["direction"].outcome == outcome


def test_a_path_that_turns_away_fails(settled: Settled) -> None:
    run = settled(2)
    last = run.final["step"]

    def turn(step: int, weights: dict[str, torch.Tensor]) -> None:
        if step == last:
            first = next(iter(weights.values()))
            first.copy_(first.roll(1, dims=1))

    assert judged(changed(run, weights=turn))["direction"].outcome == "fails"


@pytest.mark.parametrize(("noise", "rank", "aligned"), [(1e-2, "fails", "fails")])
def test_layers_that_stay_noisy_fail(
    settled: Settled, noise: float, rank: str, aligned: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    rough = {
        name: torch.randn(w.shape, generator=generator, dtype=torch.float64)
        for name, w in settled(3).trajectory()[0].items()
    }

    def roughen(step: int, weights: dict[str, torch.Tensor]) -> None:
        for name, w in weights.items():
            w.add_(noise * torch.linalg.matrix_norm(w) * rough[name])

    found = judged(changed(settled(3), weights=roughen))
    print(f"\nnoisy: {found['rank one'].measured}; {found['alignment'].measured}")
    assert found["rank one"].outcome == rank
    assert found["alignment"].outcome == aligned


def test_alignment_may_be_faster_but_not_slower(settled: Settled) -> None:
    """O(σ⁻⁴) bounds from above: layers aligned to rounding are no counterexample."""
    run = settled(2)
    start = run.trajectory()[0]

    def align(step: int, weights: dict[str, torch.Tensor]) -> None:
        """The angle of W_2 to u_1, times (‖W_1(0)‖/‖W_1‖)^{1/2}: the gap falls by one power more."""
        first, last = weights.values()
        u = torch.linalg.svd(first, full_matrices=False)[0][:, 0]
        along = torch.dot(last[0], u) * u
        first_norm = torch.linalg.matrix_norm(next(iter(start.values())))
        shrink = (first_norm / torch.linalg.matrix_norm(first)) ** 0.5
        last[0] = along + (last[0] - along) * shrink

    found = judged(changed(run, weights=align))["alignment"]
    print(f"\nfaster: {found.measured}")
    assert float(found.measured) < -4.5
    assert found.outcome == "holds"


@pytest.mark.parametrize("hidden", [(4,), (4, 4)])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_nothing_fails_on_an_acute_cone(hidden: tuple[int, ...], eps: float) -> None:
    """There the loss falls however long the step is; steps of e^10 still follow the flow."""
    data = mf.load("separable:n=8,d=3,margin=1.0")
    attack = f"exact-linear:p=2,eps={eps}" if eps else None
    run = trained(
        *hidden, data=data, features=3, attack=attack, lr="loss-based:fall=10", epochs=700
    )
    found = judged(run, data)
    print(f"\nL = {len(hidden) + 1}, ε = {eps}: {'; '.join(v.measured for v in found.values())}")
    assert "fails" not in {v.outcome for v in found.values()}
    assert found["direction"].outcome == "holds"


# What it needs


def test_too_short_a_run_is_not_reached() -> None:
    found = judged(trained(5, 4, lr=0.05, epochs=10))
    assert {v.outcome for v in found.values()} == {"not reached"}
    assert "train longer" in found["direction"].advice
    assert "loss-based" in found["rank one"].advice


def test_where_it_does_not_apply() -> None:
    for options, words in (
        ({"attack": "exact-linear:p=2,eps=0.5"}, "Eq. (8): ε < γ_m (ε = 0.5, γ_m = 0.3)"),
        ({"momentum": 0.9}, "full-batch gradient descent"),
        ({"batch_size": 4}, "full-batch gradient descent"),
    ):
        for verdict in judged(trained(5, lr=0.05, epochs=5, **options)).values():
            assert verdict.outcome == "does not apply"
            assert words in verdict.measured


def test_standard_training_is_the_case_of_no_adversary() -> None:
    run = trained(5, attack=None, lr="loss-based:fall=1", epochs=900)
    found = judged(run)
    assert {v.outcome for v in found.values()} == {"holds"}
    assert "of γ_m − ε = 0.3" in found["direction"].measured
