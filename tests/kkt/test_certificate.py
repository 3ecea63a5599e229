"""The certificate against a naive loop over the examples and scipy's non-negative least squares."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kkt_oracles import (
    LAYERED,
    NETWORKS,
    Case,
    Naive,
    case,
    exponential,
    logistic,
    naive,
    naive_fgm,
    relative,
    vector,
)
from torch import nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear, FiniteSet

EPS = 0.01


def deltas(attack: Attack, c: Case) -> torch.Tensor:
    return attack(c.model, c.x, c.y, generator=torch.Generator().manual_seed(0)).delta


def compare(cert: mf.Certificate, expected: Naive, taus: tuple[float, ...] = ()) -> None:
    """The certificate's every number that the naive loop knows."""
    support, multipliers, residual = expected.best(cert.tau)
    assert np.abs(cert.margins.numpy() - expected.margins).max() <= 1e-12
    assert cert.support.tolist() == support.tolist()
    assert cert.residual == pytest.approx(residual, abs=1e-10)
    if np.linalg.matrix_rank(expected.gradients[support]) == len(support):  # then they are unique
        assert np.abs(cert.multipliers.numpy() - multipliers).max() <= 1e-8 * multipliers.max()
    assert abs(cert.self_check - 1) <= 1e-10
    assert cert.solver_gap <= 1e-12
    assert cert.norm == pytest.approx(float(np.linalg.norm(expected.weights)), rel=1e-14)
    paper, chi, cosine = expected.paper(exponential)
    assert np.abs(cert.paper_multipliers.numpy() - paper).max() <= 1e-10 * paper.max()
    assert cert.stationarity == pytest.approx(chi, rel=1e-9)
    assert cert.cosine == pytest.approx(cosine, abs=1e-12)
    slack = paper * (expected.margins / expected.margins.min() - 1)
    assert cert.complementarity == pytest.approx(slack.max(), rel=1e-9)
    assert cert.complementarity <= cert.complementarity_bound
    assert cert.residuals.paper == pytest.approx(math.sqrt(2 * (1 - cosine)), rel=1e-9)
    assert cert.residuals.tangential == pytest.approx(math.sqrt(1 - cosine**2), rel=1e-9)
    assert cert.residuals.best == pytest.approx(expected.best(math.inf)[2], abs=1e-10)
    for tau in taus:
        at = cert.curve.taus.tolist().index(tau)
        assert float(cert.curve.residuals[at]) == pytest.approx(expected.best(tau)[2], abs=1e-10)
        assert int(cert.curve.supports[at]) == len(expected.best(tau)[0])


@pytest.mark.parametrize("tau", [0.0, 2.0, math.inf])
@pytest.mark.parametrize("network", NETWORKS)
def test_clean_margins(network: str, tau: float) -> None:
    c = case(network)
    taus = (0.5, 2.0, 10.0)
    cert = mf.kkt_certificate(c.model, c.x, c.y, tau=tau, taus=taus)
    order = {"squared": 7, "squared-classes": 3}.get(network)
    order = order or {"leaky": 2, "first-bias": 2, "cnn": 4}.get(network, 3)
    assert cert.order == order
    compare(cert, naive(c, order), taus)
    layered = network in LAYERED
    assert cert.method == ("layer inputs and signals" if layered else "per-example gradients")
    assert torch.equal(cert.adversarial_examples, c.x[cert.support])


@pytest.mark.parametrize("network", ["relu", "squared", "classes", "cnn", "first-bias", "tied"])
@pytest.mark.parametrize(
    "attack",
    [FGSM(EPS), PGD("linf", EPS, steps=3), PGD("linf", EPS, steps=2, random_start=True)],
    ids=str,
)
def test_signs_make_the_total_derivative_the_detached_one(network: str, attack: Attack) -> None:
    c = case(network, attack=attack)
    delta = deltas(attack, c)
    order = 7 if network == "squared" else (4 if network == "cnn" else 3)
    order = 2 if network == "first-bias" else order
    expected = naive(c, order, lambda x, label, i: x + delta[i])
    total = mf.kkt_certificate(c.model, c.x, c.y, attack)
    compare(total, expected)
    assert torch.equal(total.adversarial_examples, (c.x + delta)[total.support])
    detached = mf.kkt_certificate(c.model, c.x, c.y, attack, derivative="detached")
    assert detached.residual == total.residual
    assert total.method == "layer inputs and signals" or network == "tied"


@pytest.mark.parametrize("network", ["relu", "squared", "squared-classes", "cnn"])
def test_total_derivative_through_fgm(network: str) -> None:
    """Against autograd through the formula (87), one example at a time."""
    attack = FGM(0.2)
    c = case(network, attack=attack)
    order = {"squared": 7, "cnn": 4}.get(network, 3)
    total = mf.kkt_certificate(c.model, c.x, c.y, attack)
    compare(total, naive(c, order, lambda x, label, i: naive_fgm(c.model, x, label, 0.2)))
    assert total.method == "per-example gradients"
    delta = deltas(attack, c)
    detached = mf.kkt_certificate(c.model, c.x, c.y, attack, derivative="detached")
    compare(detached, naive(c, order, lambda x, label, i: x + delta[i]))
    assert detached.method == "layer inputs and signals"
    # The path through δ matters.
    assert abs(detached.residuals.tangential - total.residuals.tangential) > 1e-6


def test_a_kink_where_delta_is_formed_is_no_tie() -> None:
    """FGM jumps where a unit is at its kink on the clean example: one gradient, autograd's, as at (87)."""
    model = mf.models.mlp(6, 12, 1, seed=0).double()
    x = torch.randn((8, 6), dtype=torch.float64)
    x[0, 1:] = 0
    with torch.no_grad():
        next(model.parameters())[:3, 0] = 0
        y = torch.where(model(x)[:, 0] > 0, 1, -1)
    c = Case(model, x, y)
    expected = naive(c, 2, lambda x, label, i: naive_fgm(model, x, label, 0.01))
    keep = torch.from_numpy(expected.margins > 0)
    assert keep[0]
    c = Case(model, x[keep], y[keep])
    expected = naive(c, 2, lambda x, label, i: naive_fgm(model, x, label, 0.01))
    cert = mf.kkt_certificate(model, c.x, c.y, FGM(0.01), tau=math.inf)
    assert cert.residual == pytest.approx(expected.best(math.inf)[2], abs=1e-10)


def test_exact_maxima_need_no_path_through_delta() -> None:
    """Danskin, against autograd through the formula (10) on one hand and frozen δ on the other."""
    c = case("linear", attack=ExactLinear(2, 0.05))

    def worst(x: torch.Tensor, label: int, i: int) -> torch.Tensor:
        product = torch.linalg.multi_dot(list(reversed(list(c.model.parameters()))))[0]
        return x - label * 0.05 * product / product.square().sum().sqrt()

    cert = mf.kkt_certificate(c.model, c.x, c.y, ExactLinear(2, 0.05))
    assert cert.method == "layer inputs and signals"
    compare(cert, naive(c, 3, worst))


def test_a_finite_set_takes_its_worst_element() -> None:
    deltas = 0.1 * torch.randn((3, 6), dtype=torch.float64)
    attack = FiniteSet(deltas)
    c = case("squared", attack=attack)

    def worst(x: torch.Tensor, label: int, i: int) -> torch.Tensor:
        with torch.no_grad():
            values = [float(label * c.model((x + d).unsqueeze(0))) for d in deltas]
        return x + deltas[int(np.argmin(values))]

    compare(mf.kkt_certificate(c.model, c.x, c.y, attack), naive(c, 7, worst))


def test_the_logistic_loss_weighs_by_its_own_slopes() -> None:
    for network in ("relu", "classes"):
        c = case(network)
        cert = mf.kkt_certificate(c.model, c.x, c.y, loss="logistic")
        expected = naive(c, 3)
        paper, chi, cosine = expected.paper(logistic)
        assert np.abs(cert.paper_multipliers.numpy() - paper).max() <= 1e-10 * paper.max()
        assert cert.stationarity == pytest.approx(chi, rel=1e-9)
        assert cert.cosine == pytest.approx(cosine, abs=1e-12)
        assert cert.complementarity <= cert.complementarity_bound
        m = expected.margins.min()
        plain = cert.norm**2 / (math.e * 3 * m ** (1 + 2 / 3))
        assert plain <= cert.complementarity_bound <= plain * (1 + math.exp(-m))
        # The best multipliers know no loss.
        best = mf.kkt_certificate(c.model, c.x, c.y)
        assert cert.residual == best.residual
        assert best.complementarity_bound == pytest.approx(plain, rel=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(["relu", "squared", "classes", "linear", "leaky", "first-bias"]),
    st.integers(0, 10_000),
    st.floats(0.0, 50.0),
    st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_laws(network: str, seed: int, tau: float, scale: float) -> None:
    """The order of the residuals, the self-check, the bound, a falling curve; at any scale of W."""
    c = case(network, n=12, seed=seed)
    if len(c.y) < 2:
        return
    with torch.no_grad():
        for p in c.model.parameters():
            p.mul_(scale)
    cert = mf.kkt_certificate(c.model, c.x, c.y, tau=tau)
    assert cert.residuals.paper >= cert.residuals.tangential >= cert.residuals.best >= 0
    assert 0 <= cert.residuals.best <= cert.residual + 1e-12
    assert cert.residual <= 1
    assert abs(cert.self_check - 1) <= 1e-10
    assert cert.complementarity <= cert.complementarity_bound * (1 + 1e-12)
    assert bool((cert.multipliers >= 0).all())
    assert bool((cert.curve.residuals.diff() <= 0).all())
    assert bool((cert.curve.supports.diff() >= 0).all())
    assert cert.solver_gap <= 1e-12
    assert tau in cert.curve.taus.tolist() or tau > float(cert.curve.taus[-1])
    at = int((cert.curve.taus <= tau).sum()) - 1
    assert float(cert.curve.residuals[at]) == pytest.approx(cert.residual, abs=1e-9)


@pytest.mark.parametrize("network", ["relu", "squared-classes"])
def test_residuals_belong_to_the_direction(network: str) -> None:
    """Scaling W scales V not at all: the support, r and λ are those of the direction."""
    c = case(network)
    one = mf.kkt_certificate(c.model, c.x, c.y)
    with torch.no_grad():
        for p in c.model.parameters():
            p.mul_(4.0)
    four = mf.kkt_certificate(c.model, c.x, c.y)
    assert four.residual == pytest.approx(one.residual, abs=1e-12)
    assert (four.multipliers - one.multipliers).abs().max() <= 1e-12 * one.multipliers.max()
    assert four.margins.min() == pytest.approx(float(one.margins.min()) * 4.0**one.order)


# --- engines and memory


@pytest.mark.parametrize("network", ["relu", "classes", "cnn", "cnn-strided", "conv-linear"])
def test_blocks_and_batches_change_nothing(network: str) -> None:
    c = case(network)
    whole = mf.kkt_certificate(c.model, c.x, c.y, tau=math.inf)
    for memory, batch_size in [(1, 3), (5000, 7), (60_000, 1024)]:
        parts = mf.kkt_certificate(
            c.model, c.x, c.y, tau=math.inf, memory=memory, batch_size=batch_size
        )
        assert parts.residual == pytest.approx(whole.residual, abs=1e-12)
        assert (parts.multipliers - whole.multipliers).abs().max() <= 1e-9
        assert (parts.curve.residuals - whole.curve.residuals).abs().max() <= 1e-9


def test_a_random_start_in_the_total_derivative_hangs_on_the_example_alone() -> None:
    attack = PGD("l2", 0.1, steps=2, random_start=True)
    c = case("squared", attack=attack)
    options = {"tau": math.inf, "seed": 3}
    one = mf.kkt_certificate(c.model, c.x, c.y, attack, **options)
    other = mf.kkt_certificate(c.model, c.x, c.y, attack, **options, batch_size=4, memory=1)
    assert (one.margins - other.margins).abs().max() <= 1e-12
    assert one.residual == pytest.approx(other.residual, abs=1e-10)
    assert abs(one.self_check - 1) <= 1e-10  # the graph meets the very draw of the first pass
    another = mf.kkt_certificate(c.model, c.x, c.y, attack, tau=math.inf, seed=4)
    assert not torch.equal(one.margins, another.margins)


def test_fewer_multipliers_than_examples() -> None:
    """The smallest margins are kept; the order of the residuals holds nevertheless."""
    c = case("relu", n=60)
    full = mf.kkt_certificate(c.model, c.x, c.y, tau=math.inf)
    cut = mf.kkt_certificate(c.model, c.x, c.y, tau=math.inf, max_support=15)
    expected = naive(c, 3)
    assert cut.truncated
    assert not full.truncated
    kept = np.sort(np.argsort(expected.margins)[:15])
    assert cut.support.tolist() == kept.tolist()
    level = expected.margins[kept].max() / expected.margins.min() - 1
    assert cut.residual == pytest.approx(expected.best(level + 1e-12)[2], abs=1e-10)
    assert full.residual < cut.residual
    assert cut.residuals.paper == full.residuals.paper
    assert cut.residuals.tangential >= cut.residuals.best >= full.residuals.best
    assert cut.residuals.best < cut.residual
    assert int(cut.curve.supports[-1]) == 15
    assert "cut to the 15 smallest" in " ".join(str(cut).split())
    assert not mf.kkt_certificate(c.model, c.x, c.y, tau=0.0, max_support=15).truncated


# --- what is trainable


def test_frozen_parameters_are_constants() -> None:
    c = case("relu")
    first, *others = c.model.parameters()
    first.requires_grad_(False)
    cert = mf.kkt_certificate(c.model, c.x, c.y)
    assert cert.order == 2
    assert cert.norm == pytest.approx(
        math.sqrt(sum(float(p.detach().square().sum()) for p in others))
    )
    compare(cert, naive(c, 2))


def test_a_network_of_float32_is_certified_in_float64() -> None:
    c = case("relu")
    single = copy.deepcopy(c.model).float()
    cert = mf.kkt_certificate(single, c.x, c.y)
    compare(cert, naive(Case(copy.deepcopy(single).double(), c.x, c.y), 3))
    assert cert.multipliers.dtype == cert.adversarial_examples.dtype == torch.float64


def test_everything_is_left_as_it_was() -> None:
    c = case("first-bias")
    c.model.train()
    before = vector(c.model).copy()
    state = torch.random.get_rng_state()
    with torch.no_grad():  # as in somebody's evaluation loop
        mf.kkt_certificate(c.model, c.x, c.y, PGD("linf", EPS, steps=1, random_start=True))
    assert np.array_equal(vector(c.model), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in c.model.modules())
    assert all(p.grad is None for p in c.model.parameters())
    assert c.model[1].inplace  # type: ignore[union-attr]
    assert not any(m._forward_hooks for m in c.model.modules())


# --- ties and copies


def test_duplicated_examples_share_their_multiplier() -> None:
    c, once = case("relu", like=20), case("relu")
    twice = mf.kkt_certificate(c.model, c.x, c.y, tau=math.inf)
    single = mf.kkt_certificate(once.model, once.x, once.y, tau=math.inf)
    assert len(c.y) == 2 * len(once.y)
    assert twice.residual == pytest.approx(single.residual, abs=1e-12)
    total = float((twice.multipliers * c.y[twice.support]).abs().sum())
    assert total == pytest.approx(float(single.multipliers.sum()), rel=1e-9)
    assert abs(twice.self_check - 1) <= 1e-10


def test_one_example() -> None:
    c = case("relu")
    cert = mf.kkt_certificate(c.model, c.x[:1], c.y[:1])
    compare(cert, naive(Case(c.model, c.x[:1], c.y[:1]), 3))
    assert cert.curve.taus.tolist() == [0.0]
    assert cert.complementarity == 0.0


@pytest.mark.parametrize("batch_size", [1, 7, 1024])
@pytest.mark.parametrize("attack", [None, FGM(0.05), FGSM(EPS)], ids=str)
def test_only_the_fitted_examples(attack: Attack | None, batch_size: int) -> None:
    """Against the certificate of the fitted examples alone; the others change nothing but the count."""
    c = case("relu", attack=attack)
    wrong = torch.randn((9, 6), dtype=torch.float64)
    with torch.no_grad():
        labels = torch.where(c.model(wrong)[:, 0] > 0, -1, 1)
    x, y = torch.cat([c.x, wrong]).roll(5, 0), torch.cat([c.y, labels]).roll(5, 0)
    options: dict[str, Any] = {"tau": math.inf, "loss": "logistic", "batch_size": batch_size}
    whole = mf.kkt_certificate(c.model, x, y, attack, fitted_only=True, **options)
    fitted = whole.fitted
    assert whole.left_out == len(y) - len(fitted) >= len(wrong)
    assert whole.margins.shape == whole.paper_multipliers.shape == (len(y),)
    alone = mf.kkt_certificate(c.model, x[fitted], y[fitted], attack, **options)
    assert whole.support.tolist() == fitted[alone.support].tolist()
    assert torch.equal(whole.multipliers > 0, alone.multipliers > 0)
    for name in ("residual", "stationarity", "complementarity", "complementarity_bound", "cosine"):
        assert getattr(whole, name) == pytest.approx(getattr(alone, name), rel=1e-9), name
    assert whole.residuals == pytest.approx(alone.residuals, abs=1e-12)
    assert torch.allclose(whole.paper_multipliers[fitted], alone.paper_multipliers, rtol=1e-10)
    assert float(whole.paper_multipliers.sum()) == pytest.approx(
        float(alone.paper_multipliers.sum()), rel=1e-10
    )
    assert torch.allclose(whole.curve.residuals, alone.curve.residuals, atol=1e-12)
    assert torch.equal(whole.adversarial_examples, alone.adversarial_examples)
    assert f"{len(fitted)} of {len(y)}" in str(whole)
    assert alone.left_out == 0


def test_nothing_is_fitted() -> None:
    c = case("relu")
    with pytest.raises(mf.errors.InputError, match=r"none of the .* margins is positive"):
        mf.kkt_certificate(c.model, c.x, -c.y, fitted_only=True)


def test_everything_goes_into_json() -> None:
    c = case("relu")
    cert = mf.kkt_certificate(c.model, c.x, c.y, FGSM(1e-4), tau=math.inf, taus=[0.0, math.inf])
    found = json.loads(json.dumps(cert.as_dict(), allow_nan=False))
    assert found["tau"] is None
    assert found["curve"]["taus"] == [0.0, None]
    assert found["residual"] == cert.residual
    assert found["support"]["indices"] == cert.support.tolist()
    assert found["support"]["margins"] == cert.margins[cert.support].tolist()
    assert found["residuals"] == {
        "paper": cert.residuals.paper,
        "tangential": cert.residuals.tangential,
        "best": cert.residuals.best,
    }


def test_the_text_speaks_for_itself() -> None:
    c = case("relu")
    text = str(mf.kkt_certificate(c.model, c.x, c.y, FGSM(1e-4)))
    assert "far from a KKT point, as networks in practice are" in text
    assert "m_i ≤ 3 m_min" in text
    assert "fgsm:eps=0.0001" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_default_grid_is_log_spaced_in_examples() -> None:
    c = case("relu", n=30)
    cert = mf.kkt_certificate(c.model, c.x, c.y, tau=0.0)
    margins = np.sort(cert.margins.numpy())
    taus, supports = cert.curve.taus.numpy(), cert.curve.supports.tolist()
    assert (taus[0], supports[0], supports[-1]) == (0.0, 1, 30)
    assert supports == sorted({round(30 ** (k / 19)) for k in range(20)}), "each point adds some"
    assert taus == pytest.approx([margins[s - 1] / margins[0] - 1 for s in supports], abs=1e-12)


def test_one_minus_cosine_is_accurate_far_below_rounding() -> None:
    """One linear unit, one example, at the angle 1e-7: 1 − cos β = 5e-15, and sin β = r = 1e-7."""
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 3e-7]]))
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    cert = mf.kkt_certificate(model, x, torch.tensor([1]))
    tangent = 1e-7
    exact = tangent**2 / (1 + tangent**2 + math.sqrt(1 + tangent**2))
    assert relative(cert.cosine_gap, exact) <= 1e-7
    assert relative(cert.residual, tangent / math.sqrt(1 + tangent**2)) <= 1e-7
    assert relative(cert.residuals.paper, math.sqrt(2 * exact)) <= 1e-7
    assert relative(cert.residuals.tangential, tangent / math.sqrt(1 + tangent**2)) <= 1e-7


def test_units_that_have_all_but_died_are_at_no_kink() -> None:
    """Their input is tiny everywhere; its side is known, and the multipliers get no second piece."""
    model = mf.models.mlp(6, 8, 1, seed=3).double()
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((12, 6), generator=generator, dtype=torch.float64)
    y = torch.where(model(x).flatten() >= 0, 1, -1)
    first = next(model.parameters())
    with torch.no_grad():
        first[:3] *= 1e-11
    y = torch.where(model(x).flatten() >= 0, 1, -1)
    cert = mf.kkt_certificate(model, x, y, tau=1e6)
    columns = []
    for example, label in zip(x, y, strict=True):
        margin = label * model(example.unsqueeze(0)).squeeze()
        parts = torch.autograd.grad(margin, list(model.parameters()))
        columns.append(torch.cat([part.flatten() for part in parts]))
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    _, distance = scipy.optimize.nnls(torch.stack(columns, dim=1).numpy(), w.numpy())
    assert cert.residual == pytest.approx(distance / float(w.norm()), rel=1e-9)
