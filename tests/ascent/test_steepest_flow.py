"""Steepest flows: closed forms, Euler's identity, order of the steps, max-margin of deep linear networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import marginflow as mf
from marginflow.ascent import SteepestFlow
from marginflow.errors import InputError, NotHomogeneousError

NAMES = ("l1", "l2", "sign", "spectral")


def one_layer(weights: list[float], x: list[list[float]]) -> tuple[torch.nn.Module, mf.Dataset]:
    data = mf.Dataset(torch.tensor(x, dtype=torch.float64), torch.ones(len(x), dtype=torch.int64))
    model = mf.models.deep_linear(len(weights), 1, seed=0).double()
    with torch.no_grad():
        next(model.parameters()).copy_(torch.tensor([weights], dtype=torch.float64))
    return model, data


def crossed() -> mf.Dataset:
    """Not linearly separable."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(14, 5, generator=generator, dtype=torch.float64)
    return mf.Dataset(x, torch.sign(x[:, 0] * x[:, 1] + 0.3).long())


def squared() -> torch.nn.Module:
    """Degrees 2 and 1."""
    return mf.models.mlp(5, 10, 1, activation="squared-relu", seed=1)


# One example z and one layer: ∇ℓ = z wherever we are, so the flow is w + sV with V of z.


def test_one_example_in_closed_form() -> None:
    """z = (1, 0.1) from w = z: V = (1, 1) for signs, and ℓ = ⟨w, z⟩ = 1.01 + 1.1 s."""
    model, data = one_layer([1.0, 0.1], [[1.0, 0.1]])
    flow = SteepestFlow(model, data, geometry="sign")
    path = flow.follow(flow.start, step=0.05, steps=200)
    s = path.weights[0] - 1.0
    assert path.weights.tolist() == pytest.approx([1.0 + s, 0.1 + s], rel=1e-12)
    assert s > 5
    assert path.smoothed[[0, -1]].tolist() == pytest.approx([1.01, 1.01 + 1.1 * s], rel=1e-12)
    assert path.dual == pytest.approx(np.full(201, 1.1), rel=1e-12)
    ends = path.log_ratio()[[0, -1]]
    assert ends.tolist() == pytest.approx([math.log(1.01), math.log((1.01 + 1.1 * s) / (1 + s))])
    assert path.falls().count == 0


def test_in_another_norm_the_ratio_falls() -> None:
    """The negative control: w = z is best in ℓ2, and signs leave it. The falls do not go with the step."""
    model, data = one_layer([1.0, 0.1], [[1.0, 0.1]])
    flow = SteepestFlow(model, data, geometry="sign")
    paths = [flow.follow(flow.start, step=0.1 / k, steps=50 * k) for k in (1, 2, 4)]
    for path in paths:
        s = path.weights[0] - 1.0
        fall = 0.5 * math.log(1.01) - math.log((1.01 + 1.1 * s) / math.hypot(1 + s, 0.1 + s))
        found = path.falls("l2")
        assert found.count == found.pairs == len(path)
        assert found.total == pytest.approx(fall, rel=1e-9)
        assert found.total > 0.1
        assert path.falls("sign").count == 0


def test_in_another_norm_the_ratio_of_a_network_falls() -> None:
    """From where the ℓ2 flow of a deep linear network arrived, signs lose ℓ2 margin and win their own."""
    data = mf.load("separable:n=15,d=6,margin=0.3,seed=4")
    model = mf.models.deep_linear(6, 4, 1, seed=0)
    flow = SteepestFlow(model, data, geometry="l2")
    arrived = flow.follow(flow.separated(), step=0.05, steps=100).weights
    signs = SteepestFlow(model, data, geometry="sign")
    coarse, fine = (signs.follow(arrived, step=0.08 / k, steps=375 * k) for k in (1, 3))
    for path in (coarse, fine):
        assert path.falls("l2").count > 0.5 * len(path)
        assert path.falls("l2").total > 0.04
        assert path.falls("sign").count == 0
        assert path.log_ratio()[-1] > path.log_ratio()[0] + 0.8
    assert fine.falls("l2").total > coarse.falls("l2").total
    assert fine.falls("l2").largest == pytest.approx(coarse.falls("l2").largest / 3, rel=0.4)


# What the proof is made of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "attack",
    [None, mf.attacks.FGM(0.1), mf.attacks.FGSM(0.05)],
    ids=["clean", "fgm", "fgsm"],
)
def test_eulers_identity_with_the_entropy(name: str, attack: mf.attacks.Attack | None) -> None:
    """``⟨W, ∇ℓ⟩ = K Σ q_i m_i = K(ℓ + H(q))`` through δ(W), with margins of our own."""
    data, model = crossed(), squared()
    flow = SteepestFlow(model, data, attack, geometry=name)
    w = flow.separated()
    assert w is not None
    path = flow.follow(w, step=0.02, steps=40)
    assert path.order == 3
    flow.field.write(path.weights)
    margins = mf.adversarial_margins(flow.model, data.x, data.y, attack).values.numpy()
    q = np.exp(-margins) / np.exp(-margins).sum()
    entropy = -(q * np.log(q)).sum()
    assert path.smoothed[-1] == pytest.approx(-math.log(np.exp(-margins).sum()), rel=1e-10)
    assert path.margins[-1] == pytest.approx(margins.min(), rel=1e-10)
    assert path.inner[-1] == pytest.approx(3 * (q @ margins), rel=1e-10)
    assert path.inner[-1] == pytest.approx(3 * (path.smoothed[-1] + entropy), rel=1e-10)


@pytest.mark.parametrize("name", ["l2", "sign", "spectral"])
def test_a_step_is_off_by_second_order(name: str) -> None:
    """ℓ at the end of the same piece, with steps halved: differences halve."""
    flow = SteepestFlow(squared(), crossed(), geometry=name)
    w = flow.separated(patience=400)
    assert w is not None
    ends = [flow.follow(w, step=0.02 / k, steps=100 * k).smoothed[-1] for k in (1, 2, 4, 8)]
    gaps = np.abs(np.diff(ends))
    order = float(np.polyfit(np.log([1, 0.5, 0.25]), np.log(gaps), 1)[0])
    print(f"\n{name}: order {order:.2f} of {gaps}")
    assert 0.8 < order < 1.6


def test_signs_slide_along_a_kink_slower_than_steepest() -> None:
    """ℓ = min(⟨a, x⟩, ⟨b, x⟩), a = (5, 1, 1), b = (1, −1, −5): 4 per unit of length, not the possible 5."""
    a, b = np.array([5.0, 1.0, 1.0]), np.array([1.0, -1.0, -5.0])
    x = np.zeros(3)
    for _ in range(4000):
        x = x + 1e-3 * np.sign(a if a @ x <= b @ x else b)
    assert min(a @ x, b @ x) / 4.0 == pytest.approx(4.0, rel=1e-3)
    between = [np.abs(s * a + (1 - s) * b).sum() for s in np.linspace(0, 1, 1001)]
    assert min(between) == pytest.approx(5.0)


# Where the flows go


@pytest.mark.parametrize(("name", "p", "factor"), [("sign", 1.0, 4.0), ("spectral", 2.0, 1.0)])
def test_two_linear_layers_tend_to_the_largest_margin(name: str, p: float, factor: float) -> None:
    """``max m_min/‖W‖²`` over W_2 W_1 with h = 4 hidden units: entries in [−1, 1] give products in
    [−4, 4], so 4 times the best margin with ‖u‖_∞ ≤ 1 (ℓ1 distance); singular values up to 1 that of ℓ2.
    """
    data = mf.load("separable:n=15,d=6,margin=0.3,seed=4")
    best = factor * mf.references.max_margin(data.x.numpy(), data.y.numpy(), p=p).margin
    flow = SteepestFlow(mf.models.deep_linear(6, 4, 1, seed=0), data, geometry=name)
    path = flow.follow(flow.separated(), step=0.05, steps=2000)
    reached = path.normalized_margin()
    print(f"\n{name}: {reached[0]:.4f} → {reached[-1]:.4f} of {best:.4f}")
    assert 0.89 * best <= reached[-1] <= best * (1 + 1e-9)
    assert path.falls().total < 1e-3


# Beginnings and refusals


def test_a_flow_begins_where_the_loss_is_below_one_over_n() -> None:
    model, data = one_layer([1.0, 0.1], [[1.0, 0.1]])
    flow = SteepestFlow(model, data, geometry="l2")
    assert (flow.separated() == flow.start).all()
    backwards, data = one_layer([-1.0, 0.2], [[1.0, 0.1], [1.0, -0.1]])
    flow = SteepestFlow(backwards, data, geometry="l2")
    w = flow.separated()
    assert w is not None
    assert 0 < flow.field(w).smoothed < 0.1
    never, data = one_layer([1.0, 0.1], [[1.0, 0.1], [-1.0, -0.1]])
    assert SteepestFlow(never, data, geometry="sign").separated(patience=50) is None
    assert next(never.parameters()).tolist() == [[1.0, pytest.approx(0.1)]]


def test_without_a_gradient_the_path_ends() -> None:
    model, data = one_layer([0.0, 0.0], [[1.0, 0.1], [-1.0, -0.1]])
    flow = SteepestFlow(model, data)
    assert flow.separated() is None
    path = flow.follow(flow.start, step=0.1, steps=10)
    assert len(path) == 0
    assert path.falls().pairs == 0


def test_smoothed_margins_that_turn_negative_fall_without_bound() -> None:
    """Against FGSM: ℓ jumps, and coarse steps jump out of L < 1/n."""
    model, data = one_layer([1.0, 0.1], [[1.0, 0.1]])
    path = SteepestFlow(model, data).follow(np.array([1.0, 0.1]), step=0.1, steps=2)
    path.smoothed[1] = -0.5
    assert path.falls().total == math.inf
    assert path.falls().count == 1


def test_what_a_flow_refuses() -> None:
    data = crossed()
    curved = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    with pytest.raises(NotHomogeneousError):
        SteepestFlow(curved, data)
    with pytest.raises(InputError, match="unknown geometry 'linf'"):
        SteepestFlow(squared(), data, geometry="linf")
    flow = SteepestFlow(squared(), data)
    with pytest.raises(InputError, match="above 0"):
        flow.follow(flow.start, step=0.0, steps=3)
    with pytest.raises(InputError, match="at least 1"):
        flow.follow(flow.start, step=0.1, steps=0)


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        flow = SteepestFlow(squared(), crossed())
        with pytest.raises(InputError):
            flow.follow(flow.start, step=0.0, steps=3)
        flow.separated()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
