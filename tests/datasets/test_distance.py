"""The smallest distance between classes, against scipy and naive loops."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import marginflow as mf
from marginflow.datasets import class_distance
from marginflow.errors import DataError


def test_two_classes_against_scipy() -> None:
    data = mf.load("digits:3,8")
    x, y = data.x.flatten(1).double().numpy(), data.y.numpy()
    found = class_distance(data)
    distances = cdist(x[y < 0], x[y > 0])
    assert found.distance == pytest.approx(distances.min(), rel=1e-14)
    assert np.linalg.norm(x[found.first] - x[found.second]) == pytest.approx(found.distance)
    assert y[found.first] != y[found.second]
    assert found.first < found.second
    assert found.largest_budget == found.distance / 2


def test_several_classes_and_several_blocks_against_a_naive_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("marginflow.datasets._distance._ROWS", 7)
    data = mf.load("digits:0,1,2,n=40")
    naive = min(
        (float(torch.linalg.vector_norm((data.x[i] - data.x[j]).double())), i, j)
        for i, j in combinations(range(data.n), 2)
        if data.y[i] != data.y[j]
    )
    found = class_distance(data)
    assert (found.distance, found.first, found.second) == pytest.approx(naive)


def test_examples_far_from_the_origin_lose_no_digits() -> None:
    x = torch.tensor([[1e8, 0.0], [1e8, 1e-3], [0.0, 0.0]], dtype=torch.float64)
    found = class_distance(mf.Dataset(x, torch.tensor([1, -1, 1])))
    assert found.distance == pytest.approx(1e-3, rel=1e-12)


def test_one_class_has_no_distance() -> None:
    data = mf.Dataset(torch.ones(3, 2), torch.tensor([1, 1, 1]))
    with pytest.raises(DataError, match="two classes"):
        class_distance(data)


@pytest.mark.parametrize(("digits", "expected"), [("3,8", 4.5308), ("2,8", 4.8130)])
def test_the_real_mnist(digits: str, expected: float, mnist_dir: Path) -> None:
    found = class_distance(mf.load(f"mnist:{digits}", data_dir=mnist_dir))
    assert found.distance == pytest.approx(expected, abs=5e-5)
