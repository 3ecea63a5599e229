"""``∂m_i/∂W`` through δ(W) against central differences of the margins themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kkt_oracles import Case, case

from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear, FiniteSet
from marginflow.kkt._problem import Problem, Rows
from marginflow.losses import get_loss

ATTACKS: dict[str, Attack] = {
    "fgm": FGM(0.2),
    "fgm-bounds": FGM(0.4, bounds=(-2.5, 2.5)),
    "pgd-l2": PGD("l2", 0.2, steps=3, step_size=0.09),
    "pgd-l2-random": PGD("l2", 0.2, steps=2, step_size=0.15, random_start=True),
    "fgsm": FGSM(0.02),
    "pgd-linf": PGD("linf", 0.05, steps=3, step_size=0.02),
    "finite-set": FiniteSet(0.1 * torch.randn((3, 6), dtype=torch.float64)),
}


def setting(network: str, attack: Attack) -> tuple[Case, Problem, Rows]:
    c = case(network, n=8, attack=attack if attack.bounds is None else None)
    x = c.x if attack.bounds is None else c.x.clamp(*attack.bounds)
    problem = Problem(
        c.model,
        x,
        c.y,
        attack,
        derivative="total",
        homogeneity=None,
        seed=0,
        batch_size=100,
    )
    rows = problem.survey(100, get_loss("exponential")).nearest
    return Case(c.model, x, c.y), problem, rows


def margins_at(problem: Problem, weights: torch.Tensor, rows: Rows) -> np.ndarray:
    """All margins with δ formed anew at other weights, through the first pass over the data."""
    before = problem.weights
    problem.put(weights)
    found = problem.survey(1, get_loss("exponential")).margins[rows.examples]
    problem.put(before)
    return found.numpy()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("network", ["squared", "squared-classes"])
def test_gradients_of_the_margins(name: str, network: str) -> None:
    attack = ATTACKS[name]
    _, problem, rows = setting(network, attack)
    w, h = problem.weights, 3e-6
    found = problem.gradients(rows)
    expected = np.empty(found.shape)
    for k in range(len(w)):
        step = torch.zeros_like(w)
        step[k] = h
        up, down = margins_at(problem, w + step, rows), margins_at(problem, w - step, rows)
        expected[:, k] = (up - down) / (2 * h)
    assert np.abs(found.numpy() - expected).max() <= 1e-7 * np.abs(expected).max()
    # Euler's identity holds for the total derivative as well, since δ(aW) = δ(W).
    along = (found @ w).numpy()
    order = {"squared": 7, "squared-classes": 3}[network]
    assert np.abs(along - order * rows.values.numpy()).max() <= 1e-10 * np.abs(along).max()


@pytest.mark.parametrize("attack", [None, FGM(0.2), FGSM(0.02), ExactLinear(2, 0.05)], ids=str)
def test_combinations_and_slopes_are_those_of_the_gradients(attack: Attack | None) -> None:
    network = "linear" if isinstance(attack, ExactLinear) else "squared-classes"
    c = case(network, n=8, attack=attack)
    problem = Problem(
        c.model, c.x, c.y, attack, derivative="total", homogeneity=None, seed=0, batch_size=3
    )
    rows = problem.survey(100, get_loss("exponential")).nearest
    gradients = problem.gradients(rows)
    multipliers = torch.rand(len(rows), dtype=torch.float64)
    combined = problem.combination(rows, multipliers)
    assert (combined - multipliers @ gradients).abs().max() <= 1e-12
    direction = torch.randn(len(problem.weights), dtype=torch.float64)
    assert (problem.slopes(rows, direction) - gradients @ direction).abs().max() <= 1e-12
