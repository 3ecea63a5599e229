"""Lemma 11 for steps of any size: its gauge, for every attack, derivative and activation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import marginflow as mf
from marginflow.attacks import FGM, FGSM, PGD, Attack, Derivative, ExactLinear, FiniteSet
from marginflow.attacks._base import Query
from marginflow.engine import AutogradEngine
from marginflow.losses import get_loss
from marginflow.training import Callback, NormGrowth, Trainer
from stopping import InterruptAt

DELTAS = torch.tensor([[0.1, 0.0, -0.1, 0.1], [0.0, -0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "fgm": FGM(eps=0.2),
    "fgsm": FGSM(eps=0.1),
    "pgd-l2": PGD("l2", eps=0.2, steps=3, step_size=0.1),
    "pgd-linf": PGD("linf", eps=0.1, steps=3, step_size=0.05),
    "pgd-random": PGD("l2", eps=0.2, steps=2, step_size=0.1, random_start=True),
    "finite-set": FiniteSet(DELTAS.double()),
}
EXACT: dict[str, Attack | None] = {f"exact-{p}": ExactLinear(p, 0.1) for p in (1.5, 2.0, "linf")}


def data(n: int = 12) -> mf.Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return mf.Dataset(x, torch.sign(x[:, 0] * x[:, 1] + 0.2).long())


def trained(
    model: nn.Module,
    attack: Attack | None = None,
    *,
    derivative: Derivative = "detached",
    loss: str = "exponential",
    callbacks: tuple[Callback, ...] = (),
    sample: mf.Dataset | None = None,
    **options: Any,
) -> tuple[Trainer, NormGrowth]:
    sample = data() if sample is None else sample.to(dtype=torch.float64)
    gauge = NormGrowth(model, mf.measure_homogeneity(model, sample.x))
    engine = AutogradEngine(model, get_loss(loss), attack, derivative)
    run = Trainer(
        engine, sample, **{"lr": 0.05, "batch_size": 5, "epochs": 15, **options},
        callbacks=(*callbacks, gauge),
    )  # fmt: skip
    run.run()
    return run, gauge


@pytest.mark.parametrize("derivative", ["detached", "total"])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky-relu", "squared-relu"])
def test_the_law_for_every_attack(activation: str, derivative: Derivative) -> None:
    attacks = {**ATTACKS, **(EXACT if activation == "identity" else {})}
    worst = {}
    for name, attack in attacks.items():
        model = mf.models.mlp(4, 6, 5, 1, activation=activation, seed=1).double()
        run, gauge = trained(model, attack, derivative=derivative)
        worst[name] = gauge.read()["norm_drift"]
        assert float(gauge._sums.min()) > 1e-6 * float(gauge._squares().max()), name
        assert run.step == 45
    print(f"\n{activation}, {derivative}: {max(worst.values()):.1e}")
    assert max(worst.values()) < 1e-13


@pytest.mark.parametrize("loss", ["logistic", "cross-entropy"])
def test_other_losses_and_shapes(loss: str) -> None:
    sample = mf.load("digits:0,1,2,n=40" if loss == "cross-entropy" else "digits:3,8,n=40")
    outputs = 3 if loss == "cross-entropy" else 1
    for model in (
        mf.models.cnn((1, 8, 8), outputs, channels=(2, 3), hidden=4, kernel=3, seed=0),
        mf.models.mlp(64, 5, outputs, activation="squared-relu", seed=0),
    ):
        _, gauge = trained(
            model.double(), FGM(0.3), derivative="total", loss=loss, epochs=3, sample=sample
        )
        assert gauge.read()["norm_drift"] < 1e-13


def test_the_first_layer_with_its_bias_is_one_group() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1, bias=False)).double()
    _, gauge = trained(model, FGSM(0.1))
    assert [len(layer) for layer in gauge._layers] == [2, 1]
    assert gauge.read()["norm_drift"] < 1e-13


def test_the_sums_are_those_of_numpy() -> None:
    """The sums, and the growth of the layers, from the weights at every step alone."""
    seen: list[list[np.ndarray[Any, Any]]] = []

    class Spy(Callback):
        def on_start(self, trainer: Trainer) -> None:
            seen.append([p.detach().numpy().copy() for p in trainer.model.parameters()])

        on_step = on_start

    model = mf.models.mlp(4, 6, 5, 1, activation="squared-relu", seed=1).double()
    _, gauge = trained(model, FGM(0.2), callbacks=(Spy(),))
    steps = [[np.sum((b - a) ** 2) for a, b in zip(s, t, strict=True)] for s, t in pairwise(seen)]
    np.testing.assert_allclose(gauge._sums.numpy(), np.sum(steps, axis=0), rtol=1e-9)
    grown = [
        (np.sum(b**2) - np.sum(a**2) - total) / c
        for a, b, total, c in zip(seen[0], seen[-1], np.sum(steps, axis=0), (4, 2, 1), strict=True)
    ]
    assert np.ptp(grown) < 1e-12
    assert abs(grown[0]) > 1e-2  # the layers did grow


@pytest.mark.parametrize("size", [1e-8, 1e-4])
def test_a_push_in_the_middle_is_seen_at_its_size(size: float) -> None:
    class Push(Callback):
        change = 0.0

        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == 20:
                first = next(iter(trainer.model.parameters())).detach()
                before = float(first.square().sum())
                first[1, 2] += size
                self.change = float(first.square().sum()) - before

    push = Push()
    model = mf.models.mlp(4, 6, 1, seed=1).double()
    _, gauge = trained(model, FGSM(0.1), callbacks=(push,))
    expected = abs(push.change) / float(gauge._squares().max())
    assert gauge.read()["norm_drift"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-11


def test_scale_invariance_is_not_needed() -> None:
    """Scaling W_k by a is scaling f by a^{c_k}: ⟨W_k, G_k⟩/c_k is one number for any δ that sees f only."""
    lossy = FGM(0.3, objective="loss")
    three = mf.Dataset(data().x, torch.arange(12) % 3)
    many = mf.models.mlp(4, 6, 3, activation="squared-relu", seed=0).double()
    _, gauge = trained(many, lossy, derivative="total", loss="cross-entropy", sample=three)
    assert gauge.read()["norm_drift"] < 1e-13


def test_what_breaks_the_law_is_seen() -> None:
    """An attack that looks at one layer, through δ(W), and momentum."""

    class Peeking(FGM):
        def _perturb(
            self, query: Query, generator: torch.Generator | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            delta, dead = super()._perturb(query, generator)
            first = next(iter(query.model.parameters()))
            return delta * torch.tanh(torch.linalg.vector_norm(first)), dead

    model = mf.models.mlp(4, 6, 4, 1, activation="squared-relu", seed=1).double()
    _, gauge = trained(model, Peeking(0.3), derivative="total")
    print(f"\nan attack that looks at a layer: {gauge.read()['norm_drift']:.1e}")
    assert gauge.read()["norm_drift"] > 1e-9
    _, gauge = trained(model, Peeking(0.3))
    assert gauge.read()["norm_drift"] < 1e-13
    run, gauge = trained(model, FGM(0.3), momentum=0.5)
    print(f"momentum: {gauge.read()['norm_drift']:.1e}")
    assert gauge.read()["norm_drift"] > 1e-6
    assert not NormGrowth.fits(run, mf.measure_homogeneity(model, data().x))


def test_where_it_is_measured() -> None:
    def recorded(model: nn.Module, **options: Any) -> bool:
        run = mf.train(model, data(), lr=0.1, epochs=1, **options)
        return "norm_drift" in run.final

    def double(*widths: int) -> nn.Module:
        return mf.models.mlp(*widths, seed=0).double()

    assert recorded(double(4, 5, 1))
    assert recorded(double(4, 5, 1), batch_size=3)
    assert not recorded(double(4, 1))
    assert not recorded(mf.models.mlp(4, 5, 1, seed=0))
    assert not recorded(double(4, 5, 1), momentum=0.5)
    run = mf.train(double(4, 5, 1), data(), lr="loss-based", epochs=1)
    assert "norm_drift" not in run.final
    frozen = double(4, 5, 3, 1)
    next(iter(frozen.parameters())).requires_grad_(False)
    run = mf.train(frozen, data(), lr=0.1, epochs=5)
    assert run.final["norm_drift"] < 1e-13


@pytest.mark.parametrize("stop_at", [1, 18])
def test_it_survives_resuming_to_the_very_bits(tmp_path: Path, stop_at: int) -> None:
    options: dict[str, Any] = {
        "attack": "fgsm:eps=0.05", "lr": 0.3, "batch_size": 6, "epochs": 10, "dtype": "float64",
        "schedule": [3, 10],
    }  # fmt: skip
    spec, source = "mlp:5,4,activation=squared-relu", "separable:n=20,d=6,margin=0.3"
    mf.train(spec, source, **options, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        mf.train(spec, source, **options, out=tmp_path / "cut", callbacks=[InterruptAt(stop_at)])
    run = mf.train(spec, source, **options, out=tmp_path / "cut", resume=True)
    one, two = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert one == two
    assert 0 < run.final["norm_drift"] < 1e-13
