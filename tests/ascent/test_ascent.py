"""The ascent's parts: the loss at a temperature, gradients of ln L, batches, specifications."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import marginflow as mf
from marginflow.ascent import (
    Ascent,
    Method,
    Polish,
    Relative,
    Spheres,
    Steepest,
    Tempered,
    build_method,
)
from marginflow.engine import build
from marginflow.errors import InputError, SpecificationError
from marginflow.losses import Loss, get_loss
from marginflow.training import Callback, Part, Trainer

LOSSES = ("exponential", "logistic")


def naive_log_loss(name: str, z: list[float], tau: float) -> float:
    """``ln (1/n) Σ ℓ(τ z_i)`` as it is written, in numbers that math can hold."""
    of = {"exponential": lambda s: math.exp(-s), "logistic": lambda s: math.log1p(math.exp(-s))}
    return math.log(math.fsum(of[name](tau * v) for v in z) / len(z))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tau", [0.01, 1.0, 30.0])
def test_the_tempered_loss_is_the_formula(name: str, tau: float) -> None:
    z = [-0.7, -0.01, 0.0, 0.2, 1.3]
    scores = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    loss = Tempered(get_loss(name), tau)
    tracked = loss.log_mean(scores)
    value = tracked.detach()
    assert float(value) == pytest.approx(naive_log_loss(name, z, tau), rel=1e-13, abs=1e-13)
    assert float(loss.mean(scores.detach())) == pytest.approx(math.exp(float(value)), rel=1e-13)
    (found,) = torch.autograd.grad(tracked, scores)
    h = 1e-6
    for i in range(len(z)):
        up, down = ([v + s * h * (j == i) for j, v in enumerate(z)] for s in (1, -1))
        slope = (naive_log_loss(name, up, tau) - naive_log_loss(name, down, tau)) / (2 * h)
        assert float(found[i]) == pytest.approx(slope, rel=1e-6, abs=1e-9)
        assert float(-loss.log_weights(scores.detach())[i].exp()) == pytest.approx(
            slope, rel=1e-6, abs=1e-9
        )


@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
def test_cross_entropy_at_a_temperature_is_that_of_scaled_outputs(tau: float) -> None:
    outputs = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(9) % 4
    loss = Tempered(get_loss("cross-entropy"), tau)
    expected = torch.nn.functional.cross_entropy(tau * outputs, y)
    assert float(loss.mean(loss.scores(outputs, y))) == pytest.approx(float(expected), rel=1e-12)


def test_the_smooth_minimum_lies_where_it_is_said_to() -> None:
    z = torch.tensor([0.3, 0.31, 0.5, 2.0], dtype=torch.float64)
    for tau in (1.0, 100.0, 1e4):
        soft = -float(Tempered(get_loss("exponential"), tau).log_mean(z)) / tau
        assert 0.3 <= soft <= 0.3 + math.log(4) / tau


@pytest.mark.parametrize("model", ["mlp:7,5", "deep-linear:5"])
@pytest.mark.parametrize("name", [*LOSSES, "cross-entropy"])
@pytest.mark.parametrize("tau", [1.0, 40.0, 1e6])
def test_gradients_of_ln_loss_of_both_engines(model: str, name: str, tau: float) -> None:
    """1e-10, also at τ = 1e6, where L itself is 0."""
    binary = name != "cross-entropy"
    data = mf.load("separable:n=12,d=4,margin=0.3").to(dtype=torch.float64, device="cpu")
    x, y = data.x, data.y if binary else torch.arange(12) % 3
    network = mf.models.build(model, input_shape=(4,), outputs=1 if binary else 3, seed=2).double()
    if tau == 1e6:  # every score positive: L is 0 in float64
        f = network(x).detach()
        y = f[:, 0].sign().long() if binary else f.argmax(1)
    engines = [
        build(network, Tempered(get_loss(name), tau), None, shape=(4,), batch_size=12, engine=e)
        for e in ("fused", "autograd")
    ]
    fused, autograd = (engine(x, y, of_log=True) for engine in engines)
    assert float(fused.loss) == pytest.approx(float(autograd.loss), rel=1e-12)
    for a, b in zip(fused.gradients, autograd.gradients, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max()))
    assert (fused.margins - autograd.margins).abs().max() <= 1e-14
    if tau == 1e6:
        loss = Tempered(get_loss(name), tau)
        assert float(loss.mean(loss.scores(fused.outputs, y))) == 0.0
        assert max(float(g.abs().max()) for g in fused.gradients) > 1.0
        return
    direction = [torch.randn_like(g) for g in fused.gradients]
    slope = sum(float((g * v).sum()) for g, v in zip(fused.gradients, direction, strict=True))
    values, h = [], 1e-6 / tau
    with torch.no_grad():
        for sign in (1, -2):
            for p, v in zip(network.parameters(), direction, strict=True):
                p.add_(v, alpha=sign * h)
            values.append(engines[1].log_loss(x, y))
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("attack", ["fgsm:eps=0.1", "pgd-linf:eps=0.1,steps=3,step=0.05"])
def test_both_engines_walk_the_same_path(attack: str) -> None:
    options: dict[str, Any] = {"epochs": 4, "batch_size": 6, "dtype": "float64"}
    runs = [
        mf.maximize("mlp:8,6", "separable:n=30,d=5,margin=0.2", attack, engine=e, **options)
        for e in ("fused", "autograd")
    ]
    assert [r.config["engine"] for r in runs] == ["fused", "autograd"]
    assert runs[0].final["step"] == 20
    for a, b in zip(*(r.load_model().parameters() for r in runs), strict=True):
        assert (a - b).abs().max() <= 1e-9


class Batches(Callback):
    """Keeps what every batch was made of, by listening at :meth:`Ascent.part`."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.seen: list[Tensor] = []

    def on_start(self, trainer: Trainer) -> None:
        assert isinstance(trainer, Ascent)
        part = trainer.part

        def listening(rows: Tensor) -> Part:
            self.rows.append(rows.clone())
            self.seen.append(trainer.seen.clone())
            return part(rows)

        trainer.part = listening  # type: ignore[method-assign]


def ascend(method: str, *, n: int = 40, batch: int | None = 7, epochs: int = 6) -> Batches:
    heard = Batches()
    mf.maximize(
        "mlp:6", f"separable:n={n},d=4,margin=0.2", "fgsm:eps=0.05", method=method,
        batch_size=batch, epochs=epochs, callbacks=[heard],
    )  # fmt: skip
    return heard


def test_the_walk_meets_every_example_equally_often() -> None:
    """Of each batch the part that is not drawn from the hardest: passes through all examples."""
    heard = ascend("spheres:hard=0.5,pool=0.1", epochs=12)
    steps = 12 * 6
    counts, walked = torch.zeros(40, dtype=torch.long), 0
    for step, rows in enumerate(heard.rows):
        size = min(7, 40 - (step % 6) * 7)
        assert len(rows) == size
        hard = round(0.5 * min(1.0, step / steps / 0.25) * size)
        counts += torch.bincount(rows[: size - hard], minlength=40)
        walked += size - hard
    assert len(heard.rows) == steps
    assert walked > 200
    assert int(counts.max()) - int(counts.min()) <= 1
    assert int(counts.sum()) == walked


def test_the_hard_examples_are_the_hardest() -> None:
    heard = ascend("spheres:hard=0.5,pool=0.2", epochs=12)
    late = [(r, s) for k, (r, s) in enumerate(zip(heard.rows, heard.seen, strict=True)) if k > 30]
    for rows, seen in late:
        drawn = rows[len(rows) - round(0.5 * len(rows)) :]
        # 2·7 = 14 examples are the pool, more than 20% of 40.
        assert bool((seen[drawn] <= seen.sort().values[13]).all())
    assert len({int(i) for rows, _ in late for i in rows[-3:]}) > 5


def test_without_hard_examples_batches_are_those_of_a_training() -> None:
    heard = ascend("relative:hard=0", epochs=2)
    for epoch in range(2):
        rows = torch.cat(heard.rows[6 * epoch : 6 * epoch + 6])
        assert sorted(rows.tolist()) == list(range(40))


@pytest.mark.parametrize("method", ["spheres", "polish", "relative", "steepest:norm=adam"])
def test_full_batch(method: str) -> None:
    data = "separable:n=12,d=4,margin=0.3"
    runs = [
        mf.maximize("mlp:6", data, "fgsm:eps=0.05", method=method, batch_size=b, epochs=8)
        for b in (12, 100)
    ]
    assert runs[0].metrics == runs[1].metrics
    assert all(math.isfinite(r["normalized_margin"]) for r in runs[0].metrics)
    assert runs[0].config["batch_size"] == runs[1].config["batch_size"] == 12


@pytest.mark.parametrize(
    "method",
    [
        Spheres(), Spheres(angle=(0.1, 1 / 3e4), tau=(0.1, 2 / 3), momentum=0.7, hard=0.1, pool=1),
        Polish(), Polish(tau=(5, 5)), Relative(), Relative(step=(1e-2, 1e-5), hard=0.3),
        *(Steepest(norm) for norm in ("l2", "sign", "spectral", "adam")),
    ],
    ids=lambda m: m.spec,
)  # fmt: skip
def test_a_method_is_its_specification(method: Method) -> None:
    again = build_method(method.spec)
    assert type(again) is type(method)
    assert again.spec == method.spec
    assert build_method(method) is method


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sphere", r"unknown method 'sphere'.*spheres"),
        ("polisch", r"unknown method 'polisch'.*polish"),
        ("spheres:tau=5..1", r"spheres: tau: expected a temperature that rises or stays, got 5\.\.1"),
        ("spheres:angle=0.001..0.1", r"spheres: angle: expected a step that falls or stays"),
        ("spheres:hard=1", r"spheres: hard: expected a number below 1, got 1"),
        ("spheres:momentum=1", r"spheres: momentum: expected a number below 1"),
        ("spheres:pool=0", r"spheres: pool: expected .*above 0"),
        ("spheres:pool=1.5", r"spheres: pool: expected a share of at most 1, got 1\.5"),
        ("spheres:angle=0..0", r"spheres: angle: expected .*above 0"),
        ("spheres:tau=nan..1", r"tau: expected a finite number"),
        ("spheres:step=0.1", r"step.*angle"),
        ("spheres:0.1", r"'0\.1' has no name"),
        ("relative:angle=1..2", r"angle"),
        ("steepest:norm=l3", r"steepest: norm.*l3"),
    ],
)  # fmt: skip
def test_what_a_method_refuses(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_method(spec)
    print(caught.value)
    if spec.startswith(("sphere:", "polisch")):
        assert isinstance(caught.value, SpecificationError)


@pytest.mark.parametrize("angle", [0.1, (0.1,), (0.1, 0.01, 0.001), None])
def test_a_schedule_is_a_pair(angle: Any) -> None:
    with pytest.raises(InputError, match="expected a pair"):
        Spheres(angle=angle)


def test_an_ascent_needs_a_temperature_and_a_method_an_ascent() -> None:
    data = mf.load("separable:n=8,d=3,margin=0.2")
    network = mf.models.mlp(3, 4, 1).to(data.x.dtype)
    plain: Loss = get_loss("logistic")
    homogeneity = mf.measure_homogeneity(network, data.x)
    with pytest.raises(InputError, match="Tempered"):
        Ascent(
            build(network, plain, None, shape=(3,), batch_size=8), data,
            method=Spheres(), homogeneity=homogeneity,
            batch_size=None, epochs=1,
        )  # fmt: skip
    with pytest.raises(InputError, match=r"no learning rate; use mf\.maximize"):
        mf.train(network, data, lr=Spheres(), epochs=1)


@pytest.mark.parametrize("data", ["digits:3,8", "digits:1,2,3"])
def test_an_ascent_begins_with_the_margins_of_all_examples(data: str) -> None:
    """Of several classes too, where the scores of the loss are soft margins, off by ln C at τ = 1."""
    examples = mf.load(data).to(dtype=torch.float64)
    outputs = 1 if examples.binary else examples.num_classes
    model = mf.models.mlp(64, 8, outputs, seed=0).double()
    loss = Tempered(get_loss("logistic" if examples.binary else "cross-entropy"))
    attack = mf.attacks.FGSM(eps=0.05)
    worker = build(model, loss, attack, shape=examples.shape, batch_size=16)
    layers = mf.measure_homogeneity(model, examples.x)
    ascent = Ascent(worker, examples, method=Spheres(), homogeneity=layers, batch_size=16, epochs=1)
    ascent.look()
    margins = mf.adversarial_margins(model, examples.x, examples.y, attack).values
    assert float((ascent.seen - margins).abs().max()) <= math.log(outputs + 1) / 1e6


def test_an_example_that_no_unit_answers_to_is_revived() -> None:
    """At x + δ both units are off: margin and gradient are 0. At x one is on, and leads back."""
    model = mf.models.mlp(2, 2, 1)
    hidden, last = model.parameters()
    with torch.no_grad():
        hidden.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        last.copy_(torch.tensor([[1.0, -1.0]]))
    x = torch.tensor([[0.05, 0.3], [0.6, 0.0], [0.0, -0.5], [0.0, -0.6]])
    y = torch.tensor([1, 1, -1, -1])
    attack = mf.attacks.FGSM(eps=0.1)
    before = mf.adversarial_margins(model, x, y, attack)
    assert float(before.values[0]) == 0
    assert not bool(before.dead_inputs[0])
    run = mf.maximize(model, (x, y), attack, epochs=200, batch_size=4)
    assert run.final["normalized_margin"] > 0.01
