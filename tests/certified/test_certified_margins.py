"""What ``certified_margins`` promises whatever the method: refusals, choices, the sandwich."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import marginflow as mf
from marginflow.certified import INSTALL, read_bounds, save_bounds
from marginflow.errors import (
    DataError,
    InputError,
    MissingDependencyError,
    ModelError,
    RunError,
    SpecificationError,
)
from marginflow.margins import sandwiched

MODEL = mf.models.mlp(6, 5, 1, seed=0)
X = torch.rand(9, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(9) % 2 * 2 - 1
ATTACK = mf.attacks.FGSM(0.05)


@pytest.fixture
def _missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)


@pytest.mark.usefixtures("_missing")
@pytest.mark.parametrize("method", ["crown", "interval"])
def test_a_missing_library_is_named_with_its_command(method: mf.certified.Method) -> None:
    for job in (
        lambda: mf.certified_margins(MODEL, X, Y, ATTACK, method=method),
        lambda: mf.adversarial_margins(MODEL, X, Y, ATTACK, certified=method),
    ):
        with pytest.raises(MissingDependencyError) as refused:
            job()
        assert str(refused.value).endswith(INSTALL)
        assert "--no-deps auto-LiRPA==0.3" in INSTALL


@pytest.mark.usefixtures("_missing")
def test_without_the_library_auto_means_norms_and_says_so() -> None:
    found = mf.certified_margins(MODEL, X, Y, ATTACK)
    assert found.method == "norms"
    assert INSTALL in found.reason
    asked = mf.certified_margins(MODEL, X, Y, ATTACK, method="norms")
    assert torch.equal(found.values, asked.values)
    assert asked.reason == ""
    with pytest.raises(ModelError, match=r"not installed.*GELU"):
        mf.certified_margins(nn.Sequential(nn.Linear(6, 1), nn.GELU()), X, Y, ATTACK)


def test_what_has_no_ball_is_refused() -> None:
    with pytest.raises(InputError, match="got none"):
        mf.certified_margins(MODEL, X, Y, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got none"):
        mf.adversarial_margins(MODEL, X, Y, certified="norms")
    with pytest.raises(InputError, match="expected an attack, got str"):
        mf.certified_margins(MODEL, X, Y, "fgsm:eps=0.1")  # type: ignore[arg-type]
    finite = mf.attacks.FiniteSet(torch.zeros(1, 6))
    with pytest.raises(InputError, match="no ball"):
        mf.certified_margins(MODEL, X, Y, finite)
    with pytest.raises(SpecificationError, match="did you mean 'crown'"):
        mf.certified_margins(MODEL, X, Y, ATTACK, method="crowm")  # type: ignore[arg-type]


def test_data_that_do_not_fit_are_refused() -> None:
    bounded = mf.attacks.FGSM(0.05, bounds=(0, 1))
    with pytest.raises(DataError, match="bounds"):
        mf.certified_margins(MODEL, X + 1, Y, bounded, method="norms")
    with pytest.raises(DataError, match="labels"):
        mf.certified_margins(MODEL, X, Y[:-1], ATTACK, method="norms")
    with pytest.raises(DataError, match="at least one"):
        mf.certified_margins(MODEL, X[:0], Y[:0], ATTACK, method="norms")
    with pytest.raises(DataError):
        mf.certified_margins(MODEL, X, Y + 5, ATTACK, method="norms")
    with pytest.raises(InputError, match="batch_size"):
        mf.certified_margins(MODEL, X, Y, ATTACK, method="norms", batch_size=0)
    broken = mf.models.mlp(6, 5, 1, seed=0)
    broken[1].weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match="finite"):
        mf.certified_margins(broken, X, Y, ATTACK, method="norms")


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    mf.certified_margins(model, X, Y, ATTACK, method="norms")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert isinstance(model[1], nn.Dropout)


def test_batches_change_nothing() -> None:
    whole = mf.certified_margins(MODEL, X, Y, ATTACK, method="norms")
    parts = mf.certified_margins(MODEL, X, Y, ATTACK, method="norms", batch_size=4)
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-12, atol=1e-15)


def test_the_sandwich() -> None:
    found = mf.adversarial_margins(MODEL, X, Y, ATTACK, certified="norms")
    c = found.certified
    assert c is not None
    assert bool((c.values <= found.values).all())
    assert torch.equal(found.width, found.values - c.values)
    assert found.certified_accuracy == c.accuracy <= found.accuracy
    assert c.rho == found.rho
    assert c.normalized_min == pytest.approx(c.min / float(found.rho or 0))
    assert str(found).splitlines() == [
        f"accuracy: certified {c.accuracy:.4g} ≤ true ≤ attacked {found.accuracy:.4g} "
        "(n = 9, bounds by norms)",
        f"min m: certified {c.min:.4g} ≤ true ≤ attacked {found.min:.4g}; "
        f"median width {float(found.width.median()):.4g}",
    ]
    plain = mf.adversarial_margins(MODEL, X, Y, ATTACK)
    assert (
        str(plain) == f"accuracy ≤ {plain.accuracy:.4g}, min m ≤ {plain.min:.4g} (attacked, n = 9)"
    )
    assert torch.equal(plain.values, found.values)
    for name in ("certified_accuracy", "width"):
        with pytest.raises(InputError, match="certified='auto'"):
            getattr(plain, name)
    alone = mf.certified_margins(MODEL, X, Y, ATTACK, method="norms")
    assert str(alone).startswith("certified by norms: ")
    with pytest.raises(ModelError, match="measure_homogeneity"):
        _ = alone.normalized


def test_bounds_meet_the_attacked_margin_in_float32() -> None:
    """On a linear layer both ends are the same number, but for float32's rounding: the order holds."""
    model = mf.models.mlp(6, 1, seed=0)
    attack = mf.attacks.ExactLinear("linf", 0.05)
    for seed in range(20):
        x = torch.rand(50, 6, generator=torch.Generator().manual_seed(seed))
        found = mf.adversarial_margins(model, x, Y.repeat(6)[:50], attack, certified="norms")
        assert float(found.width.min()) >= 0
        assert float(found.width.max()) < 1e-6


def test_a_bound_above_an_attacked_margin_is_an_error() -> None:
    found = mf.adversarial_margins(MODEL, X, Y, ATTACK)
    bounds = mf.certified_margins(MODEL, X, Y, ATTACK, method="norms")
    wrong = replace(bounds, values=found.values + 1e-2)
    with pytest.raises(ModelError, match=r"example \d has the attacked margin"):
        sandwiched(found, wrong, MODEL)
    near = replace(bounds, values=found.values + 1e-9)
    assert torch.equal(sandwiched(found, near, MODEL).width, torch.zeros(9).double())


def test_bounds_json_is_whole_or_refused(tmp_path: Path) -> None:
    assert read_bounds(tmp_path) is None
    path = save_bounds(tmp_path, {"examples": 3})
    assert read_bounds(tmp_path) == {"format_version": 1, "examples": 3}
    path.write_text('{"format_version": 9}')
    with pytest.raises(RunError, match="format 9"):
        read_bounds(tmp_path)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(RunError, match=r"damaged.*measure --certified"):
            read_bounds(tmp_path)
