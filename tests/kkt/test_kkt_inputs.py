"""What the certificate refuses, and how it says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kkt_oracles import case
from torch import nn

import marginflow as mf
from marginflow.attacks import FGM, PGD, ExactLinear
from marginflow.errors import (
    DataError,
    InputError,
    MarginflowError,
    ModelError,
    NotHomogeneousError,
)


def certify(**options: Any) -> mf.Certificate:
    c = case("relu")
    return mf.kkt_certificate(c.model, c.x, c.y, **options)


@pytest.mark.parametrize("function", [mf.kkt_certificate, mf.nearest_kkt_point])
def test_margins_that_are_not_positive_are_counted(function: Any) -> None:
    c = case("relu", n=12)
    y = c.y.clone()
    y[[2, 5]] *= -1
    with pytest.raises(InputError, match=rf"^2 of {len(y)} margins are not positive .*train until"):
        function(c.model, c.x, y)
    zero = c.x.clone()
    zero[3] = 0
    with pytest.raises(
        InputError, match=r"1 of .* margins are not positive \(the smallest is -?0\)"
    ):
        function(c.model, zero, c.y)
    with pytest.raises(InputError, match="reduce eps"):
        function(c.model, c.x, c.y, FGM(5.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, "tau: expected a number of at least 0"),
        ({"tau": math.nan}, "tau: expected a finite number"),
        ({"taus": [1.0, -1.0]}, "taus: expected a number of at least 0"),
        ({"max_support": 0}, "max_support: expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
        ({"memory": 0}, "memory: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"loss": "cross-entropy"}, "expected 'exponential' or 'logistic'"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"derivative": "partial"}, "unknown derivative 'partial'"),
        ({"attack": FGM(0.1, objective="loss")}, "expected an attack with objective='margin'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        certify(**options)


def test_data_that_do_not_fit() -> None:
    c = case("relu")
    with pytest.raises(DataError, match="as many labels as examples"):
        mf.kkt_certificate(c.model, c.x, c.y[:-1])
    with pytest.raises(DataError, match="n ≥ 1"):
        mf.kkt_certificate(c.model, c.x[:0], c.y[:0])
    with pytest.raises(DataError, match="−1 and \\+1"):
        mf.kkt_certificate(c.model, c.x, (c.y > 0).long())


def test_networks_that_have_no_certificate() -> None:
    c = case("relu")
    with torch.no_grad():
        c.model[3].weight.zero_()  # type: ignore[index]
    with pytest.raises(ModelError, match=r"'linear2.weight' has the norm 0"):
        mf.kkt_certificate(c.model, c.x, c.y)
    biased = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with pytest.raises(NotHomogeneousError, match="bias"):
        mf.kkt_certificate(biased, c.x, c.y)
    frozen = case("relu")
    frozen.model.requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"):
        mf.kkt_certificate(frozen.model, frozen.x, frozen.y)
    with pytest.raises(DataError, match="expected finite numbers"):
        mf.kkt_certificate(case("relu").model, c.x * math.nan, c.y)
    spoilt = case("relu").model
    next(spoilt.parameters()).data[0, 0] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        mf.kkt_certificate(spoilt, c.x, c.y)
    with pytest.raises(ModelError, match="ExactLinear applies to networks that are linear"):
        certify(attack=ExactLinear(2, 0.1))


def test_the_nearest_point_is_for_small_networks_and_fixed_attacks() -> None:
    c = case("relu")
    with pytest.raises(InputError, match="without a random start"):
        mf.nearest_kkt_point(c.model, c.x, c.y, PGD("l2", 0.1, random_start=True))
    wide = mf.models.mlp(6, 500, 1, seed=0).double()
    with torch.no_grad():
        y = torch.where(wide(c.x)[:, 0] > 0, 1, -1)
    with pytest.raises(InputError, match="at most 2000 trainable weights, got 3500"):
        mf.nearest_kkt_point(wide, c.x, y)
    with pytest.raises(InputError, match="max_iterations: expected"):
        mf.nearest_kkt_point(c.model, c.x, c.y, max_iterations=0)


def test_an_attack_may_be_its_specification() -> None:
    data = mf.load("separable:n=6,d=3,margin=0.4,seed=2")
    model = mf.models.deep_linear(3, 2, 1, seed=0).double()
    mf.train(model, data, attack="exact-linear:p=2,eps=0.05", lr=0.5, epochs=100)
    attack = mf.attacks.ExactLinear(2, eps=0.05)
    for measure in (mf.kkt_certificate, mf.nearest_kkt_point):
        one, two = (
            measure(model, data.x, data.y, a) for a in ("exact-linear:p=2,eps=0.05", attack)
        )
        assert str(one) == str(two)
        with pytest.raises(MarginflowError, match="unknown attack 'fgms'"):
            measure(model, data.x, data.y, "fgms:eps=0.1")
