from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from test_attacks import call, make
from torch import Tensor, nn
from unit_oracles import NETWORKS, Case, case, laws, naive_margins, scale_layers

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, ExactLinear, FiniteSet
from marginflow.errors import DataError, InputError, ModelError, NotHomogeneousError
from marginflow.homogeneity import measure_homogeneity
from marginflow.margins import Margins, adversarial_margins

ATTACKS = ["fgm", "fgsm", "pgd-l2", "pgd-linf", "finite-set"]


def of(c: Case, attack: Attack | None = None, **options: object) -> Margins:
    return adversarial_margins(c.model, c.x, c.y, attack, **options)  # type: ignore[arg-type]


def fixed(values: list[float], rho: float = 1.0) -> Margins:
    """Margins given by hand."""
    dead = torch.zeros(len(values), dtype=torch.bool)
    return Margins(torch.tensor(values, dtype=torch.float64), rho, rho, 1.0, dead)


# --- values


@pytest.mark.parametrize("network", NETWORKS)
def test_clean_margins_against_a_naive_loop(network: str) -> None:
    c = case(network, n=13)
    found = of(c)
    assert found.values.dtype == torch.float64
    expected = naive_margins(c.model, c.x, c.y)
    assert (found.values - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert not found.dead_inputs.any()


@pytest.mark.parametrize("attack_name", ATTACKS)
@pytest.mark.parametrize("network", ["relu", "squared", "classes", "cnn", "linear-classes"])
def test_adversarial_margins_against_a_naive_loop(attack_name: str, network: str) -> None:
    c = case(network, n=13)
    attack = make(attack_name, tuple(c.x.shape[1:]))
    found = of(c, attack, batch_size=4)
    alone = [call(attack, c.model, c.x[i : i + 1], c.y[i : i + 1]) for i in range(len(c.y))]
    delta = torch.cat([one.delta for one in alone])
    expected = naive_margins(c.model, c.x + delta, c.y)
    assert (found.values - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert found.dead_inputs.tolist() == [bool(one.dead_inputs) for one in alone]


@pytest.mark.parametrize("attack_name", [None, *ATTACKS])
@pytest.mark.parametrize("network", ["relu", "classes", "cnn"])
def test_the_batch_size_changes_nothing(attack_name: str | None, network: str) -> None:
    c = case(network, n=23)
    attack = None if attack_name is None else make(attack_name, tuple(c.x.shape[1:]))
    loss = "logistic" if c.binary else "cross-entropy"
    whole = of(c, attack, loss=loss)
    for batch_size in (1, 5, 22, 23):
        parts = of(c, attack, loss=loss, batch_size=batch_size)
        assert (parts.values - whole.values).abs().max() <= 1e-12 * whole.values.abs().max()
        assert torch.equal(parts.dead_inputs, whole.dead_inputs)
        assert parts.log_loss == pytest.approx(whole.log_loss, rel=1e-12)
        assert parts.rho == whole.rho


@pytest.mark.parametrize("network", NETWORKS)
def test_no_attack_is_an_attack_without_budget(network: str) -> None:
    c = case(network)
    clean = of(c)
    for attack in (FGM(eps=0), FGSM(eps=0), PGD("l2", eps=0), PGD("linf", eps=0)):
        assert torch.equal(of(c, attack).values, clean.values)
    zero = FiniteSet(torch.zeros(1, *c.x.shape[1:]))
    assert torch.equal(of(c, zero).values, clean.values)


def test_a_larger_exact_budget_leaves_a_smaller_margin() -> None:
    c = case("linear-classes", n=20)
    minima = [of(c, ExactLinear(2, eps)).values for eps in (0.0, 0.1, 0.2, 0.5)]
    for larger, smaller in pairwise(minima):
        assert (smaller < larger).all()


def test_a_float32_model_is_measured_in_float32_and_reported_in_float64() -> None:
    c = case("relu", n=9, dtype=torch.float32)
    found = adversarial_margins(c.model, c.x.double(), c.y, FGM(eps=0.1))
    assert found.values.dtype == torch.float64
    assert torch.equal(found.values, found.values.float().double())
    assert torch.equal(found.values, of(c, FGM(eps=0.1)).values)


def test_a_random_start_is_a_function_of_the_seed() -> None:
    c = case("relu", n=9)
    attack = PGD("l2", eps=0.3, steps=1, random_start=True)
    assert torch.equal(of(c, attack, seed=3).values, of(c, attack, seed=3).values)
    assert not torch.equal(of(c, attack, seed=3).values, of(c, attack, seed=4).values)


# --- normalisation


@pytest.mark.parametrize("network", NETWORKS)
def test_normalisation_against_numpy(network: str) -> None:
    c = case(network)
    found = of(c, FGM(eps=0.1))
    norms = [np.linalg.norm(p.detach().numpy().ravel()) for p in c.model.parameters()]
    degrees = measure_homogeneity(c.model, c.x).degrees
    rho = np.prod([r**d for r, d in zip(norms, degrees, strict=True)])
    total = math.sqrt(sum(r * r for r in norms))
    assert found.order == sum(degrees)
    assert found.rho == pytest.approx(rho, rel=1e-14)
    assert found.total_norm == pytest.approx(total, rel=1e-14)
    np.testing.assert_allclose(found.normalized, found.values.numpy() / rho, rtol=1e-14)
    expected = found.values.numpy() / total ** sum(degrees)
    np.testing.assert_allclose(found.normalized_by_total, expected, rtol=1e-13)
    assert found.normalized_min == found.normalized.min().item()
    assert found.smoothed_normalized == pytest.approx(found.smoothed / rho, rel=1e-14)


@pytest.mark.parametrize("attack_name", [None, *ATTACKS])
@pytest.mark.parametrize("network", ["relu", "squared", "classes", "cnn"])
def test_normalised_margins_do_not_see_the_size_of_the_layers(
    attack_name: str | None, network: str
) -> None:
    c = case(network)
    attack = None if attack_name is None else make(attack_name, tuple(c.x.shape[1:]))
    before = of(c, attack)
    count = len(list(c.model.parameters()))
    scale_layers(c.model, [0.3, 7.1, 1.9, 2.3][:count])
    after = of(c, attack)
    size = before.normalized.abs().max()
    assert (after.normalized - before.normalized).abs().max() <= 1e-12 * size
    scale_layers(c.model, [2.0] * count)  # and exactly so for a power of two
    doubled = of(c, attack)
    assert doubled.rho == after.rho * 2.0**after.order  # type: ignore[operator]
    assert torch.equal(doubled.normalized, after.normalized)
    # ‖W‖ sees only a common factor.
    found, expected = doubled.normalized_by_total, after.normalized_by_total
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_margins_of_networks_that_are_not_homogeneous() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 1)).double()
    c = case("relu")
    with pytest.raises(NotHomogeneousError):
        adversarial_margins(model, c.x, c.y, FGM(eps=0.1))
    found = adversarial_margins(model, c.x, c.y, FGM(eps=0.1), normalize=False)
    delta = FGM(eps=0.1)(model, c.x, c.y).delta
    assert torch.allclose(found.values, naive_margins(model, c.x + delta, c.y), rtol=1e-13)
    assert (found.rho, found.total_norm, found.order) == (None, None, None)
    for name in ("normalized", "normalized_by_total", "normalized_min", "smoothed_normalized"):
        with pytest.raises(ModelError, match="taken with normalize=False"):
            getattr(found, name)
    with pytest.raises(ModelError, match="normalize=False"):
        found.quantiles([0.5])


def test_a_measured_homogeneity_is_used_as_it_is() -> None:
    c = case("squared")
    homogeneity = measure_homogeneity(c.model, c.x)
    assert of(c, homogeneity=homogeneity).rho == of(c).rho


def test_layers_of_zero_or_beyond_all_bounds() -> None:
    c = case("relu")
    homogeneity = measure_homogeneity(c.model, c.x)
    scale_layers(c.model, [1, 0, 1])
    with pytest.raises(ModelError, match="product of the layer norms is 0"):
        of(c, homogeneity=homogeneity)
    big = case("squared")
    homogeneity = measure_homogeneity(big.model, big.x)
    scale_layers(big.model, [1e100, 1, 1])
    with pytest.raises(ModelError, match="product of the layer norms is inf"):
        of(big, homogeneity=homogeneity)


# --- statistics of margins

values = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40)


@laws
@given(values, st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.01, 100))
def test_quantiles_are_numpys(margins: list[float], levels: list[float], rho: float) -> None:
    found = fixed(margins, rho).quantiles(levels)
    expected = np.quantile(np.array(margins) / rho, levels)
    size = np.abs(margins).max() / rho
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-15 * size)


def test_quantiles_at_the_ends() -> None:
    margins = fixed([3.0, -1.0, 2.0], rho=2.0)
    assert margins.quantiles([0, 0.5, 1]).tolist() == [-0.5, 1.0, 1.5]
    assert margins.quantiles([]).tolist() == []
    for level in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"levels in \[0, 1\]"):
            margins.quantiles([0.5, level])


@laws
@given(values)
def test_smoothed_margin_is_minus_logsumexp(margins: list[float]) -> None:
    """``ℓ ≤ m_min ≤ ℓ + ln n`` (the paper's Eq. 105 has it reversed)."""
    found = fixed(margins)
    assert found.smoothed == pytest.approx(-logsumexp(-np.array(margins)), rel=1e-14, abs=1e-13)
    slack = 1e-15 * max(map(abs, margins))
    assert found.smoothed <= found.min + slack
    assert found.min <= found.smoothed + math.log(len(margins)) + slack + 1e-15


@pytest.mark.parametrize("network", ["relu", "linear"])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_the_log_loss_brackets_the_smallest_margin(network: str, size: float) -> None:
    """``ℓ = ln(1/(nL)) ≤ m_min ≤ ln(1/L)`` for the exponential loss."""
    c = case(network, n=20)
    scale_layers(c.model, [size, 1.0, 1.0])
    found = of(c, FGM(eps=0.05), loss="exponential")
    assert found.log_loss is not None
    assert found.smoothed == pytest.approx(-found.log_loss - math.log(20), rel=1e-14)
    assert found.smoothed <= found.min <= -found.log_loss
    expected = logsumexp(-found.values.numpy()) - math.log(20)
    assert found.log_loss == pytest.approx(expected, rel=1e-14)


def test_the_log_loss_of_several_classes() -> None:
    c = case("classes", n=20)
    found = of(c, loss="cross-entropy")
    expected = nn.functional.cross_entropy(c.model(c.x), c.y).item()
    assert found.log_loss == pytest.approx(math.log(expected), rel=1e-13)
    assert of(c).log_loss is None


def test_accuracy_counts_margins_above_zero() -> None:
    assert fixed([1.0, 0.0, -1.0, 1e-300]).accuracy == 0.5
    assert fixed([0.0]).accuracy == 0.0
    c = case("relu")
    x = c.x.clone()
    x[:2] = 0  # margin exactly 0: a tie is no success
    found = adversarial_margins(c.model, x, c.y)
    assert found.accuracy == (naive_margins(c.model, x, c.y) > 0).sum().item() / len(c.y)
    assert not found.values[:2].any()


# --- memory, traces, misuse


@pytest.mark.parametrize("attack_name", [None, *ATTACKS])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_memory_grows_with_the_batch_not_with_the_data(
    attack_name: str | None, batch_size: int
) -> None:
    c = case("relu", n=50)
    homogeneity = measure_homogeneity(c.model, c.x)
    attack = None if attack_name is None else make(attack_name, (6,))
    largest = 0

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal largest
        largest = max(largest, len(args[0]))

    handle = c.model.register_forward_pre_hook(record)
    of(c, attack, batch_size=batch_size, homogeneity=homogeneity)
    handle.remove()
    assert largest == batch_size


def test_measuring_the_homogeneity_takes_a_few_probes() -> None:
    c = case("relu", n=500)
    seen: list[int] = []
    handle = c.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    of(c, batch_size=4)
    handle.remove()
    assert max(seen) <= 32


@pytest.mark.parametrize("random_start", [False, True])
def test_nothing_is_left_behind(random_start: bool) -> None:
    c = case("relu")
    c.model.train()
    next(c.model.parameters()).grad = torch.ones_like(next(c.model.parameters()))
    state = {k: v.clone() for k, v in c.model.state_dict().items()}
    rng = torch.get_rng_state()
    of(c, PGD("l2", eps=0.1, random_start=random_start), loss="logistic")
    assert all(torch.equal(v, state[k]) for k, v in c.model.state_dict().items())
    assert all(m.training for m in c.model.modules())
    grads = [p.grad for p in c.model.parameters()]
    assert (grads[0] == 1).all()  # type: ignore[union-attr]
    assert grads[1:] == [None, None]
    assert torch.equal(torch.get_rng_state(), rng)


def test_dropout_is_off_while_margins_are_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 20, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 1, bias=False)
    ).double()
    c = case("relu")
    found = adversarial_margins(model, c.x, c.y, normalize=False)
    assert torch.equal(found.values, adversarial_margins(model.eval(), c.x, c.y).values)


@pytest.mark.parametrize(
    ("x", "y", "error", "says"),
    [
        (torch.zeros(0, 6), torch.zeros(0), DataError, "at least one example"),
        (torch.tensor(1.0), torch.tensor([1]), DataError, "at least one example"),
        (torch.ones(3, 6), torch.ones(2), DataError, "as many labels as examples"),
        (torch.ones(3, 6), torch.ones(3, 1), DataError, "as many labels as examples"),
        (torch.ones(3, 6), torch.tensor(1), DataError, "as many labels as examples"),
        (torch.ones(3, 6), torch.tensor([0, 1, 1]), DataError, "expected −1 and"),
        (torch.ones(3, 5), torch.ones(3), ModelError, "does not take inputs"),
    ],
)
def test_data_that_do_not_fit(x: Tensor, y: Tensor, error: type, says: str) -> None:
    model = mf.models.mlp(6, 5, 1, seed=0)
    with pytest.raises(error, match=says):
        adversarial_margins(model, x, y)


def test_other_misuse() -> None:
    c = case("relu")
    for batch_size in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="batch_size: expected a whole number"):
            of(c, batch_size=batch_size)
    with pytest.raises(InputError, match="unknown loss 'hinge'"):
        of(c, loss="hinge")
    with pytest.raises(DataError, match="use loss='logistic'"):
        of(c, loss="cross-entropy")
    with pytest.raises(DataError, match="expected values in the bounds"):
        of(c, FGM(eps=0.1, bounds=(0, 1)))
