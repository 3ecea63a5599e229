"""Stacked networks against autograd on each of them: the same losses, margins, gradients and steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from marginflow.attacks import FGM, FGSM, PGD, Attack, FiniteSet
from marginflow.engine import (
    AutogradEngine,
    FusedEngine,
    StackedEngine,
    StackPlace,
    stacking_gains,
    stacking_refusal,
)
from marginflow.errors import InputError
from marginflow.losses import get_loss
from marginflow.models import deep_linear, mlp

SHAPE = (3, 4)
BOUNDS = (-2.0, 2.0)
NETWORKS: dict[str, Any] = {
    "relu": lambda seed: mlp(12, 9, 7, 1, seed=seed),
    "leaky": lambda seed: mlp(12, 9, 1, activation="leaky-relu", seed=seed),
    "squared": lambda seed: mlp(12, 9, 7, 1, activation="squared-relu", seed=seed),
    "linear": lambda seed: deep_linear(12, 5, 4, 1, seed=seed),
    "classes": lambda seed: mlp(12, 9, 4, seed=seed),
}
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "fgm-bounds": FGM(0.3, bounds=BOUNDS),
    "fgsm": FGSM(0.1),
    "fgsm-bounds": FGSM(0.1, bounds=BOUNDS),
    "fgsm-loss": FGSM(0.1, objective="loss"),
    "pgd-linf-random": PGD("linf", 0.1, steps=3, random_start=True, bounds=BOUNDS),
    "pgd-l2": PGD("l2", 0.4, steps=3),
    "finite": FiniteSet(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5)) / 9),
}


def batches(network: str, count: int, n: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Another batch for each network."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, n, *SHAPE, generator=generator, dtype=torch.float64).clamp(*BOUNDS)
    y = torch.randint(4 if network == "classes" else 2, (count, n), generator=generator)
    return x, y if network == "classes" else 2 * y - 1


def sources(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(20 + seed) for seed in range(count)]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_stack_does_the_work_of_its_networks(network: str, attack: str) -> None:
    """Three networks, each with its own batch and random start, in float64 to 1e-12."""
    loss = get_loss("cross-entropy" if network == "classes" else "logistic")
    models = [NETWORKS[network](seed).double() for seed in range(3)]
    x, y = batches(network, 3)
    expected = [
        AutogradEngine(copy.deepcopy(model), loss, ATTACKS[attack])(x[s], y[s], source)
        for s, (model, source) in enumerate(zip(models, sources(3), strict=True))
    ]
    before = [[p.detach().clone() for p in model.parameters()] for model in models]
    engines = [FusedEngine(model, loss, ATTACKS[attack], shape=SHAPE) for model in models]
    stack = StackedEngine(engines)
    random = ATTACKS[attack] is not None and ATTACKS[attack].random  # type: ignore[union-attr]
    found = stack.look(x, y, sources(3) if random else None)
    stack.descend(0.25)
    for s, wanted in enumerate(expected):
        place = StackPlace(stack, s)
        torch.testing.assert_close(found.loss[s], wanted.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.margins[s], wanted.margins, rtol=1e-11, atol=1e-13)
        for own, g in zip(place.last_gradients(), wanted.gradients, strict=True):
            torch.testing.assert_close(own, g, rtol=1e-11, atol=1e-14)
        assert place.last_squares() == pytest.approx(
            [float(g.square().sum()) for g in wanted.gradients], rel=1e-12
        )
        for p, w, g in zip(models[s].parameters(), before[s], wanted.gradients, strict=True):
            torch.testing.assert_close(p.detach(), w - 0.25 * g, rtol=1e-12, atol=1e-14)


def test_released_weights_are_the_networks_own() -> None:
    models = [NETWORKS["relu"](seed).double() for seed in range(2)]
    engines = [FusedEngine(m, get_loss("logistic"), None, shape=SHAPE) for m in models]
    stack = StackedEngine(engines)
    assert stack.network.weights[0][1].data_ptr() == engines[1].network.weights[0].data_ptr()
    for engine in engines:
        engine.network.release()
    x, y = batches("relu", 2)
    kept = [p.detach().clone() for p in models[1].parameters()]
    stack.look(x, y)
    stack.descend(0.5)
    for p, w in zip(models[1].parameters(), kept, strict=True):
        assert torch.equal(p, w)
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


def test_what_is_out_of_order_or_does_not_fit_is_refused() -> None:
    loss = get_loss("logistic")
    wide = FusedEngine(mlp(12, 5, 1), loss, None, shape=SHAPE)
    slim = FusedEngine(mlp(12, 4, 1), loss, None, shape=SHAPE)
    with pytest.raises(InputError, match="one shape"):
        StackedEngine([wide, slim])
    stack = StackedEngine([wide])
    for call in (stack.gradients, lambda: stack.descend(0.1)):
        with pytest.raises(RuntimeError, match=r"no step|expected look"):
            call()


def test_which_engines_are_stacked() -> None:
    loss = get_loss("logistic")
    random = PGD("l2", 0.1, random_start=True)
    for refused, why in (
        (AutogradEngine(mlp(12, 5, 1), loss, None), "autograd engine"),
        (FusedEngine(mlp(12, 5, 1), loss, random, shape=SHAPE), "ℓ2 ball"),
        (
            FusedEngine(mlp(12, 5, 1), loss, FGSM(0.1), shape=SHAPE, perturbation_precision="bf16"),
            "another precision",
        ),
        (FusedEngine(mlp(12, 5, 1), loss, None, shape=SHAPE, products="onednn"), "onednn"),
    ):
        assert why in str(stacking_refusal(refused))
    small = FusedEngine(mlp(12, 5, 1), loss, FGSM(0.1), shape=SHAPE)
    assert stacking_refusal(small) is None
    assert stacking_gains(small, 100)
    assert not stacking_gains(FusedEngine(mlp(784, 1024, 1), loss, None, shape=(784,)), 80)
