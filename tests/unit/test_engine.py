"""One step's gradient against a naive loop, and Lemma 4 for every attack, loss and derivative."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_attacks import ATTACKS, EXACT, call, make
from torch import nn
from unit_oracles import Case, case, naive_margin, scale_layers

from marginflow.attacks import FGM, Derivative
from marginflow.engine import AutogradEngine
from marginflow.homogeneity import measure_homogeneity
from marginflow.losses import Exponential, Loss, get_loss

LEMMA = [
    (attack, network)
    for attack in ("none", *ATTACKS)
    for network in ("relu", "leaky", "squared", "cnn-binary", "linear")
    if attack not in EXACT or network == "linear"
]


def engine_of(
    c: Case, loss: Loss, attack_name: str, derivative: Derivative = "detached"
) -> AutogradEngine:
    attack = None if attack_name == "none" else make(attack_name, tuple(c.x.shape[1:]))
    return AutogradEngine(c.model, loss, attack, derivative)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
@pytest.mark.parametrize(("attack_name", "network"), LEMMA)
def test_gradient_against_a_naive_loop(attack_name: str, network: str, loss: str) -> None:
    """``G = (1/n) Σ ℓ′(m_i) ∇_W m_i``, one example and one backward pass at a time."""
    c = case(network)
    result = engine_of(c, get_loss(loss), attack_name)(c.x, c.y, generator())
    delta = torch.zeros_like(c.x)
    if attack_name != "none":
        delta = call(make(attack_name, tuple(c.x.shape[1:])), c.model, c.x, c.y).delta
    parameters = list(c.model.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    total, n = 0.0, len(c.y)
    for i, label in enumerate(c.y.tolist()):
        margin = naive_margin(c.model, c.x[i] + delta[i], label)
        gradients = torch.autograd.grad(margin, parameters)
        m = margin.detach()
        slope = -torch.exp(-m) if loss == "exponential" else -1 / (1 + torch.exp(m))
        value = torch.exp(-m) if loss == "exponential" else torch.log1p(torch.exp(-m))
        total += value.item() / n
        for sum_, gradient in zip(expected, gradients, strict=True):
            sum_ += slope * gradient / n
        assert result.margins[i].item() == pytest.approx(m.item(), rel=1e-12, abs=1e-15)
    assert result.loss.item() == pytest.approx(total, rel=1e-13)
    for found, want in zip(result.gradients, expected, strict=True):
        assert (found - want).abs().max() <= 1e-12 * want.abs().max()


def test_cross_entropy_against_a_naive_loop() -> None:
    c = case("cnn")
    result = engine_of(c, get_loss("cross-entropy"), "fgm")(c.x, c.y)
    delta = FGM(eps=0.3)(c.model, c.x, c.y).delta
    parameters = list(c.model.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    for i in range(len(c.y)):
        outputs = c.model((c.x + delta)[i : i + 1])
        value = nn.functional.cross_entropy(outputs, c.y[i : i + 1])
        for sum_, g in zip(expected, torch.autograd.grad(value, parameters), strict=True):
            sum_ += g / len(c.y)
    for found, want in zip(result.gradients, expected, strict=True):
        assert (found - want).abs().max() <= 1e-12 * want.abs().max()
    assert result.outputs.shape == (7, 3)


@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize("loss", ["exponential", "logistic"])
@pytest.mark.parametrize(("attack_name", "network"), LEMMA)
def test_lemma_4(attack_name: str, network: str, loss: str, derivative: Derivative) -> None:
    """``⟨W_k, G_k⟩ = −(c_k/n) Σ |ℓ′(m_i)| m_i``: scale invariance of δ makes it hold for both."""
    c = case(network)
    degrees = measure_homogeneity(c.model, c.x).degrees
    result = engine_of(c, get_loss(loss), attack_name, derivative)(c.x, c.y, generator())
    m = result.margins
    slopes = torch.exp(-m) if loss == "exponential" else 1 / (1 + torch.exp(m))
    nu = (slopes * m).mean().item()
    for w, g, degree in zip(c.model.parameters(), result.gradients, degrees, strict=True):
        product = (w.detach() * g).sum().item()
        assert product == pytest.approx(-degree * nu, rel=1e-10)


def test_lemma_4_fails_for_the_total_gradient_of_an_attack_on_the_loss() -> None:
    """Several classes: δ(W) of the loss is not scale invariant, and the identity shows it."""
    c = case("squared-classes")
    products = {}
    for objective in ("margin", "loss"):
        attack = FGM(eps=0.3, objective=objective)
        per_degree = {}
        for derivative in ("detached", "total"):
            engine = AutogradEngine(c.model, get_loss("cross-entropy"), attack, derivative)
            gradients = engine(c.x, c.y).gradients
            per_degree[derivative] = [
                (w.detach() * g).sum().item() / degree
                for w, g, degree in zip(c.model.parameters(), gradients, (2, 1), strict=True)
            ]
        products[objective] = per_degree
    # Moving W along itself does not move a scale-invariant δ, so both derivatives agree there.
    assert products["margin"]["total"] == pytest.approx(products["margin"]["detached"], rel=1e-12)
    difference = products["loss"]["total"][0] - products["loss"]["detached"][0]
    assert abs(difference) > 1e-4 * abs(products["loss"]["detached"][0])


@pytest.mark.parametrize("derivative", ["detached", "total"])
def test_grad_fields_are_not_touched(derivative: Derivative) -> None:
    c = case("squared")
    first = next(c.model.parameters())
    first.grad = torch.full_like(first, 3.0)
    result = engine_of(c, Exponential(), "fgm", derivative)(c.x, c.y)
    assert (first.grad == 3).all()
    assert [p.grad for p in c.model.parameters()][1:] == [None, None]
    assert not result.loss.requires_grad
    assert not any(g.requires_grad for g in result.gradients)
    assert not result.margins.requires_grad
    assert not result.outputs.requires_grad


@pytest.mark.parametrize("attack_name", ["none", "fgm"])
def test_frozen_parameters_have_no_gradient(attack_name: str) -> None:
    c = case("relu")
    everything = engine_of(c, Exponential(), attack_name)(c.x, c.y).gradients
    next(c.model.parameters()).requires_grad_(False)
    engine = engine_of(c, Exponential(), attack_name)
    assert len(engine.parameters) == 2
    for found, expected in zip(engine(c.x, c.y).gradients, everything[1:], strict=True):
        assert torch.equal(found, expected)


def test_an_unused_parameter_has_gradient_zero() -> None:
    c = case("relu")
    c.model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))  # type: ignore[assignment]
    gradients = engine_of(c, Exponential(), "fgm", "total")(c.x, c.y).gradients
    assert not gradients[-1].any() or gradients[-1].shape != (2,)
    assert sum(g.shape == (2,) and not g.any() for g in gradients) == 1


def test_the_step_runs_in_the_models_own_mode() -> None:
    """The adversary sees evaluation mode; the training step keeps dropout and batch statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.BatchNorm1d(50), nn.Dropout(0.5), nn.Linear(50, 1))
    model = model.double().train()
    c = case("relu")
    engine = AutogradEngine(model, get_loss("logistic"), FGM(eps=0.1))
    first, second = engine(c.x, c.y), engine(c.x, c.y)
    assert not torch.equal(first.outputs, second.outputs)
    assert model[1].num_batches_tracked.item() == 2
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize(
    ("loss", "network"),
    [("exponential", "squared"), ("logistic", "squared"), ("cross-entropy", "squared-classes")],
)
def test_a_log_reference_divides_the_gradient(
    loss: str, network: str, derivative: Derivative
) -> None:
    c = case(network)
    engine = engine_of(c, get_loss(loss), "fgm", derivative)
    plain, divided = engine(c.x, c.y), engine(c.x, c.y, log_reference=-3.0)
    assert torch.equal(divided.loss, plain.loss)
    for found, expected in zip(divided.gradients, plain.gradients, strict=True):
        assert torch.allclose(found, math.exp(3) * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_with_the_log_loss_as_reference_the_gradient_is_that_of_the_log_loss(loss: str) -> None:
    """Margins of thousands in float32: L is 0, ``∇L/L = ∇ ln L = −Σ w_i ∇m_i`` is not."""
    c = case("relu", dtype=torch.float32)
    y = torch.sign(c.model(c.x).detach().reshape(-1)).long()
    scale_layers(c.model, [2.0**14, 1, 1])
    scorer = get_loss(loss)
    engine = AutogradEngine(c.model, scorer, None)
    z = scorer.scores(c.model(c.x), y).detach()
    result = engine(c.x, y, log_reference=scorer.log_mean(z).item())
    assert z.min() > 110
    assert not any(g.any() for g in engine(c.x, y).gradients)
    double = Case(copy.deepcopy(c.model).double(), c.x.double(), y)
    log_loss = scorer.log_mean(scorer.scores(double.model(double.x), y))
    expected = torch.autograd.grad(log_loss, list(double.model.parameters()))
    for found, want in zip(result.gradients, expected, strict=True):
        # Margins of hundreds are known to 1e-5 in float32, and so are their weights.
        assert (found.double() - want).abs().max() <= 1e-3 * want.abs().max()


@pytest.mark.parametrize("attack_name", ["none", "fgm", "pgd-linf", "finite-set"])
def test_the_log_loss_is_the_logarithm_of_the_loss(attack_name: str) -> None:
    for loss, network in [("exponential", "relu"), ("cross-entropy", "classes")]:
        c = case(network, n=13)
        engine = engine_of(c, get_loss(loss), attack_name)
        expected = math.log(engine(c.x, c.y).loss.item())
        for batch_size in (1, 4, 13, 1024):
            found = engine.log_loss(c.x, c.y, batch_size=batch_size)
            assert found == pytest.approx(expected, rel=1e-12)
