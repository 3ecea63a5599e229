"""Alignment against numpy's SVD, and its small gaps against exact matrices and 60 digits."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.alignment import (
    Alignment,
    angle,
    balances,
    matrices_along,
    measure_alignment,
    sine_squared,
)
from marginflow.errors import InputError, ModelError, RunError

ULP = float(np.finfo(float).eps)


def layers_of(*widths: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = zip(widths[1:], widths[:-1], strict=True)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn((size, size), generator=generator, dtype=torch.float64))[0]


def exactly(w: Tensor) -> mpmath.matrix:
    return mpmath.matrix(w.tolist())


def exact_singular_values(w: mpmath.matrix) -> list[mpmath.mpf]:
    values = mpmath.svd_r(w if w.rows <= w.cols else w.T, compute_uv=False)
    return sorted(values, reverse=True)


def exact_frobenius(w: mpmath.matrix) -> mpmath.mpf:
    return mpmath.sqrt(mpmath.fsum(entry**2 for entry in w))


# Everything, against numpy


@pytest.mark.parametrize("widths", [(6, 5, 4, 1), (3, 7, 2, 5, 1), (4, 1), (5, 6, 3)])
def test_every_number_is_numpys(widths: tuple[int, ...]) -> None:
    layers = layers_of(*widths)
    found = measure_alignment(layers)
    svds = [np.linalg.svd(w.numpy()) for w in layers]
    np.testing.assert_allclose(found.frobenius, [np.linalg.norm(w) for w in layers], rtol=1e-14)
    np.testing.assert_allclose(found.spectral, [s[0] for _, s, _ in svds], rtol=1e-13)
    for k, (u, _, vh) in enumerate(svds):
        assert abs(abs(u[:, 0] @ found.left[k].numpy()) - 1) < 1e-13
        assert abs(abs(vh[0] @ found.right[k].numpy()) - 1) < 1e-13
        assert np.allclose(
            layers[k].numpy() @ found.right[k].numpy(),
            float(found.spectral[k]) * found.left[k].numpy(),
            rtol=1e-12,
            atol=1e-13,
        )
    ratios = np.array([s[0] / np.linalg.norm(s) for _, s, _ in svds])
    np.testing.assert_allclose(found.ratios, ratios, rtol=1e-13)
    np.testing.assert_allclose(found.rank_one_gaps, 1 - ratios**2, rtol=1e-12, atol=1e-15)
    cosines = [abs(below[0][:, 0] @ above[2][0]) for below, above in pairwise(svds)]
    np.testing.assert_allclose(found.neighbours, cosines, rtol=1e-12)
    np.testing.assert_allclose(found.neighbour_gaps, 1 - np.square(cosines), rtol=1e-11)
    product = reduce(lambda below, above: above @ below, [w.numpy() for w in layers])
    np.testing.assert_allclose(found.product, product, rtol=1e-12, atol=1e-13)
    whole = np.linalg.norm(product, 2) / np.prod([np.linalg.norm(w) for w in layers])
    assert found.product_ratio == pytest.approx(whole, rel=1e-12)
    assert found.product_gap == pytest.approx(1 - whole, rel=1e-12, abs=1e-15)
    for found_balance, below, above in zip(found.balances, layers[:-1], layers[1:], strict=True):
        by_hand = above.numpy().T @ above.numpy() - below.numpy() @ below.numpy().T
        np.testing.assert_allclose(found_balance, by_hand, rtol=1e-13, atol=1e-13)
        assert found_balance.shape == (below.shape[0], below.shape[0])


def test_a_module_and_its_matrices_are_the_same() -> None:
    model = mf.models.deep_linear(6, 5, 4, 1, seed=3).double()
    matrices = tuple(p.detach() for p in model.parameters())
    one, other = measure_alignment(model), measure_alignment(matrices)
    for name in ("frobenius", "spectral", "rank_one_gaps", "neighbour_gaps", "product"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.product_gap == other.product_gap
    # float32 weights are measured in float64, not the other way round
    single = measure_alignment(mf.models.deep_linear(6, 5, 4, 1, seed=3))
    assert single.frobenius.dtype == torch.float64


def test_one_layer_has_no_neighbours() -> None:
    found = measure_alignment(layers_of(4, 1))
    assert found.neighbours.shape == found.neighbour_gaps.shape == (0,)
    assert found.balances == ()
    assert float(found.rank_one_gaps[0]) == 0.0
    assert found.product_gap == pytest.approx(0.0, abs=1e-31)


# Gaps without cancellation


@pytest.mark.parametrize("small", [1e-2, 1e-5, 1e-9, 1e-12])
def test_a_rank_one_gap_of_exact_matrices_has_all_its_digits(small: float) -> None:
    """Diagonals, permuted and with signs: nothing is rounded, so nothing may be lost."""
    w = torch.zeros(5, 4, dtype=torch.float64)
    w[2, 1], w[0, 3], w[4, 0] = -1.0, small, small / 2
    found = float(measure_alignment((w,)).rank_one_gaps[0])
    tail = mpmath.mpf(small) ** 2 * mpmath.mpf("1.25")
    assert found == pytest.approx(float(tail / (1 + tail)), rel=1e-10)
    print(f"\nσ2/σ1 = {small:g}: rank-one gap {found:.17g}")


@pytest.mark.parametrize("small", [1e-2, 1e-4, 1e-6, 1e-9])
def test_a_rank_one_gap_of_any_matrix_is_as_good_as_its_entries(small: float) -> None:
    """An ulp of σ1 in the entries is one of σ1/σ2 ulps of σ2: no method can know more."""
    sizes = torch.tensor([1.0, small, small / 3, 0.0], dtype=torch.float64)
    w = rotation(5, 1)[:, :4] @ torch.diag(sizes) @ rotation(4, 2)
    found = float(measure_alignment((w,)).rank_one_gaps[0])
    with mpmath.workdps(60):
        first, *rest = exact_singular_values(exactly(w))
        tail = mpmath.fsum(s**2 for s in rest)
        expected = tail / (first**2 + tail)
        error = float(abs(found / expected - 1))
    print(f"\nσ2/σ1 = {small:g}: relative error {error:.1e}")
    assert error < 20 * ULP / small
    naive = 1 - float(torch.linalg.matrix_norm(w, 2) / torch.linalg.matrix_norm(w)) ** 2
    if small <= 1e-9:
        assert naive == 0 or abs(naive / float(expected) - 1) > 0.5  # what subtraction gives


@pytest.mark.parametrize("tilt", [1e-3, 1e-7, 1e-10])
def test_a_neighbour_gap_is_the_squared_sine(tilt: float) -> None:
    v = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    below = torch.outer(torch.tensor([1.0, tilt], dtype=torch.float64), v) * 3
    above = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    found = float(measure_alignment((below, above)).neighbour_gaps[0])
    # the singular vector itself is known to an ulp
    assert found == pytest.approx(math.sin(math.atan(tilt)) ** 2, rel=max(1e-12, 10 * ULP / tilt))


@pytest.mark.parametrize("tilt", [1e-2, 1e-5, 1e-10, 1e-14])
def test_sine_squared_of_exact_vectors_has_all_its_digits(tilt: float) -> None:
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0, 0.0], [1.0, tilt, 0.0]))
    expected = float(mpmath.mpf(tilt) ** 2 / (1 + mpmath.mpf(tilt) ** 2))
    assert sine_squared(a, b) == pytest.approx(expected, rel=1e-14)
    assert sine_squared(b, a) == pytest.approx(expected, rel=1e-6)
    assert sine_squared(-3 * a, 7 * b) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("tilt", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize("size", [3, 40])
def test_sine_squared_of_any_vectors(tilt: float, size: int) -> None:
    turn = rotation(size, 5)
    a, b = turn[0], 2 * (turn[0] + tilt * turn[1])
    with mpmath.workdps(60):
        x, y = exactly(a.unsqueeze(0)), exactly(b.unsqueeze(0))
        dot = mpmath.fsum(p * q for p, q in zip(x, y, strict=True))
        expected = 1 - dot**2 / (exact_frobenius(x) ** 2 * exact_frobenius(y) ** 2)
    found = sine_squared(a, b)
    assert abs(found / float(expected) - 1) < 20 * ULP / tilt
    if tilt == 1e-10:
        assert found == pytest.approx(1e-20, rel=1e-5)


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_product_gap_in_sixty_digits(noise: float, outputs: int) -> None:
    """Rank-one layers in line, plus noise: the gap is about noise², from 1 down to 1e-18."""
    widths = (6, 5, 4, outputs)
    turns = [rotation(size, seed)[0] for seed, size in enumerate(widths)]
    layers = tuple(
        3 * torch.outer(turns[k + 1], turns[k]) + noise * w / 10
        for k, w in enumerate(layers_of(*widths, seed=8))
    )
    found = measure_alignment(layers).product_gap
    with mpmath.workdps(60):
        exact = [exactly(w) for w in layers]
        product = exact[2] * exact[1] * exact[0]
        sizes = mpmath.fprod(exact_frobenius(w) for w in exact)
        expected = 1 - exact_singular_values(product)[0] / sizes
        error = float(abs(found / expected - 1))
    print(f"\nproduct gap {found:.3g}: relative error {error:.1e}")
    assert error < max(1e-13, 40 * ULP / math.sqrt(found))


@pytest.mark.parametrize("small", [0.0, 1e-8, 1e-3])
def test_the_product_gap_of_layers_out_of_line(small: float) -> None:
    """W_2 sees only what W_1 makes small, or nothing."""
    below = torch.tensor([[1.0, 0.0], [0.0, small]], dtype=torch.float64)
    above = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    found = measure_alignment((below, above))
    expected = small / math.hypot(1.0, small)
    assert found.product_gap == pytest.approx(1 - expected, abs=1e-15)
    assert found.product_ratio == pytest.approx(expected, abs=1e-15)


# Angles


@pytest.mark.parametrize("tilt", [0.5, 1e-4, 1e-8, 1e-12, 1e-15])
def test_small_and_nearly_flat_angles(tilt: float) -> None:
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0], [1.0, tilt]))
    expected = float(mpmath.atan(mpmath.mpf(tilt)))
    assert angle(a, b) == pytest.approx(expected, rel=1e-14)
    assert angle(b, a) == angle(a, b)
    assert angle(2 * a, 5 * b) == pytest.approx(expected, rel=1e-14)
    assert math.pi - expected == pytest.approx(angle(a, -b), abs=5e-16)
    # where arccos is blind
    if tilt <= 1e-8:
        assert math.acos(min(1.0, float(a @ b / torch.linalg.vector_norm(b)))) != expected


def test_angles_of_any_vectors_in_sixty_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    with mpmath.workdps(60):
        for closeness in (0.0, 1.0, 1e3, 1e6, -1e6):
            a, c = torch.randn((2, 9), generator=generator, dtype=torch.float64)
            b = closeness * a + c
            x, y = exactly(a.unsqueeze(0)), exactly(b.unsqueeze(0))
            dot = mpmath.fsum(p * q for p, q in zip(x, y, strict=True))
            expected = mpmath.acos(dot / (exact_frobenius(x) * exact_frobenius(y)))
            assert float(abs(angle(a, b) - expected)) < 1e-15


def test_angles_at_the_ends() -> None:
    a = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert angle(a, a) == 0.0
    assert angle(a, -a) == math.pi
    assert angle(a, torch.tensor([4.0, 3.0], dtype=torch.float64)) == pytest.approx(
        math.pi / 2, rel=1e-15
    )


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_lengths_do_not_matter(scale: float) -> None:
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0], [1.0, 1e-6]))
    assert angle(scale * a, b) == pytest.approx(angle(a, b), rel=1e-12)
    assert sine_squared(scale * a, scale * b) == pytest.approx(sine_squared(a, b), rel=1e-12)


def test_the_angle_of_the_product_and_of_the_first_layer() -> None:
    layers = layers_of(6, 4, 1, seed=2)
    found = measure_alignment(layers)
    u = rotation(6, 3)[0]
    product = (layers[1] @ layers[0])[0]
    cosine = float(product @ u / torch.linalg.vector_norm(product))
    assert found.angle_to(u) == pytest.approx(math.acos(cosine), rel=1e-12)
    v = np.linalg.svd(layers[0].numpy())[2][0]
    assert found.first_layer_gap(u) == pytest.approx(1 - (v @ u.numpy()) ** 2, rel=1e-11)


# Refusals


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def tied() -> nn.Module:
    layer = nn.Linear(4, 4, bias=False)
    return nn.Sequential(layer, layer, nn.Linear(4, 1, bias=False))


def tied_weights() -> nn.Module:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, second)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1, bias=False)), "'0' has a bias"),
        (mf.models.mlp(4, 3, 1, seed=0), "expected a deep linear network.*ReLU"),
        (mf.models.cnn((1, 8, 8), 1, seed=0), "Conv2d"),
        (mf.models.diagonal_linear(4, 2, seed=0), "Diagonal"),
        (mf.models.conv_linear(4, 2, seed=0), "CircularConvolution"),
        (nn.Sequential(nn.Flatten()), "no linear layer"),
        (
            nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(2, 1, bias=False)),
            "do not fit each other",
        ),
        (tied(), "'1' shares its weights"),
        (tied_weights(), "'1' shares its weights"),
        (Residual(nn.Linear(4, 4, bias=False)), "Residual"),
    ],
)
def test_other_networks_are_refused(model: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        measure_alignment(model)


def test_a_zero_layer_has_no_direction() -> None:
    first, second = layers_of(4, 3, 1)
    with pytest.raises(ModelError, match="layer 2 is 0"):
        measure_alignment((first, 0 * second))


def test_other_sizes_zeros_and_several_outputs_are_refused() -> None:
    found: Alignment = measure_alignment(layers_of(4, 3, 1))
    for call in (found.angle_to, found.first_layer_gap):
        with pytest.raises(InputError, match="one size"):
            call(torch.ones(5))
        with pytest.raises(InputError, match="zero vector"):
            call(torch.zeros(4))
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="not finite"):
            angle(torch.ones(2), torch.tensor([1.0, bad]))
    with pytest.raises(ModelError, match="one output, got 2"):
        measure_alignment(layers_of(4, 3, 2)).angle_to(torch.ones(4))


def test_balances_of_a_balanced_network_vanish() -> None:
    u, v = rotation(5, 0)[0], rotation(4, 1)[0]
    below, above = torch.outer(u, v) * 2, u.unsqueeze(0) * 2
    assert float(balances((below, above))[0].abs().max()) < 1e-14


# Along a run


def test_the_matrices_along_a_run_are_those_of_the_network() -> None:
    model = mf.models.deep_linear(6, 5, 4, 1, seed=3).double()
    start = [p.detach().clone() for p in model.parameters()]
    run = mf.train(model, "separable:n=8,d=6,margin=0.3", lr=0.1, epochs=5)
    along = matrices_along(run)
    assert list(along) == [0, 1, 2, 3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(along[0], start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(along[5], model.parameters(), strict=True))
    with pytest.raises(RunError, match="keep_weights=True"):
        matrices_along(
            mf.train("mlp:3", "separable:n=8,d=6,margin=0.3", epochs=2, keep_weights=False)
        )
