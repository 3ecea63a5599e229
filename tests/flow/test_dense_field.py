"""The closed forms of dense networks: against autograd, and where there is one at all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from flow_problems import DATA, EXACT, field_of, finite_set
from scipy.integrate import Radau
from torch import nn

import marginflow as mf
from marginflow.flow import Field
from marginflow.flow._chain import LowRank
from marginflow.flow._closed_held import Held
from marginflow.flow._radau import LowRankRadau, _Factors
from marginflow.losses import get_loss

SMOOTH = mf.load("separable:n=8,d=4,margin=0.3,seed=1").to(dtype=torch.float64)
LINEAR = [
    *(None, "fgm:eps=0.05", "fgsm:eps=0.05", "finite", "pgd-linf:eps=0.05,steps=3"),
    *(f"exact-linear:p={p},eps=0.05" for p in ("1", "1.5", "2", "3", "inf")),
]
OTHERS = [None, "fgm:eps=0.05", "fgsm:eps=0.05", "finite", "pgd-linf:eps=0.05,steps=3"]
CASES = [
    *(("identity", attack) for attack in LINEAR),
    *((kind, a) for kind in ("relu", "leaky-relu", "squared-relu") for a in OTHERS),
]


def both(model: nn.Module, data: mf.Dataset, attack: Any, **options: Any) -> tuple[Field, Field]:
    """The field in closed form, and by autograd."""
    found = finite_set(data.shape[0], 5, 0.03) if attack == "finite" else attack
    ours = field_of(model, data, found, **options)
    assert ours.closed is not None
    return ours, field_of(model, data, found, closed=False, **options)


def away(a: Any, b: Any) -> float:
    """Relative distance."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("scale", [1.6, 5.0])
@pytest.mark.parametrize("loss", ["exponential", "logistic"])
@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 3)])
@pytest.mark.parametrize(("activation", "attack"), CASES)
def test_closed_form_against_autograd(
    activation: str, attack: str | None, hidden: tuple[int, ...], loss: str, scale: float
) -> None:
    model = mf.models.mlp(4, *hidden, 1, activation=activation, seed=3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    derivative = "detached" if loss == "logistic" else "total"
    ours, theirs = both(model, SMOOTH, attack, loss=loss, derivative=derivative)
    w = ours.read()
    u = np.random.default_rng(0).standard_normal(len(w))
    a, b = ours(w), theirs(w)
    assert away(a.velocity, b.velocity) <= 1e-12
    assert a.log_loss == pytest.approx(b.log_loss, rel=1e-13, abs=1e-13)
    assert a.smoothed == pytest.approx(b.smoothed, rel=1e-13, abs=1e-13)
    assert a.margin == pytest.approx(b.margin, rel=1e-13, abs=1e-13)
    assert away(ours.jacobian(w), theirs.jacobian(w)) <= 1e-10
    assert away(ours.potential_slope(w), theirs.potential_slope(w)) <= 1e-12
    assert away(ours.curvature(w, u), theirs.curvature(w, u)) <= 1e-10


@pytest.mark.parametrize("attack", [None, EXACT, "exact-linear:p=3,eps=0.05", "fgsm:eps=0.05"])
@pytest.mark.parametrize("hidden", [(16,), (16, 12), (16, 12, 14)])
def test_the_few_directions_of_a_linear_jacobian(
    hidden: tuple[int, ...], attack: str | None
) -> None:
    data = mf.load(DATA).to(dtype=torch.float64)
    model = mf.models.deep_linear(10, *hidden, 1, seed=0).double()
    ours, theirs = both(model, data, attack)
    w = 2 * ours.read()
    assert ours.has_low_rank
    found = ours.low_rank(w)
    basis = found.basis
    widths = (10, *hidden, 1)
    assert basis.shape[1] == sum(a + b - 1 for a, b in pairwise(widths)) + 1
    assert np.abs(basis.T @ basis - np.eye(basis.shape[1])).max() <= 1e-13
    assert away(basis @ (basis.T @ w), w) <= 1e-13
    assert away(found.dense(), theirs.jacobian(w)) <= 1e-10
    assert ours.low_rank(w.copy()) is found
    assert ours.jacobians == 1


def test_a_linear_system_in_the_few_directions() -> None:
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.standard_normal((12, 5)))[0]
    core = random.standard_normal((5, 5))
    basis[:, 4] = core[4] = core[:, 4] = 0  # nothing was left of W
    jacobian = LowRank(basis, core)
    for shift, b in [
        (3.7, random.standard_normal(12)),
        (2.7 - 3.0j, random.standard_normal(12) + 1j * random.standard_normal(12)),
    ]:
        found = _Factors(shift, jacobian).solve(b)
        expected = np.linalg.solve(shift * np.eye(12) - jacobian.dense(), b)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_radau_in_the_few_directions_takes_the_same_steps() -> None:
    """Against scipy's own, on ``y′ = A y + sin`` with A of rank 3 and eigenvalues down to −10⁴."""
    random = np.random.default_rng(1)
    basis = np.linalg.qr(random.standard_normal((9, 3)))[0]
    jacobian = LowRank(basis, np.diag([-1.0, -100.0, -1e4]))
    matrix = jacobian.dense()
    force = random.standard_normal(9)

    def rate(t: float, y: np.ndarray) -> np.ndarray:
        return matrix @ y + np.sin(t) * force

    options = {"rtol": 1e-8, "atol": 1e-10, "first_step": 1e-3}
    start = random.standard_normal(9)
    ours = LowRankRadau(rate, 0.0, start, 5.0, lambda t, y: jacobian, **options)
    theirs = Radau(rate, 0.0, start, 5.0, jac=lambda t, y: matrix, **options)
    steps = 0
    while theirs.status == "running":
        ours.step()
        theirs.step()
        steps += 1
        assert ours.t == pytest.approx(theirs.t, rel=1e-6)
        # The step sizes agree to the rounding of error estimates only: compared at the same time.
        at = min(ours.t, theirs.t)
        a, b = ours.dense_output()(at), theirs.dense_output()(at)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    assert ours.status == "finished"
    assert steps > 20
    assert (ours.nfev, ours.njev, ours.nlu) == (theirs.nfev, theirs.njev, theirs.nlu)


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_the_loss_at_all_sizes_of_margins(loss: str) -> None:
    """ln L, its slopes and bends by the margins, against torch's autograd."""
    function = get_loss(loss)
    model = mf.models.mlp(4, 3, 1, seed=0).double()
    closed = field_of(model, SMOOTH, loss=loss).closed
    assert closed is not None
    for m in ([-1e3, -2.0, 0.5], [-1e-9, 0.0, 1e-9, 0.3], [2.9, 3.1, 40.0], [800.0, 801.5, 1e5]):
        z = torch.tensor(m, dtype=torch.float64, requires_grad=True)
        value = function.log_mean(function.scores(z, torch.ones(len(m), dtype=torch.int64)))
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        bend = torch.stack([torch.autograd.grad(s, z, retain_graph=True)[0] for s in slope])
        margins = np.array(m)
        log_loss, smoothed, least = closed.levels(margins)
        assert log_loss == pytest.approx(float(value.detach()), rel=1e-14, abs=1e-14)
        assert smoothed == pytest.approx(-float(torch.logsumexp(-z, 0).detach()), rel=1e-14)
        assert least == min(m)
        slopes = closed.slopes(margins)
        np.testing.assert_allclose(slopes, slope.detach().numpy(), rtol=1e-13, atol=1e-15)
        bends = np.diag(closed.bends(margins)) - np.outer(slopes, slopes)
        np.testing.assert_allclose(bends, bend.numpy(), rtol=1e-11, atol=1e-13)


def test_examples_that_weigh_nothing_are_left_out() -> None:
    data = mf.load("separable:n=300,d=10,margin=0.05,seed=1").to(dtype=torch.float64)
    model = mf.models.mlp(10, 16, 1, seed=0).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(30.0)
    ours, theirs = both(model, data, "fgsm:eps=0.01")
    w = ours.read()
    assert isinstance(ours.closed, Held)
    weights = -ours.closed.slopes(ours.closed.velocity(w)[1])
    assert 2 * (weights > 1e-25).sum() < len(weights), "the case is one where they are"
    assert away(ours(w).velocity, theirs(w).velocity) <= 1e-12


def test_images_are_flattened() -> None:
    data = mf.Dataset(SMOOTH.x.reshape(-1, 1, 2, 2), SMOOTH.y)
    model = mf.models.mlp(4, 6, 1, activation="squared-relu", seed=1).double()
    ours, theirs = both(model, data, "fgm:eps=0.05")
    w = ours.read()
    assert away(ours(w).velocity, theirs(w).velocity) <= 1e-12


class Skip(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def plain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules).double()


def line(rows: int = 1, columns: int = 4, bias: bool = False) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias)


def shared() -> nn.Module:
    once = line(4)
    return plain(once, nn.ReLU(), once, line())


def frozen() -> nn.Module:
    model = plain(line(4), line())
    next(model.parameters()).requires_grad_(False)
    return model


def hooked() -> nn.Module:
    model = plain(line(4), line())
    model[0].register_forward_hook(lambda module, x, out: 2 * out)
    return model


def patched() -> nn.Module:
    model = plain(line(4), line())
    model.forward = lambda x: x.sum(dim=1, keepdim=True)  # type: ignore[method-assign]
    return model


DENSE: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: plain(line()),
    "no activation": lambda: plain(line(5), line(1, 5)),
    "nested": lambda: plain(nn.Flatten(), nn.Sequential(line(5), nn.ReLU()), nn.Identity(), line(1, 5)),
    "some activations": lambda: plain(line(5), line(3, 5), nn.LeakyReLU(0.3), line(1, 3)),
}  # fmt: skip
OTHER: dict[str, Callable[[], nn.Module]] = {
    "bias": lambda: plain(line(5), line(1, 5, bias=True)),
    "skip": lambda: plain(Skip(4, 4, bias=False), line()),
    "shared": shared,
    "frozen": frozen,
    "hooked": hooked,
    "patched": patched,
    "activation at the end": lambda: plain(line(4), line(), nn.ReLU()),
    "activation at the start": lambda: plain(nn.ReLU(), line(4), line()),
    "two in a row": lambda: plain(line(4), nn.ReLU(), nn.ReLU(), line()),
    "tanh": lambda: plain(line(4), nn.Tanh(), line()),
    "float32": lambda: nn.Sequential(line(4), line()),
    "diagonal": lambda: mf.models.diagonal_linear(4, 2, seed=0).double(),
    "weight norm": lambda: plain(nn.utils.parametrizations.weight_norm(line(4)), line()),
}


@pytest.mark.parametrize("name", DENSE)
def test_networks_in_closed_form(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = both(DENSE[name](), SMOOTH, "fgsm:eps=0.05")
    w = ours.read()
    assert away(ours(w).velocity, theirs(w).velocity) <= 1e-12
    assert away(ours.jacobian(w), theirs.jacobian(w)) <= 1e-10


@pytest.mark.parametrize("name", OTHER)
def test_networks_that_go_by_autograd(name: str) -> None:
    assert field_of(OTHER[name](), SMOOTH).closed is None


@pytest.mark.parametrize(
    "attack",
    [
        *("pgd-l2:eps=0.05,steps=3", "pgd-linf:eps=0.05,steps=2,random=true"),
        *("fgsm:eps=0.05,bounds=-9..9", "fgm:eps=0.05,objective=loss", "exact-linear:p=2,eps=0.1"),
        mf.attacks.FiniteSet(torch.zeros(1, 7)),
    ],
    ids=str,
)
def test_attacks_that_go_by_autograd(attack: Any) -> None:
    model = mf.models.mlp(4, 6, 1, seed=0).double()
    assert field_of(model, SMOOTH).closed is not None
    assert field_of(model, SMOOTH, attack).closed is None


def test_data_and_losses_that_go_by_autograd() -> None:
    images = mf.Dataset(SMOOTH.x.reshape(-1, 2, 2), SMOOTH.y)
    assert field_of(plain(line(4, 2), line()), images).closed is None
    narrow = mf.Dataset(SMOOTH.x.float(), SMOOTH.y)
    assert field_of(plain(line(4), line()), narrow).closed is None
    three = mf.Dataset(SMOOTH.x, torch.arange(8) % 3)
    assert field_of(plain(line(4), line(3)), three, loss="cross-entropy").closed is None


def test_detached_fgm_of_a_linear_network_is_conservative() -> None:
    """The input gradient of a linear network is the same everywhere, so FGM is exact there."""
    model = mf.models.deep_linear(4, 6, 1, seed=0).double()
    ours, theirs = both(model, SMOOTH, "fgm:eps=0.05", derivative="detached")
    assert ours.conservative
    assert not theirs.conservative
    w = ours.read()
    assert away(ours(w).velocity, theirs.potential_slope(w)) <= 1e-12
