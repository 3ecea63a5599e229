"""The exact attacks against closed forms and brute force, and the models they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_norms import exact_norm
from torch import Tensor, nn
from unit_oracles import Case, case, naive_margins

import marginflow as mf
from marginflow.attacks import FGM, PGD, Attack, ExactLinear, FiniteSet
from marginflow.errors import InputError, ModelError, SpecificationError
from marginflow.losses import margins_of

EXPONENTS = [1.0, 1.5, 2.0, 3.0, math.inf]
EPS = 0.3


def product(model: nn.Module) -> np.ndarray:
    """``W_L ⋯ W_1``, (C, d), by matrix products and nothing else."""
    result = None
    for parameter in model.parameters():
        w = parameter.detach().double().numpy()
        result = w if result is None else w @ result
    assert result is not None
    return result


def worst_margins(c: Case, p: float, eps: float) -> np.ndarray:
    """The closed form ``min_{j≠y} [m_j − ε ‖w_y − w_j‖_q]``; ``y f − ε ‖w‖_q`` for one output."""
    q = {1.0: math.inf, math.inf: 1.0}.get(p) or p / (p - 1)
    w, x = product(c.model), c.x.double().numpy()
    f = x @ w.T
    if len(w) == 1:
        return c.y.numpy() * f[:, 0] - eps * np.linalg.norm(w[0], ord=q)
    rows = []
    for i, label in enumerate(c.y.tolist()):
        rows.append(
            min(
                f[i, label] - f[i, j] - eps * np.linalg.norm(w[label] - w[j], ord=q)
                for j in range(len(w))
                if j != label
            )
        )
    return np.array(rows)


def random_in_ball(p: float, count: int, features: int) -> Tensor:
    """Points on the ball's surface, a third of them sparse (where the corners of p < 2 lie)."""
    generator = torch.Generator().manual_seed(4)
    points = torch.randn((count, features), generator=generator, dtype=torch.float64)
    points[::3] *= torch.rand(points[::3].shape, generator=generator) < 0.4
    points[1::3] = points[1::3].sign()
    norms = torch.linalg.vector_norm(points, ord=p, dim=1, keepdim=True).clamp(min=1e-300)
    return EPS * points / norms


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("network", ["linear", "linear-classes"])
def test_margins_fall_to_the_closed_form(p: float, network: str) -> None:
    c = case(network, n=40)
    delta = ExactLinear(p=p, eps=EPS)(c.model, c.x, c.y).delta
    found = naive_margins(c.model, c.x + delta, c.y)
    np.testing.assert_allclose(found.numpy(), worst_margins(c, p, EPS), rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("network", ["linear", "linear-classes"])
def test_no_other_perturbation_does_more(p: float, network: str) -> None:
    c = case(network, n=6)
    delta = ExactLinear(p=p, eps=EPS)(c.model, c.x, c.y).delta
    worst = naive_margins(c.model, c.x + delta, c.y)
    others = random_in_ball(p, 6000, 6)
    with torch.no_grad():
        for i in range(len(c.y)):
            tried = margins_of(c.model(c.x[i] + others), c.y[i].expand(len(others)))
            assert tried.min() >= worst[i] - 1e-14


def test_several_classes_need_more_than_the_runner_up() -> None:
    """The class nearest in margin is not the one that ε reaches first: w_y − w_j counts too."""
    model = mf.models.mlp(2, 3).double()
    with torch.no_grad():
        next(model.parameters()).copy_(torch.tensor([[0.0, 0.0], [-0.1, 0.0], [0.0, -9.0]]))
    x, y = torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([0])
    exact = ExactLinear(p=2, eps=1.0)(model, x, y).delta
    assert torch.allclose(exact, torch.tensor([[0.0, -1.0]], dtype=torch.float64), atol=1e-15)
    runner_up = FGM(eps=1.0)(model, x, y).delta
    assert torch.allclose(runner_up, torch.tensor([[-1.0, 0.0]], dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize("network", ["linear", "linear-classes"])
def test_gradient_attacks_are_exact_on_linear_networks(network: str) -> None:
    c = case(network, n=20)
    exact = ExactLinear(p=2, eps=EPS)(c.model, c.x, c.y).delta
    if network == "linear":
        assert torch.allclose(FGM(eps=EPS)(c.model, c.x, c.y).delta, exact, rtol=0, atol=1e-14)
    pgd = PGD("l2", eps=EPS, steps=20)(c.model, c.x, c.y).delta
    worst = naive_margins(c.model, c.x + exact, c.y)
    assert (naive_margins(c.model, c.x + pgd, c.y) >= worst - 1e-14).all()


def test_examples_of_any_shape() -> None:
    c = case("linear-classes")
    x = c.x.reshape(len(c.y), 1, 2, 3)
    delta = ExactLinear(p=3, eps=EPS)(c.model, x, c.y).delta
    assert delta.shape == x.shape
    expected = ExactLinear(p=3, eps=EPS)(c.model, c.x, c.y).delta
    assert torch.equal(delta.reshape(c.x.shape), expected)


@pytest.mark.parametrize("outputs", [1, 3])
def test_weights_of_zero_are_dead(outputs: int) -> None:
    model = mf.models.deep_linear(4, 3, outputs, seed=0).double()
    with torch.no_grad():
        next(model.parameters()).zero_()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.ones(5, dtype=torch.long)
    perturbation = ExactLinear(p=2, eps=EPS)(model, x, y)
    assert perturbation.dead_inputs.tolist() == [True] * 5
    assert not perturbation.delta.any()


NOT_LINEAR = {
    "relu": lambda: mf.models.mlp(6, 8, 1, seed=0),
    "leaky": lambda: mf.models.mlp(6, 8, 1, activation="leaky-relu", seed=0),
    "squared": lambda: mf.models.mlp(6, 8, 1, activation="squared-relu", seed=0),
    "one relu": lambda: mf.models.mlp(6, 1, 1, seed=0),
    "bias": lambda: nn.Linear(6, 1),
    "odd": lambda: nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, False)),
}


@pytest.mark.parametrize("kind", NOT_LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("examples", ["many", "one", "zero", "none", "tiny"])
def test_networks_that_are_not_linear_are_refused(
    kind: str, dtype: torch.dtype, examples: str
) -> None:
    """Even where the data prove nothing: one example, or an image of zeros."""
    torch.manual_seed(1)
    model = NOT_LINEAR[kind]().to(dtype)
    x = {
        "many": torch.randn(9, 6),
        "one": torch.randn(1, 6),
        "zero": torch.zeros(1, 6),
        "none": torch.zeros(0, 6),
        "tiny": 1e-20 * torch.randn(3, 6),
    }[examples].to(dtype)
    y = torch.ones(len(x), dtype=torch.long)
    with pytest.raises(ModelError, match=r"linear in their input only.*Use FGM, FGSM, PGD"):
        ExactLinear(p=2, eps=EPS)(model, x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_linear_networks_of_any_size_are_not_refused(dtype: torch.dtype, scale: float) -> None:
    model = mf.models.deep_linear(300, 50, 40, 30, 3, seed=0).to(dtype)
    with torch.no_grad():
        next(model.parameters()).mul_(scale)
    for size in (1e-9, 1.0, 1e9):
        x, y = size * torch.randn(50, 300, dtype=dtype), torch.arange(50) % 3
        delta = ExactLinear(p=2, eps=EPS)(model, x, y).delta
        assert (exact_norm(delta, 2) > 0.999 * EPS).all()


# --- finite sets


def test_finite_set_takes_the_worst_of_its_members() -> None:
    c = case("classes", n=30)
    deltas = 0.4 * torch.randn(12, 6, dtype=torch.float64)
    attack = FiniteSet(deltas)
    assert attack.eps == pytest.approx(max(math.sqrt(float(d @ d)) for d in deltas), rel=1e-15)
    delta = attack(c.model, c.x, c.y).delta
    worst = naive_margins(c.model, c.x + delta, c.y)
    for one in deltas:
        assert (naive_margins(c.model, c.x + one, c.y) >= worst - 1e-14).all()
    for row in delta:
        assert min(float((row - one).abs().max()) for one in deltas) <= 1e-15


def test_finite_set_with_zero_never_raises_a_margin() -> None:
    c = case("relu", n=30)
    deltas = torch.cat([torch.zeros(1, 6), torch.randn(3, 6)]).double()
    delta = FiniteSet(deltas)(c.model, c.x, c.y).delta
    clean = naive_margins(c.model, c.x, c.y)
    assert (naive_margins(c.model, c.x + delta, c.y) <= clean).all()


def test_finite_set_measures_its_budget_in_its_norm() -> None:
    deltas = torch.tensor([[3.0, -4.0], [1.0, 1.0]])
    assert FiniteSet(deltas).eps == 5
    assert FiniteSet(deltas, p="linf").eps == 4
    assert FiniteSet(deltas, p="l1").eps == 7


def test_finite_set_is_moved_to_the_examples_dtype_and_stays_in_the_ball() -> None:
    c = case("relu", n=30, dtype=torch.float32)
    deltas = torch.randn(9, 6, dtype=torch.float64)
    attack = FiniteSet(deltas)
    delta = attack(c.model, c.x, c.y).delta
    assert delta.dtype == torch.float32
    assert (exact_norm(delta, 2) <= attack.eps * (1 + 4 * torch.finfo(torch.float32).eps)).all()


@pytest.mark.parametrize(
    ("deltas", "says"),
    [
        (torch.zeros(0, 3), "m ≥ 1"),
        (torch.zeros(3), r"shape \(m, …\)"),
        (torch.zeros(2, 3, dtype=torch.long), "floating numbers, got torch.int64"),
        (torch.tensor([[1.0, math.nan]]), "finite perturbations"),
        (torch.tensor([[1.0, math.inf]]), "finite perturbations"),
    ],
)
def test_sets_that_are_none(deltas: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        FiniteSet(deltas)


def test_a_finite_set_of_another_shape() -> None:
    c = case("relu")
    with pytest.raises(InputError, match=r"examples' shape \(6,\), got \(5,\)"):
        FiniteSet(torch.zeros(2, 5))(c.model, c.x, c.y)


# --- misuse of the constructors


@pytest.mark.parametrize("eps", [-1e-9, -1, math.nan, math.inf, -math.inf, "0.1", None, True])
def test_budgets_that_are_none(eps: object) -> None:
    makers = [FGM, mf.attacks.FGSM, lambda eps: PGD("l2", eps=eps), lambda eps: ExactLinear(2, eps)]
    for make in makers:
        with pytest.raises(InputError, match="eps: expected"):
            make(eps=eps)
    with pytest.raises(InputError, match="eps: expected a finite number"):
        FGM(eps=10**400)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ({"steps": 2.0}, "steps: expected a whole number, got 2.0"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"step_size": 0.0}, "step_size: expected a number above 0"),
        ({"step_size": -1.0}, "step_size: expected a number above 0"),
        ({"step_size": math.nan}, "step_size: expected a finite number"),
        ({"objective": "los"}, "unknown objective 'los'; did you mean 'loss'"),
    ],
)
def test_misuse_of_pgd(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        PGD("l2", eps=0.1, **options)  # type: ignore[arg-type]


def test_norms_of_pgd() -> None:
    with pytest.raises(SpecificationError, match="expected the norm 'l2' or 'linf', got 'l1'"):
        PGD("l1", eps=0.1)
    with pytest.raises(InputError, match="norm"):
        PGD("l0.5", eps=0.1)
    assert PGD(2, eps=0.1).p == 2
    assert PGD(math.inf, eps=0.1).p == math.inf


def test_the_default_step_reaches_the_boundary() -> None:
    assert PGD("linf", eps=0.2, steps=5).step_size == pytest.approx(0.1, rel=1e-15)
    assert PGD("linf", eps=0.0).step_size == 0


def test_attacks_are_frozen() -> None:
    attack: Attack = FGM(eps=0.1)
    with pytest.raises(AttributeError):
        attack.eps = 0.2  # type: ignore[misc]
