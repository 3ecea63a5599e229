"""The contract of every attack, over every network it applies to.

The ball: ``‖δ_i‖_p ≤ ε (1 + 4 eps)``, eps that of the dtype, the norm taken in extended precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_norms import exact_norm
from torch import Tensor, nn
from unit_oracles import (
    LINEAR,
    NETWORKS,
    Case,
    case,
    naive_fgm,
    naive_fgsm,
    naive_gradient,
    naive_margin,
    naive_pgd,
    scale_layers,
)

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear, FiniteSet, Perturbation
from marginflow.errors import DataError, InputError, ModelError

EPS = 0.3
Bounds = tuple[float, float] | None


def some_deltas(shape: tuple[int, ...]) -> Tensor:
    """Five perturbations of different lengths, none of them 0."""
    generator = torch.Generator().manual_seed(77)
    deltas = torch.randn((5, *shape), generator=generator, dtype=torch.float64)
    return 0.05 * deltas


GRADIENT: dict[str, Callable[[Bounds], Attack]] = {
    "fgm": lambda bounds: FGM(eps=EPS, bounds=bounds),
    "fgsm": lambda bounds: FGSM(eps=EPS, bounds=bounds),
    "pgd-l2": lambda bounds: PGD("l2", eps=EPS, steps=4, step_size=0.13, bounds=bounds),
    "pgd-linf": lambda bounds: PGD("linf", eps=EPS, steps=4, step_size=0.13, bounds=bounds),
    "pgd-l2-random": lambda bounds: PGD(
        "l2", eps=EPS, steps=4, step_size=0.13, random_start=True, bounds=bounds
    ),
    "pgd-linf-random": lambda bounds: PGD(
        "linf", eps=EPS, steps=4, step_size=0.13, random_start=True, bounds=bounds
    ),
}
EXACT = {f"exact-{p:g}": p for p in (1.0, 1.5, 2.0, 3.0, math.inf)}
ATTACKS = (*GRADIENT, "finite-set", *EXACT)
PAIRS = [(a, n) for a in ATTACKS for n in NETWORKS if a not in EXACT or n in LINEAR]
every_pair = pytest.mark.parametrize(("attack_name", "network"), PAIRS)
every_attack = pytest.mark.parametrize("attack_name", ATTACKS)
bounded_attacks = pytest.mark.parametrize("attack_name", [*GRADIENT, "finite-set"])


def make(name: str, shape: tuple[int, ...], bounds: Bounds = None) -> Attack:
    if name in GRADIENT:
        return GRADIENT[name](bounds)
    if name == "finite-set":
        return FiniteSet(some_deltas(shape), bounds=bounds)
    return ExactLinear(p=EXACT[name], eps=EPS)


def call(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Perturbation:
    generator = torch.Generator().manual_seed(11) if attack.random else None
    return attack(model, x, y, generator=generator, **options)


def attacked(attack_name: str, c: Case, bounds: Bounds = None) -> Tensor:
    return call(make(attack_name, tuple(c.x.shape[1:]), bounds), c.model, c.x, c.y).delta


def random_start(attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    """δ⁰ of a random start: where the gradient is 0, PGD stays where it began."""

    class Flat(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 0 * z.flatten(1).sum(1)

    return call(attack, Flat(), x, y.sign() + (y == 0)).delta


# --- the naive loops


def naive_dual(w: list[float], p: float) -> list[float]:
    """``argmax_{‖d‖_p ≤ 1} ⟨d, w⟩`` by the textbook."""
    if p == 1:
        k = max(range(len(w)), key=lambda j: abs(w[j]))
        return [math.copysign(1, w[k]) if j == k else 0.0 for j in range(len(w))]
    if math.isinf(p):
        return [math.copysign(1, v) if v else 0.0 for v in w]
    q = p / (p - 1)
    size = sum(abs(v) ** q for v in w) ** (1 / q)
    return [math.copysign((abs(v) / size) ** (q - 1), v) for v in w]


def naive_exact(model: nn.Module, z: Tensor, label: int, p: float) -> Tensor:
    """Eq. (10), (139) and their like: every other class in turn, the worst margin wins."""
    leaf = z.clone().requires_grad_()
    f = model(leaf.unsqueeze(0)).reshape(-1)
    rows = [torch.autograd.grad(one, leaf, retain_graph=True)[0].reshape(-1) for one in f]
    if len(rows) == 1:
        gaps = [(label * f[0], label * rows[0])]
    else:
        gaps = [(f[label] - f[j], rows[label] - rows[j]) for j in range(len(rows)) if j != label]
    candidates = []
    for margin, w in gaps:
        d = naive_dual(w.tolist(), p)
        worst = margin.item() - EPS * sum(a * b for a, b in zip(d, w.tolist(), strict=True))
        candidates.append((worst, d))
    _, d = min(candidates, key=lambda pair: pair[0])
    return -EPS * torch.tensor(d, dtype=z.dtype).reshape(z.shape)


def naive(attack_name: str, c: Case, i: int, bounds: Bounds, start: Tensor | None) -> Tensor:
    z, label = c.x[i], int(c.y[i])
    if attack_name in EXACT:
        return naive_exact(c.model, z, label, EXACT[attack_name])
    if attack_name == "finite-set":
        options = list(some_deltas(tuple(z.shape)))
        if bounds is not None:
            options = [(z + d).clamp(*bounds) - z for d in options]
        return min(options, key=lambda d: naive_margin(c.model, z + d, label).item())
    if attack_name == "fgm":
        delta = naive_fgm(c.model, z, label, EPS)
    elif attack_name == "fgsm":
        delta = naive_fgsm(c.model, z, label, EPS)
    else:
        delta = naive_pgd(
            c.model,
            z,
            label,
            p="l2" if "l2" in attack_name else "linf",
            eps=EPS,
            steps=4,
            step_size=0.13,
            start=None if start is None else start[i],
            bounds=bounds,
        )
    return delta if bounds is None else (z + delta).clamp(*bounds) - z


@every_pair
def test_equals_a_naive_loop(attack_name: str, network: str) -> None:
    c = case(network)
    attack = make(attack_name, tuple(c.x.shape[1:]))
    start = random_start(attack, c.x, c.y) if attack.random else None
    perturbation = call(attack, c.model, c.x, c.y)
    assert perturbation.delta.dtype == torch.float64
    assert not perturbation.delta.requires_grad
    assert perturbation.dead_inputs.sum() <= 2
    for i, label in enumerate(c.y.tolist()):
        expected = naive(attack_name, c, i, None, start)
        assert (perturbation.delta[i] - expected).abs().max() <= 1e-12 * EPS, i
        if attack_name in ("fgm", "fgsm"):
            alive = bool(naive_gradient(c.model, c.x[i], label).any())
            assert bool(perturbation.dead_inputs[i]) is not alive


@bounded_attacks
@pytest.mark.parametrize("network", ["relu", "classes", "cnn"])
def test_equals_a_naive_loop_within_bounds(attack_name: str, network: str) -> None:
    c = case(network)
    bounds = (-0.4, 0.9)
    c = Case(c.model, c.x.clamp(*bounds), c.y)
    attack = make(attack_name, tuple(c.x.shape[1:]), bounds)
    start = random_start(attack, c.x, c.y) if attack.random else None
    delta = attacked(attack_name, c, bounds)
    for i in range(len(c.y)):
        expected = naive(attack_name, c, i, bounds, start)
        assert (delta[i] - expected).abs().max() <= 1e-12 * EPS, i


# --- the ball, scale, batches


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_delta_lies_in_the_ball(attack_name: str, network: str, dtype: torch.dtype) -> None:
    c = case(network, n=25, dtype=dtype)
    attack = make(attack_name, tuple(c.x.shape[1:]))
    perturbation = call(attack, c.model, c.x, c.y)
    delta, alive = perturbation.delta, ~perturbation.dead_inputs.numpy()
    assert delta.dtype == dtype
    assert delta.shape == c.x.shape
    assert alive.sum() > 15
    slack = 4 * torch.finfo(dtype).eps
    norms = exact_norm(delta, attack.p)
    assert (norms <= attack.eps * (1 + slack)).all()
    if attack_name in ("fgm", "fgsm", *EXACT):  # one step uses the whole budget
        assert (norms[alive] >= attack.eps * (1 - slack)).all()


@every_pair
def test_powers_of_two_leave_delta_bit_identical(attack_name: str, network: str) -> None:
    """Lemma 3, in the strongest form that floating point allows."""
    c = case(network, n=11)
    expected = attacked(attack_name, c)
    count = sum(1 for _ in c.model.parameters())
    for powers in ([1, 3, -2, 5], [-40, 37, 12, -21], [60, 60, 60, 60], [-60, -60, -60, -60]):
        scaled = case(network, n=11)
        scale_layers(scaled.model, [2.0**k for k in powers[:count]])
        assert torch.equal(attacked(attack_name, scaled), expected), powers


@every_pair
def test_powers_of_two_leave_delta_bit_identical_in_float32(attack_name: str, network: str) -> None:
    c = case(network, n=11, dtype=torch.float32)
    expected = attacked(attack_name, c)
    scale_layers(c.model, [2.0**k for k in (3, -5, 2, 1)][: len(list(c.model.parameters()))])
    assert torch.equal(attacked(attack_name, c), expected)


@every_pair
def test_other_factors_leave_delta_equal(attack_name: str, network: str) -> None:
    c = case(network, n=11)
    expected = attacked(attack_name, c)
    scale_layers(c.model, [0.3, 7.1, 1.9, 57.0][: len(list(c.model.parameters()))])
    assert (attacked(attack_name, c) - expected).abs().max() <= 1e-12 * EPS


@every_pair
def test_an_example_does_not_see_its_batch(attack_name: str, network: str) -> None:
    c = case(network)
    attack = make(attack_name, tuple(c.x.shape[1:]))
    if attack.random:  # its start is drawn for the batch
        return
    together = call(attack, c.model, c.x, c.y).delta
    for i in range(len(c.y)):
        alone = call(attack, c.model, c.x[i : i + 1], c.y[i : i + 1]).delta
        assert (alone[0] - together[i]).abs().max() <= 1e-12 * EPS


@every_pair
def test_a_batch_without_examples(attack_name: str, network: str) -> None:
    c = case(network)
    attack = make(attack_name, tuple(c.x.shape[1:]))
    perturbation = call(attack, c.model, c.x[:0], c.y[:0])
    assert perturbation.delta.shape == (0, *c.x.shape[1:])
    assert perturbation.dead_inputs.shape == (0,)


@every_pair
def test_no_budget_no_perturbation(attack_name: str, network: str) -> None:
    c = case(network)
    if attack_name in EXACT:
        attack: Attack = ExactLinear(p=EXACT[attack_name], eps=0)
    elif attack_name == "finite-set":
        attack = FiniteSet(torch.zeros(1, *c.x.shape[1:]))
    elif attack_name.startswith("pgd"):
        p = "l2" if "l2" in attack_name else "linf"
        attack = PGD(p, eps=0, random_start="random" in attack_name)
    else:
        attack = {"fgm": FGM, "fgsm": FGSM}[attack_name](eps=0)
    assert attack.eps == 0
    assert not call(attack, c.model, c.x, c.y).delta.any()


@pytest.mark.parametrize("network", [n for n in NETWORKS if n not in LINEAR])
def test_attacks_lower_the_margin_to_first_order(network: str) -> None:
    """Small ε: the margin falls by ``ε ‖∇m‖_q (1 + O(ε))``, the most that any δ achieves."""
    c = case(network)
    eps = 1e-7
    for attack, q in [(FGM(eps=eps), 2), (FGSM(eps=eps), 1)]:
        delta = attack(c.model, c.x, c.y).delta
        for i, label in enumerate(c.y.tolist()):
            before = naive_margin(c.model, c.x[i], label)
            after = naive_margin(c.model, c.x[i] + delta[i], label)
            gradient = naive_gradient(c.model, c.x[i], label).reshape(-1).numpy()
            fall = eps * np.linalg.norm(gradient, ord=q)
            assert (before - after).item() == pytest.approx(fall, rel=1e-4)


# --- bounds


@bounded_attacks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "bounds", [(0.0, 1.0), (-0.5, 0.5), (-0.4, 0.9), (-2.1179, 2.64), (-1 / 3, 0.7), (0.1, 0.9)]
)
def test_bounds_hold_to_the_bit_and_the_ball_too(
    attack_name: str, dtype: torch.dtype, bounds: tuple[float, float]
) -> None:
    c = case("relu", n=400, dtype=dtype)
    low, high = (torch.tensor(b, dtype=dtype) for b in bounds)
    x = (low + (high - low) * torch.rand(c.x.shape, dtype=dtype)).clamp(low, high)
    x[0], x[1] = low, high
    attack = make(attack_name, tuple(x.shape[1:]), bounds)
    delta = call(attack, c.model, x, c.y).delta
    moved = x + delta
    assert (moved >= low).all()
    assert (moved <= high).all()
    assert (exact_norm(delta, attack.p) <= attack.eps * (1 + 4 * torch.finfo(dtype).eps)).all()
    # A perturbed example is an example: it can be attacked again.
    call(attack, c.model, moved, c.y)


@bounded_attacks
def test_data_outside_the_bounds_are_refused(attack_name: str) -> None:
    c = case("relu")
    attack = make(attack_name, (6,), (0.0, 1.0))
    with pytest.raises(DataError, match=r"values in the bounds \[0, 1\].*drop the bounds"):
        call(attack, c.model, c.x, c.y)
    with pytest.raises(DataError, match="bounds"):
        call(attack, c.model, torch.full_like(c.x, math.nan), c.y)


@every_pair
def test_without_bounds_the_range_of_the_data_is_free(attack_name: str, network: str) -> None:
    """Another library clamps to [0, 1] behind one's back: ‖δ‖_∞ = 0.5 for ε = 0.01."""
    c = case(network)
    far = Case(c.model, 40 * c.x - 100, c.y, c.linear)
    attack = make(attack_name, tuple(c.x.shape[1:]))
    delta = call(attack, far.model, far.x, far.y).delta
    start = random_start(attack, far.x, far.y) if attack.random else None
    for i in range(len(far.y)):
        # The same loop; FGM's gradient at x ~ 100 keeps its twelve digits.
        expected = naive(attack_name, far, i, None, start)
        assert (delta[i] - expected).abs().max() <= 1e-12 * EPS


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.5, 0.5), (0.0, math.inf), (math.nan, 1.0)])
def test_bounds_that_are_no_interval(bounds: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="bounds: expected"):
        FGM(eps=0.1, bounds=bounds)


@pytest.mark.parametrize("bounds", [5, (0.0,), (0.0, 1.0, 2.0), ("0", "1"), "01"])
def test_bounds_that_are_no_pair_of_numbers(bounds: Any) -> None:
    with pytest.raises(InputError, match="bounds: expected"):
        FGSM(eps=0.1, bounds=bounds)


# --- dead inputs


@pytest.mark.parametrize("attack_name", [*GRADIENT])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_dead_network(attack_name: str, outputs: int) -> None:
    """No input gradient anywhere: every example is counted, δ is 0 (or the random start)."""
    model = mf.models.mlp(6, 5, outputs, seed=0).double()
    with torch.no_grad():
        next(model.parameters()).abs_().neg_()
    x, y = torch.rand(4, 6, dtype=torch.float64) + 0.4, torch.ones(4, dtype=torch.long)
    attack = make(attack_name, (6,))
    perturbation = call(attack, model, x, y)
    assert perturbation.dead_inputs.tolist() == [True] * 4
    if attack.random:
        assert torch.equal(perturbation.delta, random_start(attack, x, y))
    else:
        assert not perturbation.delta.any()


@pytest.mark.parametrize("attack_name", ["fgm", "fgsm", "pgd-l2", "pgd-linf"])
@pytest.mark.parametrize("network", ["relu", "squared", "classes", "cnn"])
def test_an_image_of_zeros(attack_name: str, network: str) -> None:
    """The subgradient of ReLU at 0 is 0, so a bias-free ReLU network has no gradient there."""
    c = case(network)
    x = c.x.clone()
    x[2] = 0
    attack = make(attack_name, tuple(x.shape[1:]))
    perturbation = call(attack, c.model, x, c.y)
    assert perturbation.dead_inputs.tolist() == [i == 2 for i in range(len(x))]
    assert not perturbation.delta[2].any()
    assert torch.equal(
        perturbation.delta[[0, 1, 3]], call(attack, c.model, c.x, c.y).delta[[0, 1, 3]]
    )


def test_an_example_that_comes_alive_on_the_way_is_not_dead() -> None:
    """A random start may leave the dead region; then there was a gradient at some step."""
    c = case("relu")
    x = torch.zeros_like(c.x)
    assert call(make("pgd-l2", (6,)), c.model, x, c.y).dead_inputs.all()
    assert not call(make("pgd-l2-random", (6,)), c.model, x, c.y).dead_inputs.any()


# --- what an attack leaves behind


class Noisy(nn.Module):
    """Every kind of state: running statistics, dropout, a frozen parameter."""

    def __init__(self, outputs: int, activation: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 5, bias=False),
            nn.BatchNorm1d(5),
            activation,
            nn.Dropout(0.5),
            nn.Linear(5, outputs, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@every_attack
@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_nothing_is_left_behind(
    attack_name: str, training: bool | None, derivative: str, outputs: int
) -> None:
    linear = attack_name in EXACT
    model = Noisy(outputs, nn.Identity() if linear else nn.ReLU()).double()
    model.body[0].weight.requires_grad_(False)
    model.body[4].weight.grad = torch.full_like(model.body[4].weight, 7.0)
    if training is None:  # a mixture, as for somebody who freezes batch norm
        model.train()
        model.body[1].eval()
    else:
        model.train(training)
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    y = torch.arange(8) % 2 * 2 - 1 if outputs == 1 else torch.arange(8) % outputs
    rng, numpy_rng = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    attack = make(attack_name, (6,))
    first = call(attack, model, x, y, derivative=derivative)
    second = call(attack, model, x, y, derivative=derivative)

    assert torch.equal(first.delta, second.delta)  # evaluation mode: dropout plays no part
    assert [m.training for m in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not model.body[0].weight.requires_grad
    assert model.body[0].weight.grad is None
    assert model.body[1].weight.grad is None
    assert (model.body[4].weight.grad == 7).all()
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), rng)
    assert (np.random.get_state()[1] == numpy_rng).all()  # noqa: NPY002


@every_attack
def test_modes_come_back_after_an_error(attack_name: str) -> None:
    model = Noisy(1, nn.ReLU()).double().train()
    with pytest.raises(DataError, match="labels"):
        call(make(attack_name, (6,)), model, torch.randn(3, 6).double(), torch.tensor([0, 1, 2]))
    assert all(m.training for m in model.modules())


@every_attack
def test_works_without_gradients_around_it(attack_name: str) -> None:
    c = case("linear")
    expected = attacked(attack_name, c)
    with torch.no_grad():
        assert torch.equal(attacked(attack_name, c), expected)
    for parameter in c.model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(attacked(attack_name, c), expected)


# --- random starts


@pytest.mark.parametrize("p", ["l2", "linf"])
def test_a_random_start_is_a_function_of_its_generator(p: str) -> None:
    c = case("relu")
    attack = PGD(p, eps=EPS, steps=1, step_size=0.01, random_start=True)
    assert attack.random

    def delta(seed: int) -> Tensor:
        return attack(c.model, c.x, c.y, generator=torch.Generator().manual_seed(seed)).delta

    assert torch.equal(delta(5), delta(5))
    assert not torch.equal(delta(5), delta(6))
    generator = torch.Generator().manual_seed(5)
    first = attack(c.model, c.x, c.y, generator=generator).delta
    assert torch.equal(first, delta(5))
    assert not torch.equal(attack(c.model, c.x, c.y, generator=generator).delta, first)
    with pytest.raises(InputError, match=r"needs generator=torch.Generator\(\).manual_seed"):
        attack(c.model, c.x, c.y)


@pytest.mark.parametrize("p", ["l2", "linf"])
def test_a_random_start_is_shared_between_models(p: str) -> None:
    """Same draw whatever the weights and their dtype: what makes the start scale invariant."""
    attack = PGD(p, eps=EPS, steps=1, random_start=True)
    x, y = torch.randn(9, 6), torch.ones(9, dtype=torch.long)
    single, double = random_start(attack, x, y), random_start(attack, x.double(), y)
    assert torch.equal(single, double.float())


@pytest.mark.parametrize("p", ["l2", "linf"])
def test_a_random_start_is_uniform_in_the_ball(p: str) -> None:
    """Kolmogorov–Smirnov on 20000 draws: ``(‖δ‖_p/ε)^d`` is uniform on [0, 1]."""
    n, d = 20_000, 3
    start = random_start(
        PGD(p, eps=EPS, steps=1, random_start=True), torch.zeros(n, d).double(), torch.ones(n)
    )
    radius = exact_norm(start, 2 if p == "l2" else math.inf).astype(float) / EPS
    u = np.sort(radius**d)
    distance = max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())
    assert distance < 1.63 / math.sqrt(n)  # the 1 % level; the seed is fixed
    assert (start.mean(0).abs() < 4 * EPS / math.sqrt(3 * n)).all()


# --- flags and misuse


def test_flags() -> None:
    assert FGM(eps=1).scale_invariant
    assert not FGM(eps=1, objective="loss").scale_invariant
    assert not PGD("linf", eps=1, objective="loss").scale_invariant
    assert ExactLinear(2, 0.1).exact
    assert FiniteSet(torch.zeros(1, 2)).exact
    assert not FGM(eps=1).exact
    assert not PGD("l2", eps=1).random


@every_attack
def test_misuse_of_a_call(attack_name: str) -> None:
    c = case("linear")
    attack = make(attack_name, (6,))
    with pytest.raises(InputError, match="unknown derivative 'totl'; did you mean 'total'"):
        call(attack, c.model, c.x, c.y, derivative="totl")
    for x, y in [(c.x, c.y[:-1]), (c.x, c.y.unsqueeze(1)), (c.x, c.y[0]), (c.x[0, 0], c.y)]:
        with pytest.raises(DataError, match="as many labels as examples"):
            call(attack, c.model, x, y)
    with pytest.raises(DataError, match="expected −1 and \\+1"):
        call(attack, c.model, c.x, torch.zeros_like(c.y))


@every_attack
def test_models_that_cannot_be_attacked(attack_name: str) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.expand(len(x))

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    attack = make(attack_name, (6,))
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([1, -1, 1])
    with pytest.raises(ModelError, match="expected a tensor as output, got tuple"):
        call(attack, Pair(), x, y)
    if attack_name != "finite-set":
        with pytest.raises(ModelError, match=r"do not depend on its inputs|linear in their input"):
            call(attack, Constant(), x, y)
