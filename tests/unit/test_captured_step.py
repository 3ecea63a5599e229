"""Steps as CUDA graphs: the bookkeeping with a graph that replays by calling; a real one on a GPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import marginflow as mf
from marginflow.engine import FusedEngine
from marginflow.engine import _captured as module
from marginflow.losses import get_loss

RATE = 0.2


class Recorded(module.CapturedStep):
    """What a graph would do: run the recorded step again, on the same tensors."""

    def __init__(self, step: Callable[..., Any], weights: Any, x: Any, y: Any) -> None:
        def recorded(x: torch.Tensor, y: torch.Tensor) -> Any:
            for kept, weight in zip(self._before, self._weights, strict=True):
                kept.copy_(weight)
            return step(x, y)

        class Graph:
            def replay(graph) -> None:  # noqa: N805
                self._result = recorded(self._x, self._y)

        self.fake = Graph()
        super().__init__(step, weights, x, y)


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    @contextlib.contextmanager
    def nothing(*arguments: object) -> Iterator[None]:
        yield

    recorded: list[Recorded] = []

    def graph() -> Any:
        return recorded[-1].fake

    class Remembered(Recorded):
        def __init__(self, *arguments: Any) -> None:
            recorded.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr("marginflow.engine._fused.CapturedStep", Remembered)


def problem(attack: str) -> tuple[FusedEngine, FusedEngine, torch.Tensor, torch.Tensor]:
    model = mf.models.mlp(6, 8, 1, seed=1).double()
    engines = [
        FusedEngine(m, get_loss("exponential"), mf.attacks.build(attack), shape=(6,))
        for m in (model, copy.deepcopy(model))
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return engines[0], engines[1], x, torch.sign(x[:, 0]).long()


def steps(engine: FusedEngine, x: torch.Tensor, y: torch.Tensor, *, captured: bool) -> list[Any]:
    found = []
    for start in (0, 10, 20, 30, 0, 10):
        part = slice(start, start + 10)
        step = engine._captured_step(x[part], y[part], RATE, 12) if captured else None
        if step is None:
            result = engine.descend(x[part], y[part], RATE, count=12)
        else:
            result = step[1](x[part], y[part])
            engine._last = step[0]
        found.append((result.loss, result.margins, engine.last_gradients()))
    return found


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("attack", ["none", "fgsm:eps=0.1", "pgd-linf:eps=0.1,steps=3"])
def test_recorded_steps_are_the_steps(attack: str) -> None:
    """Warm-up and capture leave no trace; other engines' calls in between do not disturb the buffers."""
    one, two, x, y = problem(attack)
    plain, captured = steps(one, x, y, captured=False), steps(two, x, y, captured=True)
    assert next(iter(two._captured.values())) is not None
    for a, b in zip(plain, captured, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert all(torch.equal(g, h) for g, h in zip(a[2], b[2], strict=True))
    for p, q in zip(one.parameters, two.parameters, strict=True):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("without_a_gpu")
def test_a_loss_that_is_not_finite_is_undone() -> None:
    engine, _, x, y = problem("fgsm:eps=0.1")
    steps(engine, x, y, captured=True)
    before = [p.detach().clone() for p in engine.parameters]
    step = engine._captured_step(x[:10], y[:10], RATE, 12)
    assert step is not None
    result = step[1](x[:10] * torch.nan, y[:10])
    assert not bool(torch.isfinite(result.loss))
    for p, q in zip(engine.parameters, before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("attack", ["fgm:eps=0.1", "pgd-linf:eps=0.1,random=true"])
def test_what_is_not_captured(attack: str) -> None:
    engine, _, x, y = problem(attack)
    for _ in range(3):
        assert engine._captured_step(x, y, RATE, None) is None


@pytest.mark.usefixtures("without_a_gpu")
def test_a_capture_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, x, y = problem("fgsm:eps=0.1")
    before = [p.detach().clone() for p in engine.parameters]

    def fail() -> None:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    assert engine._captured_step(x, y, RATE, None) is None
    with pytest.warns(UserWarning, match="not permitted"):
        assert engine._captured_step(x, y, RATE, None) is None
    assert engine._captured_step(x, y, RATE, None) is None
    for p, q in zip(engine.parameters, before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_on_a_gpu_is_that_of_the_cpu() -> None:
    runs = [
        mf.train(
            mf.models.mlp(6, 16, 1, seed=1).double(),
            "separable:n=40,d=6,margin=0.3",
            attack="fgsm:eps=0.05",
            batch_size=8,
            epochs=20,
            device=device,
            engine=engine,
        )
        for device, engine in (("cpu", "autograd"), ("cuda", "fused"), ("cuda", "autograd"))
    ]
    for run in runs[1:]:
        assert run.final["normalized_margin"] == pytest.approx(
            runs[0].final["normalized_margin"], rel=1e-9
        )
