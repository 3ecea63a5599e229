from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unit_oracles import laws, numerical_gradient, relative_error

from marginflow.errors import InputError, SpecificationError
from marginflow.norms import (
    as_exponent,
    dual_exponent,
    dual_vector,
    flat,
    norm_name,
    per_example_norm,
    project,
)

EXPONENTS = [1.0, 1.5, 2.0, 3.0, 10.0, math.inf]
DTYPES = [torch.float32, torch.float64]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
every_p = pytest.mark.parametrize("p", EXPONENTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def exact_norm(v: Tensor, p: float) -> np.ndarray:
    """``‖v_i‖_p`` in extended precision, the largest coordinate taken out."""
    rows = np.abs(flat(v).double().numpy().astype(np.longdouble))
    peak = rows.max(axis=1)
    if math.isinf(p):
        return peak
    ratio = rows / np.where(peak > 0, peak, 1)[:, None]
    return peak * (ratio ** np.longdouble(p)).sum(axis=1) ** (1 / np.longdouble(p))


# --- exponents


@pytest.mark.parametrize(
    ("given_p", "expected"),
    [
        *[("l1", 1.0), ("l2", 2.0), ("linf", math.inf), ("Linf", math.inf), ("2", 2.0)],
        *[("l1.5", 1.5), ("inf", math.inf), (1, 1.0), (2.5, 2.5), (math.inf, math.inf)],
    ],
)
def test_as_exponent(given_p: float | str, expected: float) -> None:
    assert as_exponent(given_p) == expected
    assert type(as_exponent(given_p)) is float


@pytest.mark.parametrize("word", ["", "l", "two", "ll2", "l2norm", "p=2"])
def test_as_exponent_of_another_word(word: str) -> None:
    with pytest.raises(SpecificationError, match="expected 'l1', 'l2', 'linf' or a number"):
        as_exponent(word)


@pytest.mark.parametrize("p", [0.5, 0, -1, -math.inf, math.nan, "0.99", "nan", None, True, [2]])
def test_as_exponent_of_what_is_no_norm(p: object) -> None:
    with pytest.raises(InputError, match="norm exponent p: expected"):
        as_exponent(p)  # type: ignore[arg-type]


def test_dual_exponents_of_the_usual_norms() -> None:
    assert dual_exponent(1.0) == math.inf
    assert dual_exponent(math.inf) == 1.0
    assert dual_exponent(2.0) == 2.0
    assert dual_exponent(1.5) == 3.0
    assert dual_exponent(4.0) == pytest.approx(4 / 3, rel=1e-15)


@laws
@given(st.floats(1.001, 1e3))
def test_dual_exponent_is_an_involution(p: float) -> None:
    q = dual_exponent(p)
    assert 1 / p + 1 / q == pytest.approx(1, abs=1e-15)
    # q − 1 = 1/(p − 1): what q loses near 1 comes back multiplied by p.
    assert dual_exponent(q) == pytest.approx(p, rel=4e-16 * (p + 1 / (p - 1)))


@laws
@given(st.one_of(st.floats(1, 1e6), st.sampled_from(EXPONENTS)))
def test_a_norms_name_is_its_exponent(p: float) -> None:
    assert as_exponent(norm_name(p)) == p


def test_names_of_norms() -> None:
    assert [norm_name(p) for p in (1.0, 1.5, 2.0, math.inf)] == ["l1", "l1.5", "l2", "linf"]


# --- norms


@every_p
@every_dtype
@pytest.mark.parametrize("shape", [(4,), (4, 9), (3, 2, 5, 5)])
def test_per_example_norm_is_numpys(p: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    v = gaussian(*shape, dtype=dtype)
    found = per_example_norm(v, p)
    assert found.dtype == torch.float64
    rows = v.numpy().astype(np.float64).reshape(shape[0], -1)
    expected = np.linalg.norm(rows, ord=p, axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=4e-15)


def test_norms_of_float32_neither_overflow_nor_underflow() -> None:
    for size in (3e38, 1e-44):
        v = torch.full((1, 4), size)
        assert per_example_norm(v, 2).item() == pytest.approx(2 * v[0, 0].item(), rel=1e-15)


@pytest.mark.parametrize("p", [1.5, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("size", [1e-200, 1e-6, 1.0, 1e200])
def test_norms_where_powers_leave_the_range_of_the_numbers(p: float, size: float) -> None:
    """(1e-6)^100 is 0 in float64, and 1e200³ is infinite; the norms are neither."""
    v = size * gaussian(5, 9)
    np.testing.assert_allclose(per_example_norm(v, p), exact_norm(v, p), rtol=1e-15)
    u = project(v, p, 0.5 * size)
    assert (exact_norm(u, p) <= 0.5 * size * (1 + 4 * EPS[torch.float64])).all()


def test_norm_of_examples_without_features() -> None:
    with pytest.raises(InputError, match="at least one feature"):
        per_example_norm(torch.zeros(3, 0), 2)


def test_flat() -> None:
    assert flat(torch.zeros(4)).shape == (4, 1)
    assert flat(torch.zeros(4, 2, 3)).shape == (4, 6)
    assert flat(torch.zeros(0, 2, 3)).shape == (0, 6)


# --- dual vectors


@every_p
@every_dtype
@pytest.mark.parametrize("shape", [(6,), (6, 11), (6, 2, 4, 4)])
def test_dual_vector_attains_the_dual_norm(
    p: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """``⟨d, g⟩ = ‖g‖_q`` and ``‖d‖_p = 1`` to 4 eps: by Hölder nothing in the ball does better."""
    g = gaussian(*shape, dtype=dtype)
    d = dual_vector(g, p)
    assert d.shape == g.shape
    assert d.dtype == dtype
    inner = (flat(d).double() * flat(g).double()).sum(1).numpy()
    rows = flat(g).double().numpy()
    best = np.linalg.norm(rows, ord=dual_exponent(p), axis=1)
    np.testing.assert_allclose(inner, best, rtol=4 * EPS[dtype])
    np.testing.assert_allclose(exact_norm(d, p).astype(float), 1, rtol=4 * EPS[dtype])


@every_dtype
@pytest.mark.parametrize("p", [1 + 1e-9, 1.0005, 1.005, 1.05, 50.0, 1e4, 1e300])
def test_dual_vector_at_extreme_exponents(p: float, dtype: torch.dtype) -> None:
    """q in the hundreds and beyond: |g|^q underflows unless the largest is taken out."""
    g = gaussian(5, 8, dtype=dtype)
    d = dual_vector(g, p)
    assert torch.isfinite(d).all()
    np.testing.assert_allclose(exact_norm(d, p).astype(float), 1, rtol=4 * EPS[dtype])
    inner = (d.double() * g.double()).sum(1).numpy()
    best = exact_norm(g, min(dual_exponent(p), 1e9)).astype(float)
    np.testing.assert_allclose(inner, best, rtol=8 * EPS[dtype])


def test_dual_vectors_by_hand() -> None:
    g = torch.tensor([[3.0, -4.0, 0.0]], dtype=torch.float64)
    assert dual_vector(g, math.inf).tolist() == [[1.0, -1.0, 0.0]]
    assert dual_vector(g, 1).tolist() == [[0.0, -1.0, 0.0]]
    assert dual_vector(g, 2).tolist() == [[0.6, -0.8, 0.0]]
    tie = torch.tensor([[0.0, -2.0, 2.0]], dtype=torch.float64)
    assert dual_vector(tie, 1).tolist() == [[0.0, -1.0, 0.0]]


@every_p
@every_dtype
def test_zero_rows(p: float, dtype: torch.dtype) -> None:
    g = gaussian(4, 6, dtype=dtype)
    expected = dual_vector(g, p)[[0, 2]]
    g[1], g[3] = 0.0, -0.0
    g.requires_grad_()
    d = dual_vector(g, p)
    assert not d[[1, 3]].any()
    assert torch.equal(d[[0, 2]], expected)
    (slope,) = torch.autograd.grad((d * torch.arange(6)).sum(), g, materialize_grads=True)
    assert torch.isfinite(slope).all()
    assert not slope[[1, 3]].any()


@every_p
@pytest.mark.parametrize(
    ("dtype", "powers"),
    [
        (torch.float64, [-1000, -537, -1, 1, 3, 900]),
        (torch.float32, [-110, -64, -1, 1, 3, 120]),
    ],
)
def test_powers_of_two_change_no_bit(p: float, dtype: torch.dtype, powers: list[int]) -> None:
    g = gaussian(5, 7, dtype=dtype)
    expected = dual_vector(g, p)
    for power in powers:
        scaled = torch.ldexp(g.double(), torch.tensor(power)).to(dtype)
        assert torch.equal(torch.ldexp(scaled.double(), torch.tensor(-power)).to(dtype), g)
        assert torch.equal(dual_vector(scaled, p), expected), power


@every_p
@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, -149), (torch.float64, -1074)])
def test_subnormal_gradients(p: float, dtype: torch.dtype, smallest: int) -> None:
    """Integers times the smallest subnormal number: the same direction as the integers."""
    g = torch.tensor([[3.0, -1.0, 0.0, 5.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = dual_vector(g.to(dtype), p)
    tiny = torch.tensor(
        [[math.ldexp(v, smallest) for v in row] for row in g.tolist()], dtype=torch.float64
    ).to(dtype)
    assert torch.equal(tiny != 0, g != 0)
    assert torch.equal(dual_vector(tiny, p), expected)


@every_p
@laws
@given(st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_dual_vector_does_not_see_a_positive_factor(p: float, a: float, seed: int) -> None:
    g = gaussian(3, 5, seed=seed)
    assert torch.allclose(dual_vector(a * g, p), dual_vector(g, p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, 10.0])
def test_derivative_against_finite_differences(p: float) -> None:
    g = gaussian(3, 4, seed=5)
    direction = gaussian(3, 4, seed=6)

    def value() -> float:
        return float((dual_vector(g, p) * direction).sum())

    expected = numerical_gradient(value, [g], h=1e-6)[0]
    leaf = g.clone().requires_grad_()
    (found,) = torch.autograd.grad((dual_vector(leaf, p) * direction).sum(), leaf)
    assert relative_error(found, expected) < 1e-8


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
def test_second_derivative_against_finite_differences(p: float) -> None:
    """ℓ2-PGD with the total derivative differentiates through directions of directions."""
    g = gaussian(1, 4, seed=8).requires_grad_()
    direction = gaussian(1, 4, seed=9)

    def slope(leaf: Tensor) -> Tensor:
        value = (dual_vector(leaf, p) * direction).sum()
        return torch.autograd.grad(value, leaf, create_graph=True)[0]

    (found,) = torch.autograd.grad((slope(g) * direction.flip(1)).sum(), g)
    probe = g.detach().clone().requires_grad_()
    expected = numerical_gradient(
        lambda: float((slope(probe) * direction.flip(1)).sum().detach()), [probe], h=1e-6
    )[0]
    assert relative_error(found, expected) < 1e-7


def test_derivatives_of_sign_and_of_the_largest_are_zero() -> None:
    for p in (1.0, math.inf):
        g = gaussian(2, 4).requires_grad_()
        d = dual_vector(g, p)
        if d.requires_grad:
            (slope,) = torch.autograd.grad(d.sum(), g)
            assert not slope.any()


def test_derivative_where_some_coordinates_are_zero() -> None:
    """q < 2 has an infinite slope of |g|^{q−1} at 0; these coordinates take no part."""
    g = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((dual_vector(g, 3.0) * torch.arange(3)).sum(), g)
    assert torch.isfinite(slope).all()


# --- projections

vectors = st.lists(
    st.lists(st.floats(-50, 50), min_size=4, max_size=4), min_size=1, max_size=3
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
radii = st.floats(1e-3, 30)


@every_p
@every_dtype
@laws
@given(vectors, radii)
def test_projection_lies_in_the_ball_and_is_idempotent(
    p: float, dtype: torch.dtype, v: Tensor, radius: float
) -> None:
    v = v.to(dtype)
    u = project(v, p, radius)
    # The factor and the product are rounded, and in float64 so is the norm itself.
    assert (exact_norm(u, p) <= radius * (1 + 4 * EPS[dtype])).all()
    again = project(u, p, radius)
    assert torch.allclose(again, u, rtol=4 * EPS[dtype], atol=0)
    inside = per_example_norm(v, p) <= radius
    assert torch.equal(u[inside], v[inside])


@pytest.mark.parametrize("p", [2.0, math.inf])
@laws
@given(vectors, radii)
def test_projection_is_the_nearest_point(p: float, v: Tensor, radius: float) -> None:
    """The certificate: u is nearest iff ``⟨v − u, w − u⟩ ≤ 0`` for all w in the ball.

    The largest ``⟨v − u, w⟩`` there is ``radius ‖v − u‖_q``.
    """
    u = project(v, p, radius)
    away = (v - u).numpy()
    largest = radius * np.linalg.norm(away, ord=dual_exponent(p), axis=1)
    gap = largest - (away * u.numpy()).sum(1)
    assert (gap <= 1e-12 * (1 + largest)).all()


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_projection_for_other_norms_is_radial(p: float) -> None:
    v = gaussian(5, 6) * 3
    u = project(v, p, 1.25)
    expected = v.numpy() * (1.25 / np.linalg.norm(v.numpy(), ord=p, axis=1))[:, None]
    np.testing.assert_allclose(u.numpy(), expected, rtol=1e-14)


@every_p
def test_projection_on_the_ball_of_radius_zero(p: float) -> None:
    v = gaussian(3, 4)
    v[1] = 0
    assert not project(v, p, 0.0).any()


@every_p
def test_projection_has_a_finite_derivative_at_zero(p: float) -> None:
    """δ⁰ = 0 is where every PGD with the total derivative begins."""
    v = torch.zeros((2, 3), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(project(v, p, 0.5).sum(), v)
    assert torch.equal(slope, torch.ones_like(v))


def test_derivative_of_the_l2_projection() -> None:
    v = gaussian(3, 4, seed=2) * 3
    direction = gaussian(3, 4, seed=3)
    expected = numerical_gradient(
        lambda: float((project(v, 2.0, 0.7) * direction).sum()), [v], h=1e-6
    )[0]
    leaf = v.clone().requires_grad_()
    (found,) = torch.autograd.grad((project(leaf, 2.0, 0.7) * direction).sum(), leaf)
    assert relative_error(found, expected) < 1e-8
