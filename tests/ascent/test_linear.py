"""maximize_linear against the convex oracles, closed forms and naive loops of its recursions."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import marginflow as mf
from marginflow.ascent import LinearMaximum, LinearPoint, exact_budget, maximize_linear
from marginflow.ascent._linear_result import fitted_rate
from marginflow.ascent._nearest import NearestInBall
from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear, FiniteSet
from marginflow.errors import DataError, InputError, SpecificationError
from marginflow.references import largest_feasible_eps, max_margin, robust_svm

Array = NDArray[np.float64]
EXPONENTS = [1.0, 1.5, 2.0, 3.0, math.inf]
every_p = pytest.mark.parametrize("p", EXPONENTS)
laws = settings(max_examples=40, deadline=None, derandomize=True)


def problem(seed: int, n: int = 40, d: int = 15, push: float = 0.3) -> tuple[Array, Array]:
    """Normal inputs, moved away from a random hyperplane through the origin."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    normal = rng.normal(size=d)
    y = np.where(x @ normal > 0.0, 1.0, -1.0)
    return x + push * y[:, None] * normal, y


def dual(p: float) -> float:
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def check_certificate(x: Array, y: Array, found: LinearMaximum) -> None:
    """Both sides from their definitions, one example at a time; α and δ are admissible."""
    u = found.direction.numpy()
    margins = [yi * float(np.dot(xi, u)) for xi, yi in zip(x, y, strict=True)]
    scale = float(np.linalg.norm(x, axis=1).max())
    rounding = 1e-14 * scale
    assert np.linalg.norm(u) == pytest.approx(1, abs=1e-12)
    margin = min(margins) - found.eps * np.linalg.norm(u, dual(found.p))
    assert found.margin == pytest.approx(margin, abs=rounding)
    alpha, delta = found.multipliers.numpy(), found.perturbation.numpy()
    assert alpha.min() >= 0
    assert alpha.sum() == pytest.approx(1, abs=1e-12)
    assert np.linalg.norm(delta, found.p) <= found.eps * (1 + 1e-14)
    bound = np.linalg.norm(alpha @ (y[:, None] * x) - delta)
    assert found.bound == pytest.approx(bound, abs=rounding)
    assert found.gap >= -rounding


# --- the oracles


@pytest.mark.parametrize(
    ("p", "share"), [(2.0, 0.0), *((p, 0.5) for p in EXPONENTS), (1.0, 0.9), (math.inf, 0.9)]
)
def test_gap_of_1e_10_against_the_oracles(p: float, share: float) -> None:
    x, y = problem(0)
    eps = share * largest_feasible_eps(x, y, p=p)
    oracle = robust_svm(x, y, eps, p=p)
    best = oracle.margin if eps else max_margin(x, y).margin
    begin = time.process_time()
    found = maximize_linear(x, y, eps=eps, p=p, gap=1e-10)
    seconds = time.process_time() - begin
    steps = [next(q.step for q in found.path if q.bound - q.margin < g) for g in (1e-2, 1e-4, 1e-6)]
    print(
        f"\n40x15, l{p:g}, eps = {eps:.4f}: margin {found.margin:.10f}, gap {found.gap:.1e}, "
        f"from the oracle {best - found.margin:+.1e}; {found.steps} steps, {seconds:.2f} s; "
        f"gap of 1e-2, 1e-4, 1e-6 by {steps}; fitted exponent {found.rate:.2f}"
    )
    check_certificate(x, y, found)
    assert found.converged
    assert found.separable
    assert not found.advice
    assert found.gap < 1e-9
    assert steps[-1] < 3000
    slack = oracle.gap * oracle.dual_value + 1e-13
    assert found.bound >= best - slack
    assert best - slack - found.gap <= found.margin <= best + slack
    cosine = float(found.direction.numpy() @ oracle.direction)
    assert cosine >= math.cos(found.angle_bound + oracle.angle_bound)
    weights = found.weights.numpy()
    assert np.linalg.norm(weights - oracle.weights) < 1e-3 * np.linalg.norm(oracle.weights)
    level = (y * (x @ weights)).min() - eps * np.linalg.norm(weights, dual(p))
    assert level == pytest.approx(1, rel=1e-12)


@every_p
def test_closed_form_of_scaled_axes(p: float) -> None:
    """z_j = a_j e_j: every example has the least margin, w = (1/a)/(1 − ε‖1/a‖_q)."""
    a = np.array([0.7, 2.0, 5.0, 1.1])
    y = np.array([1.0, -1.0, -1.0, 1.0])
    size = np.linalg.norm(1 / a, dual(p))
    for share in (0.0, 0.5, 0.9):
        found = maximize_linear(np.diag(a * y), y, eps=share / size, p=p, gap=1e-12)
        assert found.converged
        w = found.weights.numpy()
        np.testing.assert_allclose(w, 1 / a / (1 - share), rtol=1e-5)
        margin = (1 - share) / np.linalg.norm(1 / a)
        assert found.margin == pytest.approx(margin, rel=1e-11)


@laws
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 12),
    d=st.integers(1, 6),
    p=st.sampled_from([1.0, 2.0, math.inf]),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    method=st.sampled_from(["dual", "published", "normalized"]),
    steps=st.integers(1, 300),
)
def test_the_maximum_lies_between_margin_and_bound(
    seed: int, n: int, d: int, p: float, share: float, method: str, steps: int
) -> None:
    x, y = problem(seed, n, d)
    eps = share * max_margin(x, y, p=p).margin
    found = maximize_linear(
        x,
        y,
        eps=eps,
        p=p,
        method="dual" if method == "published" else method,
        adaptive=method == "dual",
        steps=steps,
    )
    check_certificate(x, y, found)
    oracle = robust_svm(x, y, eps, p=p)
    assert found.margin <= oracle.dual_value * (1 + 1e-12)
    assert found.bound >= oracle.margin * (1 - 1e-12)
    assert found.steps <= steps
    assert [q.step for q in found.path] == sorted({q.step for q in found.path})
    for before, after in zip(found.path, found.path[1:], strict=False):
        assert before.margin <= after.margin
        assert before.bound >= after.bound


# --- the recursions and their rates


def published_loop(z: Array, steps: int) -> list[tuple[float, float]]:
    """Ji, Srebro & Telgarsky's recursion as printed: best margin and best bound after t steps."""
    z = z / np.linalg.norm(z, axis=1).max()
    w, u = np.zeros(z.shape[1]), np.zeros(z.shape[1])
    best, bound, seen = -math.inf, math.inf, []
    for t in range(steps + 1):
        e = np.exp(-(z @ w) + (z @ w).min())
        g = -(e / e.sum()) @ z
        u = t / (t + 1) * (u + g)
        bound = min(bound, float(np.linalg.norm(g if t == 0 else 2 * u / t)))
        if t > 0:
            best = max(best, float((z @ w).min() / np.linalg.norm(w)))
        seen.append((best, bound))
        w = w - (u + g)
    return seen


def test_clean_dual_acceleration_is_the_published_recursion() -> None:
    x, y = problem(1)
    scale = np.linalg.norm(x, axis=1).max()
    loop = published_loop(y[:, None] * x, 400)
    found = maximize_linear(x, y, adaptive=False, steps=400, gap=0.0)
    assert found.path[-1].step == 400
    for step, margin, bound in found.path:
        assert margin / scale == pytest.approx(loop[step][0], rel=1e-10)
        assert bound / scale == pytest.approx(loop[step][1], rel=1e-10)


@every_p
def test_normalised_descent_is_adversarial_training_on_ln_loss(p: float) -> None:
    """One linear layer, trained by autograd on ln L at the perturbations of ExactLinear."""
    x, y = problem(2)
    eps = 0.5 * largest_feasible_eps(x, y, p=p)
    scale = np.linalg.norm(x, axis=1).max()
    layer = nn.Linear(15, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    inputs, labels = torch.from_numpy(x / scale), torch.from_numpy(y).long()
    attack = ExactLinear(p=p, eps=eps / scale)
    best = {0: -math.inf}
    for t in range(1, 61):
        delta = attack(layer, inputs, labels).delta.detach()
        log_loss = torch.logsumexp(-labels * layer(inputs + delta).squeeze(1), dim=0)
        (gradient,) = torch.autograd.grad(log_loss, layer.weight)
        with torch.no_grad():
            layer.weight -= gradient
        w = layer.weight.detach().numpy()[0]
        margin = (y * (x @ w)).min() - eps * np.linalg.norm(w, dual(p))
        best[t] = max(best[t - 1], margin / np.linalg.norm(w))
    found = maximize_linear(x, y, eps=eps, p=p, method="normalized", steps=60, gap=0.0)
    for step, margin, _ in found.path:
        assert margin == pytest.approx(best[step], rel=1e-10)


@every_p
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_the_guarantee_holds_at_every_step(p: float, share: float) -> None:
    for seed in range(2):
        x, y = problem(seed, 30, 8)
        eps = share * largest_feasible_eps(x, y, p=p)
        found = maximize_linear(x, y, eps=eps, p=p, adaptive=False, steps=200, gap=0.0)
        r2 = (np.linalg.norm(x, axis=1) ** 2).max()
        for t, margin, bound in found.path:
            if t > 0:
                allowed = 8 * r2 * math.log(30) / (t * (t + 3))
                assert bound**2 - max(margin, 0) ** 2 <= allowed
        if eps == 0.0:
            slow = maximize_linear(x, y, method="normalized", steps=300, gap=0.0)
            for t, margin, bound in slow.path:
                if t > 0:
                    assert bound**2 - max(margin, 0) ** 2 <= 2 * r2 * math.log(30) / t


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_fitted_rates(p: float, share: float) -> None:
    """1/t² for the dual acceleration, 1/t for normalised descent, faster than both if adaptive."""
    x, y = problem(1)
    eps = share * largest_feasible_eps(x, y, p=p)
    asked: dict[str, dict[str, Any]] = {
        "adaptive": {},
        "dual": {"adaptive": False},
        "normalized": {"method": "normalized"},
    }
    runs = {
        name: maximize_linear(x, y, eps=eps, p=p, steps=4000, **how) for name, how in asked.items()
    }
    best = runs["adaptive"].margin
    for name, found in runs.items():
        print(
            f"\nl{p:g}, eps = {eps:.3f}, {name}: gap {found.gap:.1e} after {found.steps} steps, "
            f"to the best margin {best - found.margin:.1e}, gap ~ t^-{found.rate:.2f}"
        )
    assert runs["dual"].rate == pytest.approx(2, abs=0.1)
    assert best - runs["dual"].margin < 2e-5
    assert runs["normalized"].rate == pytest.approx(1, abs=0.15)
    assert runs["adaptive"].rate > 2.5
    assert runs["adaptive"].converged
    assert runs["adaptive"].steps < 1500


def test_the_published_recursion_reaches_1e_6_in_10_000_steps() -> None:
    """Of γ* itself: its own duality gap is then two to three times that."""
    x, y = problem(0)
    found = maximize_linear(x, y, adaptive=False, gap=0.0)
    to_the_best = max_margin(x, y).margin - found.margin
    print(f"\n40x15, published, 10000 steps: gap {found.gap:.1e}, to the oracle {to_the_best:.1e}")
    assert -1e-13 < to_the_best < 1e-6
    assert found.gap < 4e-6


def test_fitted_rate_of_exact_powers() -> None:
    for exponent in (1.0, 2.0):
        path = tuple(LinearPoint(t, 1.0, 1.0 + 3.0 * t**-exponent) for t in (1, 10, 30, 90, 300))
        assert fitted_rate(path) == pytest.approx(exponent, rel=1e-9)
    assert math.isnan(fitted_rate(()))
    assert math.isnan(fitted_rate((LinearPoint(100, 1.0, 1.0),) * 5))


def test_near_the_largest_budget_and_more_examples() -> None:
    x, y = problem(3, 200, 50)
    eps = 0.99 * largest_feasible_eps(x, y, p=math.inf)
    found = maximize_linear(x, y, eps=eps, p="linf")
    assert found.converged
    assert found.margin == pytest.approx(robust_svm(x, y, eps, p=math.inf).margin, rel=1.1e-6)


# --- invariances


@pytest.mark.parametrize("factor", [1e-200, 1e-6, 1e6, 1e200])
@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
def test_units_change_nothing(factor: float, p: float) -> None:
    x, y = problem(4)
    eps = 0.4 * largest_feasible_eps(x, y, p=p)
    plain = maximize_linear(x, y, eps=eps, p=p)
    scaled = maximize_linear(x * factor, y, eps=eps * factor, p=p)
    assert scaled.converged
    assert abs(scaled.steps - plain.steps) <= 0.05 * plain.steps
    assert scaled.margin / factor == pytest.approx(plain.margin, rel=2e-6)
    assert scaled.bound / factor == pytest.approx(plain.bound, rel=2e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_signed_permutations_of_features_and_orders_of_examples(p: float) -> None:
    x, y = problem(5)
    eps = 0.4 * largest_feasible_eps(x, y, p=p)
    rng = np.random.default_rng(0)
    order, features = rng.permutation(40), rng.permutation(15)
    signs = rng.choice([-1.0, 1.0], 15)
    plain = maximize_linear(x, y, eps=eps, p=p, gap=1e-11)
    moved = maximize_linear((x[:, features] * signs)[order], y[order], eps=eps, p=p, gap=1e-11)
    turned = plain.direction.numpy()[features] * signs
    np.testing.assert_allclose(moved.direction.numpy(), turned, atol=1e-5)
    assert moved.margin == pytest.approx(plain.margin, rel=2e-11)


def test_labels_and_inputs_change_sign_together_and_duplicates_add_nothing() -> None:
    x, y = problem(6)
    plain = maximize_linear(x, y, eps=0.1, p="linf", gap=1e-9)
    flipped = maximize_linear(-x, -y, eps=0.1, p="linf", gap=1e-9)
    assert torch.equal(plain.direction, flipped.direction)
    doubled = np.vstack([x, x, x[:5]])
    again = maximize_linear(doubled, np.concatenate([y, y, y[:5]]), eps=0.1, p="linf", gap=1e-9)
    assert again.converged
    assert again.margin == pytest.approx(plain.margin, rel=2e-9)


def test_the_same_bits_again_and_inputs_left_alone() -> None:
    x, y = problem(7)
    inputs = torch.from_numpy(x).requires_grad_()
    copy = x.copy()
    first, second = (maximize_linear(inputs, y, eps=0.1, p=1) for _ in range(2))
    assert torch.equal(first.direction, second.direction)
    assert first.path == second.path
    assert not first.direction.requires_grad
    np.testing.assert_array_equal(x, copy)


# --- data at the edge


@every_p
def test_one_example(p: float) -> None:
    """Its own hull: the margin is its distance from the ball."""
    x = np.array([[3.0, -4.0, 0.0]])
    found = maximize_linear(x, [-1], eps=1.0, p=p, gap=1e-10)
    assert found.converged
    assert found.margin == pytest.approx(robust_svm(x, [-1], 1.0, p=p).margin, rel=1e-8)
    clean = maximize_linear(x, [-1])
    assert clean.margin == pytest.approx(5)
    np.testing.assert_allclose(clean.direction, [-0.6, 0.8, 0.0], atol=1e-12)


@pytest.mark.parametrize("method", ["dual", "normalized"])
def test_an_example_within_eps_of_the_origin_is_refused_at_once(method: str) -> None:
    x, y = problem(8)
    x[3] = 0.0
    clean = maximize_linear(x, y, method=method)
    assert clean.separable is False
    assert clean.steps == 0
    assert (clean.bound, int(clean.multipliers.argmax())) == (0.0, 3)
    assert math.isinf(clean.relative_gap)
    assert "not separable at eps = 0" in clean.advice
    x[3, 0] = 0.2
    near = maximize_linear(x, y, eps=0.25, p="linf", method=method)
    assert near.separable is False
    assert "not separable under linf perturbations of eps = 0.25" in near.advice
    assert not near.weights.any()
    assert near.angle_bound == math.pi
    nothing = maximize_linear(np.zeros((4, 2)), [1, -1, 1, -1], method=method)
    assert nothing.separable is False
    assert (nothing.margin, nothing.bound) == (0.0, 0.0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_a_budget_above_the_largest_is_proven_too_large(p: float) -> None:
    x, y = problem(9)
    largest = largest_feasible_eps(x, y, p=p)
    assert maximize_linear(x, y, eps=0.99 * largest, p=p).converged
    found = maximize_linear(x, y, eps=1.05 * largest, p=p)
    check_certificate(x, y, found)
    assert found.separable is False
    assert not found.converged
    assert found.steps < 2000
    assert found.margin <= 0
    assert f"eps = {1.05 * largest:g}: no margin exceeds 0; reduce eps" in found.advice


def test_data_that_no_hyperplane_separates() -> None:
    x, _ = problem(10, 80, 5)
    y = np.sign(np.random.default_rng(10).normal(size=80))
    assert not max_margin(x, y).separable
    found = maximize_linear(x, y)
    check_certificate(x, y, found)
    assert found.separable is False
    assert found.bound < 1e-11
    assert "no hyperplane through the origin will do" in found.advice
    short = maximize_linear(x, y, steps=20)
    assert short.separable is None
    assert "no positive margin at eps = 0 within 20 steps, and none exceeds" in short.advice
    assert f"{short.bound:.3g}" in short.advice


def test_too_few_steps_is_a_value_with_advice() -> None:
    x, y = problem(11)
    found = maximize_linear(x, y, steps=40)
    assert found.separable
    assert not found.converged
    assert f"relative gap {found.relative_gap:.1e} after 40 steps" in found.advice


def test_images_and_integers() -> None:
    x = torch.tensor([[[2, 0], [0, 1]], [[0, -1], [-2, 0]]])
    found = maximize_linear(x, [1, -1])
    assert found.direction.dtype == torch.float64
    assert found.direction.shape == (4,)
    assert found.converged


# --- refusals


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"eps": -0.1}, InputError, "eps: expected a number of at least 0"),
        ({"eps": math.nan}, InputError, "eps: expected a finite number"),
        ({"p": 0.5}, InputError, "norm exponent p"),
        ({"p": "l0"}, InputError, "norm exponent p"),
        ({"p": "round"}, SpecificationError, "norm: expected"),
        ({"method": "normalised"}, SpecificationError, "did you mean 'normalized'"),
        ({"steps": 0}, InputError, "steps: expected a whole number of at least 1"),
        ({"gap": -1e-3}, InputError, "gap: expected"),
        ({"step_size": 0.0}, InputError, "step_size: expected a number above 0"),
        ({"x": [[math.inf, 0.0], [0.0, 1.0]]}, DataError, "x: expected finite"),
        ({"x": [1.0, 2.0]}, DataError, "x: expected shape"),
        ({"y": [1, -1, 1]}, DataError, "one label for each example"),
        ({"y": [0, 1]}, DataError, r"expected labels -1 and \+1, got labels from 0 to 1"),
        ({"y": [0.5, 1]}, DataError, "whole numbers"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given_ = {"x": [[1.0, 0.0], [0.0, 1.0]], "y": [1, -1], **change}
    with pytest.raises(error, match=words):
        maximize_linear(given_.pop("x"), given_.pop("y"), **given_)


# --- the adversaries of the library


@pytest.mark.parametrize(
    "attack",
    [
        None,
        ExactLinear(p=1.5, eps=0.1),
        FGM(eps=0.1),
        FGSM(eps=0.1),
        PGD("linf", eps=0.1, steps=3, step_size=0.05),
        PGD("l2", eps=0.1, steps=3, step_size=0.05),
    ],
    ids=lambda a: a.spec if a else "none",
)
def test_the_margin_is_that_of_the_layer_under_the_attack(attack: Attack | None) -> None:
    x, y = problem(12)
    eps, p = exact_budget(attack)
    found = maximize_linear(x, y, eps=eps, p=p)
    layer = nn.Linear(15, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(found.direction)
    margins = mf.adversarial_margins(layer, torch.from_numpy(x), torch.from_numpy(y), attack)
    assert float(margins.normalized.min()) == pytest.approx(found.margin, rel=1e-12)


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(eps=0.1, bounds=(0.0, 1.0)),
        FGM(eps=0.1, objective="loss"),
        PGD("l2", eps=0.1, random_start=True),
        PGD("linf", eps=0.1, steps=3, step_size=0.01),
        FiniteSet(torch.zeros(1, 2), p=2.0),
    ],
    ids=lambda a: a.spec,
)
def test_attacks_that_are_not_exact_are_refused(attack: Attack) -> None:
    with pytest.raises(InputError, match=r"exact on a linear predictor, got .*use ExactLinear"):
        exact_budget(attack)


# --- the nearest point of a ball


def size(v: Array, p: float) -> float:
    """``‖v‖_p`` with the largest coordinate taken out."""
    peak = float(np.abs(v).max())
    return peak * float(np.linalg.norm(v / peak, p)) if peak else 0.0


@settings(laws, max_examples=100)
@given(
    v=st.lists(st.one_of(st.just(0.0), st.floats(-9, 9)), min_size=1, max_size=6),
    p=st.sampled_from([1.0, 1.001, 1.05, 1.5, 1.9, 2.1, 3.0, 10.0, 1e3, math.inf]),
    radius=st.sampled_from([0.0, 0.01, 1.0, 3.0]),
)
def test_the_nearest_point_satisfies_its_optimality_conditions(
    v: list[float], p: float, radius: float
) -> None:
    """u in the ball and <v − u, u> = radius·‖v − u‖_q >= <v − u, u'> for all u' in the ball."""
    vector = torch.tensor(v, dtype=torch.float64)
    nearest = NearestInBall(p, radius)
    nearest(vector.roll(1) + 1.0)  # whatever it remembers must not matter
    u = nearest(vector).numpy()
    w = np.array(v) - u
    assert size(u, p) <= radius * (1 + 1e-14)
    if size(np.array(v), p) <= radius:
        np.testing.assert_array_equal(u, v)
    support = radius * size(w, dual(p))
    assert float(w @ u) == pytest.approx(support, abs=1e-12 * max(1.0, float(np.abs(v).max())))
