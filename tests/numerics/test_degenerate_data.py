"""Data and networks at the edge of sense: each job gives the closed form or says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import marginflow as mf
from marginflow.cli import main
from marginflow.references import max_margin

ROOT = math.sqrt(0.5)
EPS = "exact-linear:p=2,eps=0.1"
_BASE = mf.load("separable:n=8,d=3,margin=0.5")
_WIDE = torch.randn(3, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Examples, labels, and the largest ℓ2 margin of a linear predictor: None where there is none.
CASES: dict[str, tuple[Tensor, list[int], float | None]] = {
    "one example": (rows([3, 4]), [-1], 5.0),
    "the same twice": (rows([3, 4], [3, 4]), [1, 1], 5.0),
    "opposite labels": (rows([1, 2], [1, 2]), [1, -1], None),
    "two tied": (rows([1, 0], [0, 1], [3, 3]), [1, 1, 1], ROOT),
    "all equal": (rows([1, 0], [1, 0], [-1, 0]), [1, 1, -1], 1.0),
    "an input of zeros": (rows([0, 0], [1, 0], [-1, 0.5]), [1, 1, -1], None),
    "nothing but zeros": (rows([0, 0], [0, 0]), [1, -1], None),
    "one feature": (rows([1], [-2], [3]), [1, -1, 1], 1.0),
    "more features than examples": (_WIDE, [1, -1, 1], max_margin(_WIDE, [1, -1, 1]).margin),
    "a constant feature": (rows([1, 5], [-1, 5], [2, 5]), [1, -1, 1], 1.0),
    "constant examples": (rows([3, 4], [3, 4], [3, 4]), [1, 1, 1], 5.0),
}
every_case = pytest.mark.parametrize("name", CASES)


def case(name: str) -> tuple[mf.Dataset, float | None]:
    x, y, margin = CASES[name]
    return mf.Dataset(x, torch.tensor(y)), margin


@every_case
def test_the_largest_margin(name: str) -> None:
    data, margin = case(name)
    found = max_margin(data.x.numpy(), data.y.numpy())
    assert found.separable == (margin is not None)
    assert found.margin == pytest.approx(margin or 0.0, rel=1e-9)
    assert margin is not None or found.gap < 1e-9  # the proof that there is none


@every_case
def test_the_flow_ends_at_it_or_says_why_not(name: str) -> None:
    data, margin = case(name)
    flow = mf.gradient_flow("deep-linear:3", data, attack=EPS, log_time=300, schedule=[1.0])
    if margin is None:
        assert flow.reason == "not separated"
        expected = {
            "opposite labels": "examples 0 and 1 are the same input with different labels",
            "nothing but zeros": "examples 0 and 1 are the same input with different labels",
        }.get(name, "not separated")
        assert expected in flow.advice
        return
    found = mf.adversarial_margins(flow.model, data.x, data.y, mf.attacks.ExactLinear(2, 0.1))
    assert found.normalized_min <= (margin - 0.1) * (1 + 1e-9)
    assert found.normalized_min >= (margin - 0.1) * 0.99
    cert = mf.kkt_certificate(flow.model, data.x, data.y, EPS)
    assert cert.residual < 0.1
    assert cert.self_check == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "model"),
    [(name, "mlp:8" if k % 2 else "deep-linear:3") for k, name in enumerate(CASES)],
)
def test_every_job_ends_in_numbers_or_in_words(name: str, model: str, tmp_path: Path) -> None:
    """No verdict fails of data that no statement is about; the page is written."""
    data, _ = case(name)
    attack = EPS if model.startswith("deep") else "fgsm:eps=0.1"
    run = mf.train(model, data, attack=attack, lr=0.1, epochs=3, out=tmp_path / "run")
    assert math.isfinite(run.final["normalized_margin"])
    verdicts = mf.verify(run, data=data)
    assert {v.outcome for v in verdicts} <= {"holds", "does not apply", "not reached"}
    for found in (
        mf.certified_margins(run.model, data.x, data.y, mf.attacks.build(attack), method="norms"),
        mf.adversarial_margins(run.model, data.x, data.y, mf.attacks.build(attack)),
    ):
        assert bool(torch.isfinite(found.values).all())
    if (found.values > 0).all():
        assert mf.kkt_certificate(run.model, data.x, data.y, attack).residual <= 1
    else:
        with pytest.raises(mf.errors.InputError, match="margins are not positive"):
            mf.kkt_certificate(run.model, data.x, data.y, attack)
    if model.startswith("deep"):
        assert math.isfinite(float(mf.measure_alignment(run.model).frobenius.max()))
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert ">nan<" not in page.lower()


@every_case
def test_an_ascent_ends_in_numbers_or_in_words(name: str) -> None:
    data, margin = case(name)
    if name == "nothing but zeros":
        with pytest.raises(mf.errors.ModelError, match="half of the margins are 0 at the start"):
            mf.maximize("mlp:8", data, attack="fgm:eps=0.1", epochs=3)
        return
    run = mf.maximize("deep-linear:3", data, attack=EPS, epochs=20)
    found = mf.adversarial_margins(run.model, data.x, data.y, mf.attacks.ExactLinear(2, 0.1))
    assert math.isfinite(found.normalized_min)
    assert found.normalized_min <= ((margin or 0.0) - 0.1) * (1 + 1e-6) or margin is None


def test_ties_have_a_multiplier_each() -> None:
    """``min ½‖w‖²`` for unit vectors as examples: w = (1, 1), λ = (1, 1); the third example has none."""
    data, _ = case("two tied")
    model = mf.models.deep_linear(2, 1, seed=0).double()
    with torch.no_grad():
        next(model.parameters()).copy_(torch.ones(1, 2))
    found = mf.kkt_certificate(model, data.x, data.y, tau=0)
    assert found.support.tolist() == [0, 1]
    assert found.multipliers.tolist() == pytest.approx([1, 1], rel=1e-14)
    assert found.residual <= 1e-15


def test_equal_margins_everywhere() -> None:
    x = torch.eye(5, dtype=torch.float64)
    model = mf.models.deep_linear(5, 1, seed=0).double()
    with torch.no_grad():
        next(model.parameters()).fill_(1.0)
    y = torch.ones(5, dtype=torch.int64)
    margins = mf.adversarial_margins(model, x, y)
    assert margins.values.tolist() == [1.0] * 5
    assert margins.smoothed == pytest.approx(1 - math.log(5), rel=1e-15)
    found = mf.kkt_certificate(model, x, y)
    assert found.multipliers.tolist() == pytest.approx([1] * 5, rel=1e-14)
    assert found.complementarity == 0
    assert found.residuals.paper <= 1e-7
    assert len(found.curve.taus) >= 1


def dead_unit() -> nn.Module:
    model = mf.models.mlp(3, 6, 1, seed=1).double()
    with torch.no_grad():
        next(model.parameters())[2] = 0.0
    return model


def test_a_dead_unit_is_no_kink() -> None:
    model = dead_unit()
    with torch.no_grad():
        y = torch.sign(model(_BASE.x.double()).reshape(-1)).long()
    kept = y != 0
    x, y = _BASE.x.double()[kept], y[kept]
    narrow = mf.models.mlp(3, 5, 1, seed=1).double()
    others = [0, 1, 3, 4, 5]
    with torch.no_grad():
        for own, whole, dim in zip(narrow.parameters(), model.parameters(), (0, 1), strict=True):
            own.copy_(whole.index_select(dim, torch.tensor(others)))
        list(model.parameters())[1][:, 2] = 0.0
    a, b = mf.kkt_certificate(model, x, y), mf.kkt_certificate(narrow, x, y)
    assert a.residual == pytest.approx(b.residual, rel=1e-12)
    assert torch.allclose(a.multipliers, b.multipliers, rtol=1e-10)
    assert a.norm == pytest.approx(b.norm, rel=1e-15)


def zero_layer(k: int) -> nn.Module:
    model = mf.models.mlp(3, 6, 5, 1, seed=1).double()
    with torch.no_grad():
        list(model.parameters())[k].zero_()
    return model


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_layer_of_zeros_is_refused_by_name(k: int) -> None:
    x, y = _BASE.x.double(), _BASE.y
    with pytest.raises(mf.errors.ModelError, match="product of the layer norms is 0"):
        mf.adversarial_margins(zero_layer(k), x, y)
    with pytest.raises(
        mf.errors.ModelError, match=f"the layer 'linear{k + 1}.weight' has the norm 0"
    ):
        mf.kkt_certificate(zero_layer(k), x, y)
    raw = mf.adversarial_margins(zero_layer(k), x, y, mf.attacks.FGSM(0.1), normalize=False)
    assert not raw.values.any()
    assert raw.dead_inputs.all()
    assert raw.accuracy == 0


def all_dead() -> nn.Module:
    """Units that no example of the data turns on."""
    model = mf.models.mlp(2, 4, 1, seed=0).double()
    with torch.no_grad():
        next(model.parameters()).fill_(-1.0)
    return model


@pytest.mark.parametrize("attack", ["fgm:eps=0.1", "fgsm:eps=0.1", "pgd-l2:eps=0.1,steps=3"])
def test_dead_units_leave_the_attack_without_a_direction(attack: str) -> None:
    x, y = torch.rand(5, 2, dtype=torch.float64) + 1, torch.tensor([1, -1, 1, 1, -1])
    for engine in ("fused", "autograd"):
        found = mf.adversarial_margins(all_dead(), x, y, mf.attacks.build(attack), engine=engine)
        assert found.dead_inputs.all()
        assert not found.values.any()
        assert found.normalized_min == 0
    flow = mf.gradient_flow(all_dead(), mf.Dataset(x, y), attack=attack, log_time=10)
    assert flow.reason == "not separated"
    assert "where it stands still (∇ ln L = 0)" in flow.advice


JOBS: dict[str, Callable[[mf.Dataset, str], float]] = {
    "train": lambda data, attack: mf.train(
        "deep-linear:3", data, attack=attack, lr=0.1, epochs=20
    ).final["normalized_margin"],
    "flow": lambda data, attack: (
        mf.adversarial_margins(
            mf.gradient_flow(
                "deep-linear:3", data, attack=attack, log_time=20, schedule=[1.0]
            ).model,
            data.x,
            data.y,
            mf.attacks.build(attack),
        ).normalized_min
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_budget_of_zero_is_no_attack(job: str) -> None:
    for attack in ("fgm:eps=0", "fgsm:eps=0", "exact-linear:p=2,eps=0", "pgd-linf:eps=0,steps=2"):
        found = JOBS[job](_BASE, attack)
        assert found == pytest.approx(JOBS[job](_BASE, "none"), rel=1e-6), attack


@pytest.mark.parametrize("eps", [0.6])
def test_a_budget_beyond_every_margin(eps: float) -> None:
    """γ_m = 0.5 < ε: ``min m ≤ (γ_m − ε) ‖W_Π‖`` < 0 whatever the weights."""
    attack = f"exact-linear:p=2,eps={eps!r}"
    flow = mf.gradient_flow("deep-linear:3", _BASE, attack=attack, log_time=1e3)
    assert flow.reason == "not separated"
    found = mf.adversarial_margins(flow.model, _BASE.x, _BASE.y, mf.attacks.build(attack))
    size = float(torch.linalg.vector_norm(mf.measure_alignment(flow.model).product))
    assert found.min <= (0.5 - eps) * size * (1 - 1e-9)
    with pytest.raises(mf.errors.InputError, match="reduce eps"):
        mf.kkt_certificate(flow.model, _BASE.x, _BASE.y, attack)


def test_layers_whose_product_cancels_are_linear_all_the_same() -> None:
    """``W_Π`` of 1e-12 of ``‖W_2‖‖W_1‖`` is known to 1e-4; a ReLU of such layers is still refused."""
    first = torch.tensor([[1.0, 2.0], [1.0, 2.0 + 1e-12]], dtype=torch.float64) / 3
    second = torch.tensor([[1.0, -1.0]], dtype=torch.float64) / 7
    x, y = torch.tensor([[0.3, 0.7], [5.1, 1.3]], dtype=torch.float64), torch.tensor([1, -1])
    linear, relu = mf.models.deep_linear(2, 2, 1, seed=0), mf.models.mlp(2, 2, 1, seed=0)
    for model in (linear.double(), relu.double()):
        with torch.no_grad():
            for p, value in zip(model.parameters(), (first, second), strict=True):
                p.copy_(value)
    attack = mf.attacks.ExactLinear(2, 0.1)
    found = mf.adversarial_margins(linear, x, y, attack, normalize=False)
    size = float(torch.linalg.vector_norm(second @ first))
    assert (
        found.values - mf.adversarial_margins(linear, x, y, normalize=False).values
    ).tolist() == pytest.approx([-0.1 * size] * 2, abs=1e-15)
    with pytest.raises(mf.errors.ModelError, match="linear in their input only"):
        attack(relu, x, y)


def test_labels_that_are_true_or_false() -> None:
    data = mf.Dataset(_BASE.x, (_BASE.y > 0).long())
    with pytest.raises(mf.errors.InputError, match=r"write 2\*y - 1"):
        mf.adversarial_margins(mf.models.deep_linear(3, 1, seed=0), data.x, data.y)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_labels_of_other_types(dtype: torch.dtype) -> None:
    """±1 in any type of numbers is the same to the margins."""
    model = mf.models.deep_linear(3, 1, seed=0)
    expected = mf.adversarial_margins(model, _BASE.x, _BASE.y).values
    assert torch.equal(mf.adversarial_margins(model, _BASE.x, _BASE.y.to(dtype)).values, expected)
