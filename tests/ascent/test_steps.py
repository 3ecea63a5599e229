"""The steps against loops that write the formulas down, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from marginflow.ascent import RunningSize, relative_step, sphere_step
from marginflow.ascent import _steps as steps
from marginflow.errors import InputError, ModelError

Arrays = list[np.ndarray]
SHAPES = ((30, 50), (7, 30), (1, 7))


def draw(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def arrays(tensors: list[Tensor]) -> Arrays:
    return [t.double().numpy().copy() for t in tensors]


def own(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Each tensor a layer of its own."""
    return [[t] for t in tensors]


def naive_sphere(W: Arrays, G: Arrays, v: Arrays, angle: float, mu: float) -> float:
    r = [np.linalg.norm(w) for w in W]
    unit = [w / n for w, n in zip(W, r, strict=True)]
    T = [n * (g - np.sum(g * u) * u) for n, g, u in zip(r, G, unit, strict=True)]
    t = math.sqrt(sum(np.sum(x * x) for x in T))
    for k, u in enumerate(unit):
        v[k] = mu * v[k] + T[k] / t
        v[k] = v[k] - np.sum(v[k] * u) * u
        moved = u - angle * v[k]
        W[k] = r[k] * moved / np.linalg.norm(moved)
    return t


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_sphere_step_is_its_formula(dtype: torch.dtype, tolerance: float) -> None:
    W = [w * s for w, s in zip(draw(0, dtype), (3.0, 0.1, 1.0), strict=True)]
    v = [torch.zeros_like(w) for w in W]
    naive_W, naive_v = arrays(W), arrays(v)
    for step in range(20):
        G = draw(step + 1, dtype)
        t = sphere_step(own(W), own(G), own(v), angle=0.1, momentum=0.9)
        expected = naive_sphere(naive_W, arrays(G), naive_v, 0.1, 0.9)
        assert t == pytest.approx(expected, rel=tolerance)
    for got, wanted in zip(W + v, naive_W + naive_v, strict=True):
        assert np.abs(got.double().numpy() - wanted).max() < tolerance * np.abs(wanted).max()


def test_several_tensors_are_one_layer() -> None:
    """Weight and bias side by side give what the matrix [W b] gives."""
    W, G = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    parts, whole = [W[:, :3].clone(), W[:, 3].clone()], W.clone()
    pv, wv = [torch.zeros(5, 3).double(), torch.zeros(5).double()], torch.zeros(5, 4).double()
    for _ in range(3):
        sphere_step([parts], [[G[:, :3], G[:, 3]]], [pv], angle=0.2, momentum=0.5)
        sphere_step([[whole]], [[G]], [[wv]], angle=0.2, momentum=0.5)
    torch.testing.assert_close(torch.column_stack(parts), whole, rtol=1e-12, atol=0)


def test_one_angle_and_momentum_for_each_layer() -> None:
    W, v = draw(0), [torch.zeros(s) for s in SHAPES]
    before = [w.clone() for w in W]
    for seed in (1, 2):
        sphere_step(own(W), own(draw(seed)), own(v), angle=[0.1, 0.0, 0.1], momentum=[0, 0.5, 0.9])
    assert not torch.equal(W[0], before[0])
    torch.testing.assert_close(W[1], before[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [-100, -40, -7, 9, 30, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_powers_of_two_in_the_gradient_change_no_bit(exponent: int, dtype: torch.dtype) -> None:
    results = []
    for factor in (1.0, 2.0**exponent):
        W = draw(0, dtype)
        v, R = [torch.zeros_like(w) for w in W], draw(0, dtype)
        for seed in range(1, 5):
            G = [g * factor for g in draw(seed, dtype)]
            sphere_step(own(W), own(G), own(v), angle=0.1, momentum=0.9)
            relative_step(R, G, step=0.1)
        results.append(W + v + R)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
def test_gradients_of_any_size_in_float32(size: float) -> None:
    """1e-40 is a subnormal: few digits are left of each entry."""
    results = []
    for factor in (1.0, size):
        W, R = draw(0), draw(0)
        v = [torch.zeros_like(w) for w in W]
        G = [(g.double() * factor).float() for g in draw(1)]
        sphere_step(own(W), own(G), own(v), angle=0.1, momentum=0.9)
        relative_step(R, G, step=0.1)
        results.append(W + R)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scales", [(2.0, 0.5, 4.0), (3.0, 0.1, 70.0), (1e17, 1e-15, 1.0)])
def test_the_norms_of_the_layers_change_no_direction(scales: tuple[float, ...]) -> None:
    """Scaling W_k by a scales G_k by 1/a: for a homogeneous network f only changes its size."""
    results = []
    for factors in ((1.0, 1.0, 1.0), scales):
        W = [w * a for w, a in zip(draw(0), factors, strict=True)]
        v = [torch.zeros_like(w) for w in W]
        for seed in range(1, 5):
            G = [g / a for g, a in zip(draw(seed), factors, strict=True)]
            sphere_step(own(W), own(G), own(v), angle=0.1, momentum=0.9)
        results.append([w / a for w, a in zip(W, factors, strict=True)] + v)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6)
    if scales[0] == 2.0:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_norms_stay_over_ten_thousand_steps() -> None:
    generator = torch.Generator().manual_seed(3)
    W = [torch.randn(9, 20, generator=generator)]
    target = [float(w.double().norm()) for w in W]
    v, norms = [torch.zeros_like(w) for w in W], [0.0]
    for _ in range(10_000):
        G = [torch.randn(w.shape, generator=generator) for w in W]
        sphere_step(own(W), own(G), own(v), angle=3e-3, momentum=0.9, norms=norms)
    now = [float(w.double().norm()) for w in W]
    assert np.abs(np.array(now) / target - 1).max() < 3 * torch.finfo(torch.float32).eps
    assert norms == pytest.approx(target, rel=1e-6)


def test_a_norm_changed_from_outside_is_the_new_norm() -> None:
    W, v, norms = draw(0), [torch.zeros(s) for s in SHAPES], [0.0] * 3
    for seed in (1, 2):
        sphere_step(own(W), own(draw(seed)), own(v), angle=0.1, momentum=0.9, norms=norms)
        W[0].mul_(5)
    sphere_step(own(W), own(draw(3)), own(v), angle=0.1, momentum=0.9, norms=norms)
    assert norms[0] == pytest.approx(25 * float(draw(0)[0].norm()), rel=1e-5)


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_a_nearly_radial_gradient_keeps_its_direction(share: float) -> None:
    """What is left of the gradient after projection is a small difference of large numbers."""
    W = [torch.randn(200, 300, generator=torch.Generator().manual_seed(5), dtype=torch.float64)]
    T = torch.randn(200, 300, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    G = [-W[0] + share * T]
    naive_W, naive_v = arrays(W), [np.zeros((200, 300))]
    v = [torch.zeros_like(W[0])]
    before = naive_W[0].copy()
    t = sphere_step([W], [G], [v], angle=0.1, momentum=0.0)
    assert t == pytest.approx(naive_sphere(naive_W, arrays(G), naive_v, 0.1, 0.0), rel=1e-6)
    moved, expected = W[0].numpy() - before, naive_W[0] - before
    assert np.linalg.norm(moved - expected) < 1e-6 * np.linalg.norm(expected)


def test_a_radial_gradient_gives_no_direction_but_momentum_goes_on() -> None:
    W, v = draw(0), [torch.zeros(s) for s in SHAPES]
    assert sphere_step(own(W), own([-w for w in W]), own(v), angle=0.1, momentum=0.9) == 0
    assert not any(x.any() for x in v)
    sphere_step(own(W), own(draw(1)), own(v), angle=0.1, momentum=0.9)
    speed, before = float(v[0].norm()), W[0].clone()
    zeros = [torch.zeros_like(w) for w in W]
    assert sphere_step(own(W), own(zeros), own(v), angle=0.1, momentum=0.9) == 0
    # The projection at the new weights costs a velocity its component along them.
    assert 0.85 * speed < float(v[0].norm()) <= 0.9 * speed * (1 + 1e-6)
    assert not torch.equal(W[0], before)


def test_tensors_that_are_not_contiguous() -> None:
    results = []
    for arrange in (lambda t: t.clone(), lambda t: t.t().contiguous().t()):
        W, v = [arrange(w) for w in draw(0)], [arrange(torch.zeros(s)) for s in SHAPES]
        for seed in (1, 2):
            G = [arrange(g) for g in draw(seed)]
            sphere_step(own(W), own(G), own(v), angle=0.1, momentum=0.9)
            relative_step(W, G, step=0.1)
        results.append(W + v)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_products_of_large_tensors_are_summed_in_blocks() -> None:
    a, b, c = (torch.randn(700, 400, generator=torch.Generator().manual_seed(s)) for s in range(3))
    expected = [float((x.double() * y.double()).sum()) for x, y in ((a, a), (a, b), (b, b), (a, c))]
    assert a.numel() > 2 * steps._BLOCK
    for got, wanted in zip(steps._products([a], [b], [c]), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5, abs=0.05)


@pytest.mark.parametrize("step", ["sphere", "relative"])
@pytest.mark.parametrize("where", ["weight", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_changes_nothing(step: str, where: str, value: float) -> None:
    W, G, v = draw(0), draw(1), [torch.zeros(s) for s in SHAPES]
    (W if where == "weight" else G)[1][2, 3] = value
    before = [w.clone() for w in W]
    take: dict[str, Callable[[], float]] = {
        "sphere": lambda: sphere_step(own(W), own(G), own(v), angle=0.1, momentum=0.9),
        "relative": lambda: relative_step(W, G, step=0.1),
    }
    with pytest.raises(InputError, match=f"a {where} of .* is not finite"):
        take[step]()
    for now, then in zip(W, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert not any(x.any() for x in v)


def test_a_velocity_that_is_not_finite() -> None:
    v = [torch.full(s, math.nan) for s in SHAPES]
    with pytest.raises(InputError, match="velocity of layer 1 is not finite"):
        sphere_step(own(draw(0)), own(draw(1)), own(v), angle=0.1, momentum=0.9)


def test_refusals() -> None:
    W, G, v = draw(0), draw(1), [torch.zeros(s) for s in SHAPES]
    with pytest.raises(ModelError, match="layer 'head' is 0 and has no direction"):
        sphere_step(
            own([*W[:2], torch.zeros(1, 7)]),
            own(G),
            own(v),
            angle=0.1,
            momentum=0.0,
            names=["a", "b", "head"],
        )
    with pytest.raises(ModelError, match="the weights are 0"):
        relative_step([torch.zeros(2)], [torch.ones(2)], step=0.1)
    with pytest.raises(InputError, match="as many gradients"):
        sphere_step(own(W), own(G[:2]), own(v), angle=0.1, momentum=0.0)
    with pytest.raises(InputError, match="expected tensors of shapes"):
        relative_step(W, G[::-1], step=0.1)
    with pytest.raises(InputError, match="at least one tensor"):
        sphere_step([[]], [[]], [[]], angle=0.1, momentum=0.0)
    with pytest.raises(InputError, match="float32 or float64"):
        relative_step([W[0].bfloat16()], [G[0].bfloat16()], step=0.1)
    with pytest.raises(InputError, match="finite ln of a loss"):
        relative_step(W, G, step=0.1, running=RunningSize(), log_loss=-math.inf)
    assert sphere_step([], [], [], angle=0.1, momentum=0.0) == 0
    assert relative_step([], [], step=0.1) == 0


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_relative_step_is_its_formula(weight: float) -> None:
    W, G = draw(0, torch.float64), draw(1, torch.float64)
    w, g = (np.concatenate([x.ravel() for x in arrays(t)]) for t in (W, G))
    assert relative_step(W, G, step=0.3, weight=weight) == weight
    expected = w - 0.3 * weight * np.linalg.norm(w) * g / np.linalg.norm(g)
    np.testing.assert_allclose(np.concatenate([x.ravel() for x in arrays(W)]), expected, rtol=1e-12)


def test_relative_step_without_a_gradient_stays() -> None:
    W = draw(0)
    assert relative_step(W, [torch.zeros(s) for s in SHAPES], step=0.3) == 0
    assert all(torch.equal(a, b) for a, b in zip(W, draw(0), strict=True))


def test_weights_of_batches() -> None:
    """The running mean against numpy, where nothing underflows."""
    sizes, mean, beta = [0.3, 0.1, 4.0, 0.02, 1.0], None, 0.9
    running = RunningSize(beta=beta, cap=4.0)
    for size in sizes:
        mean = size if mean is None else beta * mean + (1 - beta) * size
        assert running.weigh(math.log(size)) == pytest.approx(min(4.0, size / mean), rel=1e-12)
    far = RunningSize(beta=beta, cap=4.0)
    assert far.weigh(-1e6) == 1.0
    assert far.weigh(-1e6 + 1) == pytest.approx(math.e / (0.9 + 0.1 * math.e))
    assert far.weigh(-1e6 + 500) == 4.0
    assert far.weigh(-2e6) == 0.0
    assert RunningSize(beta=0.0).weigh(-5.0) == 1.0


@pytest.mark.parametrize("of_log", [True, False])
def test_the_estimate_follows_the_growth_of_the_weights(of_log: bool) -> None:
    """One batch whose loss is e^{−⟨w, x⟩}, a gradient along w: to first order, the estimate is exact."""
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    w, running = x.clone(), RunningSize()
    for _ in range(50):
        log_loss = -float(w @ x)
        gradient = -x if of_log else -x * math.exp(log_loss)
        weight = relative_step(
            [w], [gradient], step=1e-5, running=running, log_loss=log_loss, of_log=of_log
        )
        assert weight == pytest.approx(1.0, rel=1e-9)
    assert running.log_mean == pytest.approx(-float(w @ x) + math.log(5), rel=1e-9)


def descend(weighted: bool, loss: Callable[[Tensor], float]) -> float:
    """The margin lost against the best on (1, 0) and (0, 3), one batch each, loss e^{−⟨w, x⟩}."""
    points = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    w = torch.tensor([0.5, 0.45], dtype=torch.float64)
    running = RunningSize() if weighted else None
    for step in range(3000):
        x = points[step % 2]
        relative_step(
            [w],
            [-x],
            step=0.02 * (1 / 40) ** (step / 3000),
            running=running,
            log_loss=loss(w @ x),
        )
    return 3 / math.sqrt(10) - float((points @ w).min() / w.norm())


def test_weights_take_the_bias_out_of_normalised_mini_batches() -> None:
    """The max-margin direction is (3, 1)/√10; steps of one length each end at (1, 1)/√2."""
    unweighted = descend(False, lambda margin: -float(margin))
    assert unweighted == pytest.approx(3 / math.sqrt(10) - 1 / math.sqrt(2), abs=1e-3)
    assert abs(descend(True, lambda margin: -float(margin))) < 3e-4
