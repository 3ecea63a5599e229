"""Another number of threads adds in another order, and changes nothing else: by how much at most."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import marginflow as mf
from marginflow import attacks, engine, losses, models
from marginflow.engine import EngineName
from marginflow.runs import compare_records, compare_weights

THREADS = (2, 4)
N, D = 1024, 400  # enough that PyTorch and the library that multiplies share the work out
ROUNDINGS = 32  # as many units of rounding may sums over N examples or D inputs differ by
# Continuous in the weights. A sign of FGSM may turn by a rounding, which is larger than one.
CONTINUOUS = ("none", "fgm:eps=0.5", "pgd-l2:eps=0.5,steps=3,step=0.3")


@pytest.fixture(autouse=True)
def _threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def examples(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N, D, generator=generator, dtype=torch.float64)
    y = torch.randn(N, generator=generator, dtype=torch.float64).sign()
    return x.to(dtype), y.to(dtype)


def gap(there: torch.Tensor, here: torch.Tensor) -> float:
    return float((there - here).abs().max().double() / there.abs().max().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["fused", "autograd"])
@pytest.mark.parametrize("spec", CONTINUOUS)
def test_a_gradient_changes_by_roundings(spec: str, name: EngineName, dtype: torch.dtype) -> None:
    x, y = examples(dtype)
    model = models.build("mlp:64,16", input_shape=(D,), seed=0).to(dtype)
    step = engine.build(
        model, losses.get_loss("logistic"), attacks.build(spec), shape=(D,), batch_size=N,
        engine=name, products="default",
    )  # fmt: skip
    found = {}
    for threads in (1, *THREADS, 1):
        torch.set_num_threads(threads)
        gradients = [g.clone() for g in step(x, y).gradients]
        first = found.setdefault(threads, gradients)
        if threads == 1:  # the same number again: the same bits
            assert all(map(torch.equal, first, gradients))
    for threads in THREADS:
        worst = max(map(gap, found[1], found[threads]))
        assert worst <= ROUNDINGS * torch.finfo(dtype).eps, (threads, worst)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_margins_change_by_roundings(dtype: torch.dtype) -> None:
    x, y = examples(dtype)
    model = models.build("mlp:64,16", input_shape=(D,), seed=0).to(dtype)
    attack = attacks.build("fgm:eps=0.5")
    found = {}
    for threads in (1, *THREADS):
        torch.set_num_threads(threads)
        found[threads] = mf.adversarial_margins(model, x, y, attack)
    for threads in THREADS:
        worst = gap(found[1].values, found[threads].values)
        assert worst <= ROUNDINGS * torch.finfo(dtype).eps, (threads, worst)
        rho = found[threads].rho
        assert rho == pytest.approx(found[1].rho, rel=ROUNDINGS * torch.finfo(dtype).eps)


def test_a_smooth_training_stays_within_rounding() -> None:
    x, y = examples(torch.float64)
    direction = torch.linspace(-1, 1, D, dtype=torch.float64)
    x = (x - 0.5) + 0.05 * y[:, None] * direction
    runs = {}
    for threads in (1, *THREADS):
        torch.set_num_threads(threads)
        runs[threads] = mf.train(
            "deep-linear:32", mf.Dataset(x, y), attack="exact-linear:p=2,eps=0.1",
            dtype="float64", batch_size=N // 2, epochs=10,
        )  # fmt: skip
    there = runs[1]
    for threads in THREADS:
        here = runs[threads]
        weights = compare_weights(there.model.state_dict(), here.model.state_dict(), 20)
        records = compare_records(there.metrics, here.metrics)
        assert [m["step"] for m in here.metrics] == [m["step"] for m in there.metrics]
        assert max([d.relative for d in (*weights, *records)], default=0.0) <= 1e-9
