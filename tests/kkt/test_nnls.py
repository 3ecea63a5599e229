"""The solver for non-negative least squares in a Gram matrix, against scipy on the vectors themselves."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import nnls

from marginflow.kkt import _nnls
from marginflow.kkt._nnls import Solution, solve

Array = npt.NDArray[np.float64]


def problem(kind: str, seed: int) -> tuple[Array, Array]:
    """Unit columns with a positive inner product with a unit vector, as margin gradients have."""
    rng = np.random.default_rng(seed)
    d, s = int(rng.integers(2, 40)), int(rng.integers(1, 60))
    columns = rng.normal(size=(d, s))
    if kind == "duplicated":
        columns = columns[:, rng.integers(0, max(1, s // 2), size=s)]
    if kind == "narrow":  # nearly parallel columns
        columns = np.abs(columns) + 5.0
    if kind == "ill-conditioned":  # the Gram matrix has a condition number of 1e10 and more
        columns = rng.normal(size=(d, s)) + 0.3
        columns *= np.logspace(0, -5, d)[:, None]
    if kind == "wide":  # many more columns than dimensions
        columns = rng.normal(size=(max(2, d // 5), 60))
    vector = rng.normal(size=len(columns))
    columns = columns * np.where(vector @ columns < 0, -1.0, 1.0)
    if kind == "inside":  # the vector lies in the cone: the residual is 0
        vector = columns @ rng.uniform(size=columns.shape[1])
    return columns / np.linalg.norm(columns, axis=0), vector / np.linalg.norm(vector)


def by_gram(columns: Array, vector: Array, start: torch.Tensor | None = None) -> Solution:
    gram = torch.from_numpy(columns.T @ columns).fill_diagonal_(1.0)
    return solve(gram, torch.from_numpy(columns.T @ vector), start)


def residual(columns: Array, vector: Array, multipliers: torch.Tensor) -> float:
    return float(np.linalg.norm(vector - columns @ multipliers.numpy()))


KINDS = ["plain", "duplicated", "narrow", "ill-conditioned", "wide", "inside"]


@pytest.mark.parametrize("kind", KINDS)
def test_residual_and_conditions_against_scipy(kind: str) -> None:
    for seed in range(40):
        columns, vector = problem(kind, seed)
        found = by_gram(columns, vector)
        _, expected = nnls(columns, vector, maxiter=10_000)
        assert bool((found.multipliers >= 0).all())
        # Squares, for the Gram matrix knows no more digits of a residual that is nearly 0.
        assert abs(residual(columns, vector, found.multipliers) ** 2 - expected**2) <= 1e-13
        assert found.violation <= 1e-11


@pytest.mark.parametrize("kind", ["plain", "narrow"])
def test_multipliers_where_they_are_unique(kind: str) -> None:
    for seed in range(20):
        columns, vector = problem(kind, seed)
        if columns.shape[1] > columns.shape[0]:
            continue
        expected, _ = nnls(columns, vector, maxiter=10_000)
        found = by_gram(columns, vector).multipliers.numpy()
        condition = np.linalg.cond(columns) ** 2
        assert np.abs(found - expected).max() <= 1e-14 * condition * max(1.0, expected.max())


def test_a_warm_start_changes_the_way_and_not_the_answer() -> None:
    for seed in range(20):
        columns, vector = problem("plain", seed)
        cold = by_gram(columns, vector)
        rng = np.random.default_rng(seed)
        start = torch.from_numpy(rng.uniform(size=columns.shape[1]) * rng.integers(0, 2))
        warm = by_gram(columns, vector, start)
        again = by_gram(columns, vector, cold.multipliers)
        same = residual(columns, vector, warm.multipliers) ** 2
        assert abs(same - residual(columns, vector, cold.multipliers) ** 2) <= 1e-14
        if columns.shape[1] <= columns.shape[0]:  # else they need not be unique
            assert (warm.multipliers - cold.multipliers).abs().max() <= 1e-10
        assert again.exchanges == again.factorizations == 0
        assert torch.equal(again.multipliers > 0, cold.multipliers > 0)


def large(kind: str) -> tuple[Array, Array]:
    """Some hundred columns: 300 of 400 in use, each one twice, or in a space that is nearly flat."""
    rng = np.random.default_rng(1)
    columns = rng.normal(size=(800, 400))
    vector = columns @ rng.exponential(size=400) + 20 * rng.normal(size=800)
    if kind == "duplicated":
        columns = np.hstack([columns, columns])
    if kind == "ill-conditioned":
        columns = np.logspace(0, -4, 120)[:, None] * (rng.normal(size=(120, 400)) + 0.3)
        vector = columns @ rng.uniform(size=400) + 10 * rng.normal(size=120)
    columns = columns * np.sign(vector @ columns) / np.linalg.norm(columns, axis=0)
    return columns, vector / np.linalg.norm(vector)


@pytest.mark.parametrize("kind", ["plain", "duplicated", "ill-conditioned"])
def test_blocks_and_single_exchanges_give_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks from the start, single exchanges alone, and blocks where single ones take too long."""
    columns, vector = large(kind)
    _, expected = nnls(columns, vector, maxiter=100_000)
    exchanges = []
    for work in (0.0, 1e6, math.inf):
        monkeypatch.setattr(_nnls, "_WORK", 0.0)
        monkeypatch.setattr(_nnls, "_LEAST_WORK", work)
        found = by_gram(columns, vector)
        assert residual(columns, vector, found.multipliers) == pytest.approx(expected, abs=1e-12)
        assert found.violation <= 1e-12
        assert (found.factorizations == 0) == (work == math.inf)
        exchanges.append(found.exchanges)
    if kind != "ill-conditioned":  # many multipliers: blocks alone reach the minimiser
        assert exchanges[0] <= 1 < exchanges[1] < 200 < exchanges[2]


def test_a_start_at_multipliers_of_dependent_columns() -> None:
    columns, vector = large("duplicated")
    expected = by_gram(columns, vector)
    half = expected.multipliers / 2
    start = half + half.roll(400)  # each pair shares its multiplier
    assert int((start > 0).sum()) > 400
    found = by_gram(columns, vector, start)
    assert residual(columns, vector, found.multipliers) == pytest.approx(
        residual(columns, vector, expected.multipliers), abs=1e-13
    )
    assert found.violation <= 1e-13


def test_nothing_to_choose_from() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert len(solve(torch.zeros((0, 0), dtype=torch.float64), empty).multipliers) == 0
    one = solve(torch.ones((1, 1), dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64))
    assert one.multipliers.tolist() == [0.3]
    away = solve(torch.ones((1, 1), dtype=torch.float64), torch.tensor([-0.3], dtype=torch.float64))
    assert away.multipliers.tolist() == [0.0]
