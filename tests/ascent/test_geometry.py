"""Norms, duals and directions against numpy's decompositions, brute force and max-margin programs."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import marginflow as mf
from marginflow.ascent import Adam, Geometry, get_geometry, steepest_step
from marginflow.errors import InputError, SpecificationError

NAMES = ("l1", "l2", "sign", "spectral")
SHAPES = ((5, 4), (3, 7), (6,), (1, 4), (4, 2, 3, 3), ())


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def matrices(parts: list[Tensor]) -> list[np.ndarray]:
    """A convolution kernel is a matrix (outputs, the rest), a vector has one row."""
    arrays = [p.double().numpy() for p in parts]
    return [a.reshape(1, -1) if a.ndim < 2 else a.reshape(len(a), -1) for a in arrays]


def singular(parts: list[Tensor]) -> list[np.ndarray]:
    return [np.linalg.svd(m, compute_uv=False) for m in matrices(parts)]


def flat(parts: list[Tensor]) -> np.ndarray:
    return np.concatenate([m.ravel() for m in matrices(parts)])


NORM = {
    "l1": lambda w: np.abs(flat(w)).sum(),
    "l2": lambda w: math.sqrt((flat(w) ** 2).sum()),
    "sign": lambda w: np.abs(flat(w)).max(),
    "spectral": lambda w: max(s.max() for s in singular(w)),
}
DUAL = {
    "l1": NORM["sign"],
    "l2": NORM["l2"],
    "sign": NORM["l1"],
    "spectral": lambda g: sum(s.sum() for s in singular(g)),
}


def inner(one: list[Tensor] | tuple[Tensor, ...], other: list[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_contract(name: str, dtype: torch.dtype, close: float) -> None:
    """``⟨V, G⟩ = ‖G‖_*`` and ``‖V‖ = 1``, with numpy's norms."""
    geometry, g = get_geometry(name), tensors(dtype=dtype)
    assert geometry.norm(g) == pytest.approx(NORM[name](g), rel=1e-13)
    assert geometry.dual_norm(g) == pytest.approx(DUAL[name](g), rel=1e-13)
    v = geometry.direction(g)
    assert [a.shape for a in v] == [a.shape for a in g]
    assert {a.dtype for a in v} == {dtype}
    assert inner(v, g) == pytest.approx(DUAL[name](g), rel=close)
    assert NORM[name](list(v)) == pytest.approx(1.0, rel=close)


@pytest.mark.parametrize("name", NAMES)
def test_hoelder_for_random_pairs(name: str) -> None:
    geometry, g = get_geometry(name), tensors()
    for seed in range(1, 40):
        w = tensors(seed)
        assert inner(w, g) <= geometry.norm(w) * geometry.dual_norm(g) * (1 + 1e-13)


def test_the_spectral_direction_by_brute_force() -> None:
    """Extreme points of the ball of 2 × 2 matrices are rotations and reflections."""
    g = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    angles = np.linspace(0, 2 * np.pi, 20001)
    c, s = np.cos(angles), np.sin(angles)
    (a, b), (e, d) = g.tolist()
    rotations = c * a - s * b + s * e + c * d
    reflections = c * a + s * b + s * e - c * d
    best = max(rotations.max(), reflections.max())
    spectral = get_geometry("spectral")
    assert spectral.dual_norm([g]) == pytest.approx(best, rel=1e-7)
    assert inner(spectral.direction([g]), [g]) == pytest.approx(best, rel=1e-7)


def test_the_spectral_direction_of_little_rank_leaves_the_rest_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(s, generator=generator).double() for s in ((6, 2), (2, 5)))
    g = left @ right
    (v,) = get_geometry("spectral").direction([g])
    assert torch.linalg.matrix_rank(v) == 2
    outside = torch.eye(5, dtype=torch.float64) - torch.linalg.pinv(g, rtol=1e-10) @ g
    assert float((v @ outside).abs().max()) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_the_gradient_changes_no_bit(name: str) -> None:
    """Also where squares of the entries are no numbers."""
    geometry, g = get_geometry(name), tensors()
    v = geometry.direction(g)
    for scale in (2.0**-900, 2.0**-7, 2.0**900):
        again = geometry.direction([scale * a for a in g])
        assert all(torch.equal(a, b) for a, b in zip(v, again, strict=True))
        assert geometry.dual_norm([scale * a for a in g]) == pytest.approx(
            scale * geometry.dual_norm(g), rel=1e-13
        )
        assert geometry.norm([scale * a for a in g]) == pytest.approx(
            scale * geometry.norm(g), rel=1e-13
        )


@pytest.mark.parametrize("name", [*NAMES, "adam"])
def test_no_gradient_no_direction(name: str) -> None:
    geometry = get_geometry(name)
    zeros = [torch.zeros(s) for s in SHAPES]
    assert not any(bool(v.any()) for v in geometry.direction(zeros))
    assert geometry.norm(zeros) == geometry.dual_norm(zeros) == 0
    some = [torch.zeros(2, 3), torch.ones(2)]
    first, second = get_geometry(name).direction(some)
    assert not bool(first.any())
    assert bool(second.any())
    with pytest.raises(InputError, match="expected at least one tensor"):
        geometry.direction([])


# The margin in a norm


@pytest.mark.parametrize("name", NAMES)
def test_a_multiple_of_all_weights_has_the_same_margin(name: str) -> None:
    """Degrees 2 and 1: the second layer is linear behind squared ReLU."""
    data = mf.load("separable:n=12,d=4,margin=0.2,seed=0")
    model = mf.models.mlp(4, 5, 1, activation="squared-relu", seed=0).double()
    geometry, order = get_geometry(name), mf.measure_homogeneity(model, data.x).order
    assert order == 3

    def value() -> float:
        margin = mf.adversarial_margins(model, data.x, data.y).min
        return geometry.normalized_margin(list(model.parameters()), margin, order)

    before = value()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    assert value() == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("name", ["sign", "spectral"])
def test_norms_that_are_maxima_gain_by_layers_of_the_same_norm(name: str) -> None:
    """Then ``m/‖W‖^K`` is ``m/Π ‖W_k‖^{c_k}``, which it never exceeds."""
    geometry, degrees = get_geometry(name), (2.0, 1.0)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        layers = [torch.randn(5, 4, generator=generator), torch.randn(1, 5, generator=generator)]
        norms = [geometry.norm([w]) for w in layers]
        product = math.prod(n**c for n, c in zip(norms, degrees, strict=True))
        largest = max(norms)
        raised = math.prod((largest / n) ** c for n, c in zip(norms, degrees, strict=True))
        equal = [w * (largest / n) for w, n in zip(layers, norms, strict=True)]
        assert geometry.normalized_margin(layers, 1.0, 3) <= 1 / product
        assert geometry.normalized_margin(equal, raised, 3) == pytest.approx(1 / product, rel=1e-6)


def test_no_weights_no_margin() -> None:
    with pytest.raises(InputError, match="not all 0"):
        get_geometry("l2").normalized_margin([torch.zeros(3)], 1.0, 2.0)
    assert (
        get_geometry("l2").normalized_margin([torch.tensor([1e200], dtype=torch.float64)], 1.0, 2.0)
        == 0.0
    )


# Max-margin problems of one layer


def separable() -> tuple[np.ndarray, np.ndarray]:
    data = mf.load("separable:n=15,d=6,margin=0.3,seed=4")
    return data.x.numpy(), data.y.numpy()


@pytest.mark.parametrize(
    ("name", "p", "share"), [("l2", 2.0, 0.99), ("sign", 1.0, 0.99), ("l1", math.inf, 0.97)]
)
def test_one_layer_tends_to_the_largest_margin_in_its_norm(
    name: str, p: float, share: float
) -> None:
    """``max min_i y_i⟨w, x_i⟩/‖w‖`` is the margin in the dual distance: for signs that of ℓ1.

    With steps of length τ the gap is of the order ``τ + ln n/(Tτ)``. The max-margin directions of the other
    norms are farther from it.
    """
    x, y = separable()
    best = mf.references.max_margin(x, y, p=p).margin
    z = torch.from_numpy(x * y[:, None])
    w = torch.zeros(1, 6, dtype=torch.float64)
    geometry = get_geometry(name)
    for _ in range(8000):
        g = torch.softmax(-(z @ w[0]), dim=0) @ z
        w += 0.02 * geometry.direction([g.unsqueeze(0)])[0]
    reached = geometry.normalized_margin([w], float((z @ w[0]).min()), 1.0)
    print(f"\n{name}: {reached:.5f} of {best:.5f}")
    assert share * best <= reached <= best * (1 + 1e-9)
    for q in {1.0, 2.0, math.inf} - {p}:
        u = torch.from_numpy(mf.references.max_margin(x, y, p=q).direction.copy())
        assert geometry.normalized_margin([u], float((z @ u).min()), 1.0) < reached


def test_several_outputs_tend_to_the_largest_spectral_margin() -> None:
    """Against the semidefinite program ``max t: ⟨W, (e_y − e_j) x_iᵀ⟩ ≥ t, ‖W‖₂ ≤ 1``."""
    import cvxpy as cp

    generator = np.random.default_rng(2)
    centers = 2.0 * generator.standard_normal((3, 5))
    labels = np.arange(18) % 3
    x = centers[labels] + 0.5 * generator.standard_normal((18, 5))
    apart = np.eye(3)[labels][:, None] - np.eye(3)[None]
    pairs = np.stack(
        [np.outer(apart[i, j], x[i]) for i in range(18) for j in range(3) if j != labels[i]]
    )
    variable, t = cp.Variable((3, 5)), cp.Variable()
    constraints = [cp.sigma_max(variable) <= 1] + [
        cp.sum(cp.multiply(a, variable)) >= t for a in pairs
    ]
    best = float(cp.Problem(cp.Maximize(t), constraints).solve(solver=cp.CLARABEL))

    rows = torch.from_numpy(pairs.reshape(len(pairs), -1))
    w = torch.zeros(3, 5, dtype=torch.float64)
    spectral, tau, steps = get_geometry("spectral"), 0.02, 4000
    for _ in range(steps):
        g = (torch.softmax(-(rows @ w.reshape(-1)), dim=0) @ rows).reshape(3, 5)
        w += tau * spectral.direction([g])[0]
    reached = spectral.normalized_margin([w], float((rows @ w.reshape(-1)).min()), 1.0)
    print(f"\nspectral: {reached:.5f} of {best:.5f}")
    assert best > 0.5
    assert 0.95 * best <= reached <= best * (1 + 1e-6)


# Steps


@pytest.mark.parametrize("name", NAMES)
def test_a_relative_step_has_the_length_asked_for(name: str) -> None:
    geometry, w, g = get_geometry(name), tensors(1), tensors(2)
    before = [a.clone() for a in w]
    steepest_step(w, g, name, 0.01)
    moved = [a - b for a, b in zip(w, before, strict=True)]
    size = NORM[name](before)
    assert NORM[name](moved) == pytest.approx(0.01 * size, rel=1e-12)
    assert inner(moved, g) == pytest.approx(-0.01 * size * geometry.dual_norm(g), rel=1e-12)


def test_the_steepest_flow_of_l2_is_gradient_descent() -> None:
    w, g = tensors(1), tensors(2)
    expected = [a - 0.3 * b for a, b in zip(w, g, strict=True)]
    steepest_step(w, g, "l2", 0.3, relative=False)
    assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(w, expected, strict=True))


def test_what_a_step_refuses() -> None:
    w, g = tensors(1), tensors(2)
    with pytest.raises(SpecificationError, match="did you mean 'spectral'"):
        steepest_step(w, g, "spectrum", 0.1)
    with pytest.raises(InputError, match="above 0"):
        steepest_step(w, g, "l2", 0.0)
    with pytest.raises(InputError, match="one gradient of the same shape"):
        steepest_step(w, g[:-1], "l2", 0.1)
    with pytest.raises(InputError, match="expected an object for adam"):
        steepest_step(w, g, "adam", 0.1)
    for name in NAMES:
        with pytest.raises(InputError, match="expected finite weights and gradients"):
            steepest_step([torch.ones(2, 2)], [torch.full((2, 2), math.nan)], name, 0.1)
    with pytest.raises(InputError, match=r"two numbers in \[0, 1\)"):
        Adam((0.9, 1.0))


# Adam


def naive_adam(gradients: list[float], betas: tuple[float, float]) -> float:
    """``m̂/√v̂`` by the textbook, written out as sums."""
    first, second = betas
    count = len(gradients)
    ages = range(count - 1, -1, -1)
    mean = sum((1 - first) * first**age * g for age, g in zip(ages, gradients, strict=True))
    square = sum((1 - second) * second**age * g**2 for age, g in zip(ages, gradients, strict=True))
    return (mean / (1 - first**count)) / math.sqrt(square / (1 - second**count))


def test_adam_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = [torch.randn(3, dtype=torch.float64, generator=generator) for _ in range(7)]
    rule = Adam((0.8, 0.95))
    for g in seen:
        (v,) = rule.direction([g])
    expected = [naive_adam([float(g[i]) for g in seen], (0.8, 0.95)) for i in range(3)]
    assert v.tolist() == pytest.approx(expected, rel=1e-12)


def test_adam_without_memory_takes_signs() -> None:
    rule, sign = Adam((0.0, 0.0)), get_geometry("sign")
    for seed in range(3):
        g = tensors(seed, torch.float32)
        g[0][0, 0] = 0.0
        g[1][0, 0] = 1e-38
        for a, b in zip(rule.direction(g), sign.direction(g), strict=True):
            assert torch.allclose(a, b, rtol=1e-6)
    assert rule.norm(g) == sign.norm(g)
    assert rule.dual_norm(g) == sign.dual_norm(g)


def test_adam_goes_on_from_its_state() -> None:
    one, other = Adam(), Adam()
    assert one.state() == {}
    other.restore({})
    for seed in range(3):
        one.direction(tensors(seed))
    state = one.state()
    other.restore(state)
    state["mean.0"].zero_()  # a copy
    for seed in (3, 4):
        left, right = one.direction(tensors(seed)), other.direction(tensors(seed))
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_names() -> None:
    for name in (*NAMES, "adam"):
        geometry = get_geometry(name)
        assert isinstance(geometry, Geometry)
        assert geometry.name == name
        assert get_geometry(geometry) is geometry


def test_adam_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch\nfrom marginflow.ascent import Adam\n"
        "Adam().direction([torch.ones(2)])\n"
        "print({'torch._dynamo', 'sympy', 'scipy'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
