"""Figures 4 and 5: budgets beyond half the distance between the classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from errata_formulas import Sample, fgm
from torch import Tensor

import marginflow as mf


def nearest(data: mf.Dataset) -> tuple[Tensor, Tensor]:
    """The two images of different classes with the least ℓ2 distance, as bytes."""
    x = (data.x.reshape(data.n, -1) * 255).round()
    a, b = x[data.y < 0], x[data.y > 0]
    # float32 finds candidates to 1e-5 relative; which of two equally near pairs does not matter
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    i, j = divmod(int(squares.argmin()), len(b))
    return a[i].double(), b[j].double()


@pytest.mark.parametrize(
    ("digits", "eps", "expected"), [("3,8", 8.0, 4.5308), ("2,8", 3.0, 4.8130)]
)
def test_figures_4_and_5_exceed_half_the_distance_of_the_classes(
    digits: str, eps: float, expected: float, mnist_dir: Path
) -> None:
    three, eight = nearest(mf.load(f"mnist:{digits}", data_dir=mnist_dir))
    distance = float(torch.linalg.vector_norm(three - eight)) / 255
    print(f"\n{digits}: least distance {distance:.4f}, ε = {eps:g}")
    assert distance == pytest.approx(expected, abs=5e-5)
    assert eps > distance / 2
    # One image is a perturbation of both: no classifier is right on it for both labels.
    middle = (three + eight) / 2
    assert bool(((middle >= 0) & (middle <= 255)).all())
    for image in (three, eight):
        assert float(torch.linalg.vector_norm(middle - image)) / 255 < eps


def test_fgm_accuracy_of_100_percent_proves_nothing_there() -> None:
    """``f(x) = x_1² − x_2²``, a squared-ReLU network: right under FGM with ε = 3 at distance √2."""
    weights = [
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double(),
        torch.tensor([[1.0, 1.0, -1.0, -1.0]]).double(),
    ]
    s = Sample(torch.eye(2).double(), torch.tensor([1.0, -1.0]).double(), 2)
    under_fgm = s.y * s.f(weights, s.x + fgm(3.0)(s, weights, False))
    assert under_fgm.tolist() == [4.0, 4.0]
    assert (s.y * s.f(weights, s.x)).tolist() == [1.0, 1.0]
    # the exact adversary reaches the other class's example, a distance √2 < 3 away
    other = s.y * s.f(weights, s.x.flip(0))
    assert other.tolist() == [-1.0, -1.0]
