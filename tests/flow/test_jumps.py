"""Discontinuities are found by bisection: which fields jump, and whether ln L jumps with them."""

from __future__ import annotations

import pytest
import torch
from flow_problems import DATA, EXACT, field_of, finite_set

import marginflow as mf
from marginflow.flow import find_jumps

SMOOTH, GRADIENT, LOSS = "smooth", "gradient", "loss"
CASES = [
    ("deep-linear:16", None, SMOOTH),
    ("deep-linear:16", EXACT, SMOOTH),
    ("deep-linear:16", "fgm:eps=0.05", SMOOTH),
    ("deep-linear:16", "pgd-l2:eps=0.05,steps=3", SMOOTH),
    ("deep-linear:16", "fgsm:eps=0.05", GRADIENT),  # an exact maximum there: a kink of ε‖W_Π‖₁
    ("deep-linear:16", "exact-linear:p=inf,eps=0.05", GRADIENT),
    ("mlp:16", None, GRADIENT),
    ("mlp:16", "finite", GRADIENT),
    ("mlp:16", "fgm:eps=0.05", LOSS),
    ("mlp:16", "fgsm:eps=0.05", LOSS),
    ("mlp:16", "pgd-l2:eps=0.05,steps=3", LOSS),
    ("mlp:16", "pgd-linf:eps=0.05,steps=3", LOSS),
    ("mlp:12,8,activation=leaky-relu", "fgm:eps=0.05", LOSS),
    ("mlp:16,activation=squared-relu", None, SMOOTH),
    ("mlp:16,activation=squared-relu", "fgsm:eps=0.05", LOSS),
    ("mlp:16,activation=squared-relu", "finite", GRADIENT),
]


@pytest.mark.parametrize(("spec", "attack", "expected"), CASES)
def test_which_fields_jump(spec: str, attack: str | None, expected: str) -> None:
    data = mf.load(DATA).to(dtype=torch.float64)
    model = mf.models.build(spec, input_shape=data.shape, outputs=1, seed=0).double()
    field = field_of(model, data, finite_set(10) if attack == "finite" else attack)
    jumps = find_jumps(field, field.read())
    found = LOSS if jumps.loss else GRADIENT if jumps.field else SMOOTH
    assert found == expected, jumps
    if jumps.field:
        assert jumps.field > 1e-3, "a jump is kept whole by the bisection"
    assert field.evaluations <= 400


def test_words() -> None:
    data = mf.load(DATA).to(dtype=torch.float64)
    model = mf.models.build("mlp:16", input_shape=data.shape, outputs=1, seed=0).double()
    words = [
        find_jumps(f, f.read()).words
        for f in (field_of(model, data), field_of(model, data, "fgsm:eps=0.05"))
    ]
    assert "ln L does not" in words[0]
    assert "ln L itself jumps" in words[1]
