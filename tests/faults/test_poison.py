"""NaN and infinity, injected wherever numbers come in: found, named, and never written.

What is promised: a spoilt number is met at its step, or by the step or measurement that follows; the error
names the example, the parameter or the step; the last good checkpoint and the measurements stay on disk.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import marginflow as mf
from marginflow.attacks import PGD, Attack, Query
from marginflow.cli import main
from marginflow.errors import DataError, DivergedError, InputError, ModelError
from marginflow.training import Callback, Rate, Trainer

BAD = [math.nan, math.inf, -math.inf]
ENGINES = ("fused", "autograd")
FGSM = "fgsm:eps=0.05"


def data(n: int = 24, d: int = 6) -> mf.Dataset:
    return mf.load(f"separable:n={n},d={d},margin=0.3").to(dtype=torch.float32)


def network(seed: int = 0) -> nn.Module:
    return mf.models.mlp(6, 8, 1, seed=seed)


def assert_clean(path: Path) -> int:
    """No NaN in any file of the run; every line is JSON; the last step that a checkpoint has."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} in JSON")

    for line in (path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=refuse)
        assert record["margin"] is not None
    json.loads((path / "run.json").read_text(), parse_constant=refuse)
    steps = []
    files = [*(path / "checkpoints").glob("*.safetensors"), *path.glob("trajectory/*.safetensors")]
    for file in files:
        for name, tensor in load_file(file).items():
            if name.startswith(("model.", "momentum.")) or "trajectory" in file.parts:
                assert bool(torch.isfinite(tensor.double()).all()), (file, name)
        steps.append(int("".join(filter(str.isdigit, file.stem))))
    return max(steps)


class SpoilWeights(Callback):
    """A weight becomes ``value`` after ``step`` steps, by nobody's fault that a step could see."""

    def __init__(self, step: int, value: float, name: str = "") -> None:
        self.step, self.value, self.name = step, value, name

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            found = dict(trainer.model.named_parameters())
            weight = found[self.name] if self.name else next(iter(found.values()))
            with torch.no_grad():
                weight.view(-1)[1] = self.value


# ------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "use",
    [
        lambda x, y: mf.train(network(), (x, y), epochs=1),
        lambda x, y: mf.gradient_flow(network(), (x, y), log_time=1),
        lambda x, y: mf.maximize(network(), (x, y), FGSM, epochs=1),
        lambda x, y: mf.adversarial_margins(network(), x, y, mf.attacks.build(FGSM)),
        lambda x, y: mf.certified_margins(
            network(), x, y, mf.attacks.build("fgm:eps=0.1"), method="norms"
        ),
        lambda x, y: mf.kkt_certificate(network(), x, y),
        lambda x, y: mf.Monitor(network(), (x, y)),
        lambda x, y: mf.references.max_margin(x.numpy(), y.numpy()),
    ],
    ids=["train", "flow", "maximize", "margins", "bounds", "certify", "monitor", "reference"],
)
def test_a_poisoned_example_is_named(use: Callable[..., object], value: float) -> None:
    found = data()
    x = found.x.clone()
    x[5, 2] = value
    with pytest.raises(InputError, match=r"finite") as caught:
        use(x, found.y)
    assert "x[5]" in str(caught.value) or "x:" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_poisoned_label_is_refused(value: float) -> None:
    found = data()
    y = found.y.double()
    y[3] = value
    with pytest.raises(DataError, match="y"):
        mf.train(network(), (found.x, y), epochs=1)


@pytest.mark.parametrize("value", BAD)
def test_a_poisoned_file_leaves_nothing(
    tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    found = data()
    x = found.x.numpy().copy()
    x[7, 0] = value
    np.savez(tmp_path / "bad.npz", x=x, y=found.y.numpy())
    words = (
        f"train --model mlp:8 --data npz:{tmp_path}/bad.npz --epochs 1 --out {tmp_path}/run".split()
    )
    assert main(words) == 2
    assert "x[7]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("job", ["train", "unmeasured", "seeds", "flow", "maximize", "bounds"])
def test_initial_weights_are_named(tmp_path: Path, job: str, value: float) -> None:
    model = network()
    name, weight = list(model.named_parameters())[1]
    with torch.no_grad():
        weight[0, 3] = value
    out = tmp_path / "run"
    fgm = mf.attacks.build("fgm:eps=0.1")
    jobs: dict[str, Callable[[], object]] = {
        "train": lambda: mf.train(model, data(), epochs=2, out=out),
        "unmeasured": lambda: mf.train(model, data(), epochs=2, out=out, measure=False),
        "seeds": lambda: mf.train_seeds(lambda seed: model, data(), seeds=2, epochs=2, out=out),
        "flow": lambda: mf.gradient_flow(model, data(), log_time=1, out=out),
        "maximize": lambda: mf.maximize(model, data(), FGSM, epochs=2, out=out),
        "bounds": lambda: mf.certified_margins(model, data().x, data().y, fgm, method="norms"),
    }
    with pytest.raises(ModelError, match=f"finite.*'{name}'"):
        jobs[job]()
    assert not out.exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("at", [4, 6, 30], ids=["mid-epoch", "end of epoch", "last step"])
def test_weights_spoilt_in_training(tmp_path: Path, engine: Any, value: float, at: int) -> None:
    """Ten epochs of three steps; found at the next step or before anything is kept."""
    out = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"weights of .* no longer finite") as caught:
        mf.train(
            network(), data(), attack=FGSM, batch_size=8, epochs=10, engine=engine, out=out,
            callbacks=[SpoilWeights(at, value)],
        )  # fmt: skip
    # A unit that −inf has switched off changes no loss: the measurement at the epoch's end finds it.
    assert at <= caught.value.step <= (at + 1 if value != -math.inf else 3 * (at // 3 + 1))
    assert "last good checkpoint" in str(caught.value)
    assert assert_clean(out) < at
    # It goes on from there, with nobody to spoil it.
    run = mf.train(
        network(), data(), attack=FGSM, batch_size=8, epochs=10, engine=engine, out=out, resume=True
    )
    whole = mf.train(network(), data(), attack=FGSM, batch_size=8, epochs=10, engine=engine)
    assert run.metrics[-1] == whole.metrics[-1]


@pytest.mark.parametrize("engine", ENGINES)
def test_spoilt_without_measurements_or_directory(engine: Any) -> None:
    with pytest.raises(DivergedError, match="no longer finite"):
        mf.train(
            network(), data(), epochs=3, engine=engine, measure=False,
            callbacks=[SpoilWeights(3, math.nan)],
        )  # fmt: skip


def test_spoilt_buffer() -> None:
    class WithBuffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.register_buffer("scale", torch.ones(1))
            self.register_buffer("mask", torch.tensor([-math.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    class Spoil(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == 2:
                trainer.model.get_buffer("scale").fill_(math.nan)

    assert mf.train(WithBuffer(), data(), epochs=2, measure=False).config["epochs"] == 2
    with pytest.raises(DivergedError, match="'scale'"):
        mf.train(WithBuffer(), data(), epochs=3, measure=False, callbacks=[Spoil()])


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("read", ["resume", "load_model", "measure", "certify"])
def test_checkpoint_with_nan_and_a_right_hash(tmp_path: Path, value: float, read: str) -> None:
    """Written by somebody else's hand: sound as a file, and still not believed."""
    from marginflow.runs import RunDirectory

    out = tmp_path / "run"
    run = mf.train("mlp:8", data(), attack=FGSM, epochs=4, out=out)
    directory = RunDirectory.reopen(out)
    found = directory.latest_checkpoint()
    assert found is not None
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    name = next(name for name in tensors if name.startswith("model."))
    tensors[name].view(-1)[0] = value
    info = {key: entry for key, entry in found.info.items() if key not in ("sha256", "file")}
    directory.save_checkpoint(tensors, info | {"step": run.metrics[-1]["step"]})
    directory.close()
    if read in ("measure", "certify"):
        assert main([read, str(out)]) == 2
        return
    reads: dict[str, Callable[[], object]] = {
        "resume": lambda: mf.train("mlp:8", data(), attack=FGSM, epochs=6, out=out, resume=True),
        "load_model": lambda: mf.load_run(out).load_model(),
    }
    with pytest.raises(ModelError, match=f"finite weights.*{name.removeprefix('model.')}"):
        reads[read]()


# -------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "at the last step"])
def test_gradient_hook(tmp_path: Path, value: float, momentum: float, last: bool) -> None:
    model, calls = network(), [0]
    poisoned = 30 if last else 10
    name, weight = next(iter(model.named_parameters()))

    def hook(gradient: Tensor) -> Tensor:
        calls[0] += 1
        return torch.full_like(gradient, value) if calls[0] == poisoned else gradient

    weight.register_hook(hook)
    with pytest.raises(DivergedError, match=f"gradient of step {poisoned} by '{name}'") as caught:
        mf.train(
            model, data(), batch_size=8, epochs=10, momentum=momentum, engine="autograd",
            measure_with=FGSM, out=tmp_path / "run",
        )  # fmt: skip
    assert poisoned <= caught.value.step <= poisoned + 1
    assert assert_clean(tmp_path / "run") < poisoned


class Sick(nn.Module):
    """A network that answers ``value`` for the examples near ``who``, from its call ``since`` on."""

    def __init__(self, who: Tensor, value: float, since: int) -> None:
        super().__init__()
        self.inner = network()
        self.who, self.value, self.since, self.calls = who, value, since, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        out = self.inner(x)
        near = (x - self.who).abs().amax(1, keepdim=True) < 0.2
        if self.calls >= self.since:
            out = torch.where(near, out * 0 + self.value, out)
        return out


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_output_of_one_example(batch_size: int | None, value: float) -> None:
    found = data()
    # Infinity on the wrong side: on the right one the loss is 0, and nothing is wrong with the step.
    model = Sick(found.x[17], -value * float(found.y[17]), since=12)
    with pytest.raises(DivergedError) as caught:
        mf.train(model, found, batch_size=batch_size, epochs=20, measure=False)
    kind = "NaN" if math.isnan(value) else "infinite"
    assert f"outputs are {kind} at example 17" in str(caught.value)
    assert 12 <= caught.value.step <= (12 if batch_size is None else 15)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lr", [1e12, 1e25, 1e38])
def test_overflow_in_float32(tmp_path: Path, engine: Any, lr: float) -> None:
    out = tmp_path / "run"
    with pytest.raises(DivergedError, match="lower lr"):
        mf.train(
            network(), data(), loss="exponential", lr=lr, epochs=30, engine=engine, out=out,
            dtype="float32", measure_with=FGSM,
        )  # fmt: skip
    assert_clean(out)
    # What it says helps: a smaller rate trains from the same start.
    assert (
        mf.train(network(), data(), lr=0.1, epochs=3, out=out, force=True).metrics[-1]["epoch"] == 3
    )


def test_command_line_says_diverged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train --model mlp:8 --data separable:n=20,d=6,margin=0.3 --loss exponential --lr 1e25 --epochs 9"
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 1
    assert "lower lr" in capsys.readouterr().err
    assert_clean(tmp_path / "run")


# ---------------------------------------------------------------------------------------- attacks


class Own(Attack):
    """An attack of one's own that does wrong at its call number ``at``."""

    name = "own"

    def __init__(self, kind: str, at: int = 1) -> None:
        super().__init__(0.1, math.inf)
        for key, value in {"kind": kind, "at": at, "calls": [0]}.items():
            object.__setattr__(self, key, value)

    def _perturb(self, query: Query, generator: torch.Generator | None) -> Any:
        x = query.x
        delta, dead = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        self.calls[0] += 1  # type: ignore[attr-defined]
        if self.calls[0] < self.at:  # type: ignore[attr-defined]
            return delta, dead
        one = delta.clone()
        kind: str = self.kind  # type: ignore[attr-defined]
        if kind in ("nan", "inf", "-inf"):
            one[1, 2] = float(kind)
        return {
            "row": (delta[:1], dead),
            "column": (delta[:, :1], dead),
            "scalar": (delta.sum(), dead),
            "float64": (delta.double(), dead),
            "integers": (delta.long(), dead),
            "meta": (delta.to("meta"), dead),
            "no dead": delta,
            "three": (delta, dead, dead),
            "numpy": (delta.numpy(), dead),
            "dead as numbers": (delta, dead.float()),
            "one dead": (delta, dead[:1]),
            "none": None,
        }.get(kind, (one, dead))


KINDS = [
    *("nan", "inf", "-inf", "row", "column", "scalar", "float64", "integers", "meta", "no dead"),
    *("three", "numpy", "dead as numbers", "one dead", "none"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_own_attack_that_answers_wrongly(tmp_path: Path, kind: str) -> None:
    found, out = data(), tmp_path / "run"
    with pytest.raises(InputError, match="attack 'own'"):
        Own(kind)(network(), found.x, found.y)
    with pytest.raises(InputError, match="attack 'own'"):
        mf.adversarial_margins(network(), found.x, found.y, Own(kind))
    with pytest.raises(InputError, match=r"attack 'own'.*met at step \d+"):
        mf.train(network(), found, attack=Own(kind, at=12), measure_with=FGSM, epochs=20, out=out)
    assert_clean(out)
    assert mf.load_run(out).checkpoint().info["step"] > 0


def test_own_attack_outside_the_ball_is_brought_in() -> None:
    class Far(Attack):
        name = "far"

        def _perturb(self, query: Query, generator: Any) -> Any:
            return torch.full_like(query.x, 1e30), torch.zeros(len(query.x), dtype=torch.bool)

    found = data()
    for p in (1, 2, math.inf):
        delta = Far(0.1, p)(network(), found.x, found.y).delta
        assert float(torch.linalg.vector_norm(delta, p, dim=1).max()) <= 0.1 * (1 + 1e-6)


def test_a_subclass_of_our_attack_is_checked_too() -> None:
    class Worse(PGD):
        def _perturb(self, query: Query, generator: Any) -> Any:
            delta, dead = super()._perturb(query, generator)
            return delta / 0 * 0, dead

    found = data()
    with pytest.raises(InputError, match="finite δ"):
        Worse("linf", eps=0.1, steps=2)(network(), found.x, found.y)


# --------------------------------------------------------------------------------- learning rates


class Schedule(Rate):
    """A schedule of one's own that goes wrong."""

    name = "schedule"

    def __init__(self, bad: float, at: int) -> None:
        super().__init__()
        self.bad, self.at = bad, at

    @property
    def spec(self) -> str:
        return "schedule"

    def rate(self, trainer: Trainer) -> float:
        return self.bad if trainer.step + 1 == self.at else 0.1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [*BAD, 0.0, -0.1])
def test_own_schedule(tmp_path: Path, engine: Any, bad: float) -> None:
    out = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"step 7 .*learning rate 'schedule'") as caught:
        mf.train(
            network(), data(), attack=FGSM, lr=Schedule(bad, 7), epochs=20, engine=engine, out=out
        )
    assert caught.value.step == 7
    assert assert_clean(out) == 6


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_constant_rate(value: float) -> None:
    with pytest.raises(InputError, match=r"lr|learning rate|expected"):
        mf.train(network(), data(), lr=value, epochs=1)


# ------------------------------------------------------------------------- several seeds, ascents


def test_one_seed_diverges_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side: seed 1 is spoilt at its last step; the others end with their own numbers."""
    before = Trainer.note

    def note(self: Trainer, *arguments: Any, **named: Any) -> None:
        before(self, *arguments, **named)
        if self.seed == 1 and self.step == 20:
            with torch.no_grad():
                next(self.model.parameters())[0, 0] = math.nan

    monkeypatch.setattr(Trainer, "note", note)
    with pytest.raises(DivergedError, match=r"1 of 3 seeds diverged; the others .*seed 1"):
        mf.train_seeds("mlp:8", data(), seeds=3, attack=FGSM, epochs=20, out=tmp_path / "runs")
    for seed in range(3):
        last = assert_clean(tmp_path / "runs" / f"seed-{seed}")
        assert (last == 20) == (seed != 1)


@pytest.mark.parametrize("method", ["spheres", "relative"])
def test_ascent_with_spoilt_weights(tmp_path: Path, method: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"no longer finite|NaN"):
        mf.maximize(
            network(), data(), FGSM, method=method, epochs=30, out=out,
            callbacks=[SpoilWeights(5, math.nan)],
        )  # fmt: skip
    assert assert_clean(out) < 6


# ---------------------------------------------------------------------------------------- monitor


@pytest.mark.parametrize("value", BAD)
def test_monitor_leaves_a_strangers_loop_alone(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers that are not there are null, it warns once, and the good checkpoint stays."""
    model, found = network(), data()
    with mf.Monitor(model, found, FGSM, schedule="every", out=tmp_path / "run") as monitor:
        monitor.measure(1)
        with torch.no_grad():
            next(model.parameters())[0, 0] = value
        for step in (2, 3):
            assert monitor.measure(step)["normalized_margin"] is None
    assert sum("not normalised" in r.getMessage() for r in caplog.records) == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert "Infinity" not in lines
    assert len(lines.splitlines()) == 3
    weights = mf.load_run(tmp_path / "run").checkpoint().tensors
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())


@pytest.mark.parametrize("value", BAD)
def test_monitor_says_that_outputs_are_spoilt(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are finite, one example's output is not: null, and said once."""
    found = data()
    model = Sick(found.x[17], value if math.isnan(value) else -abs(value) * float(found.y[17]), 1)
    monitor = mf.Monitor(model, found, FGSM, schedule="every")
    model.calls = 1
    for step in (1, 2):
        assert monitor.measure(step)["margin"] is None
    assert sum("NaN or infinite" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("since", [0, 40], ids=["at the start", "later"])
def test_a_spoilt_measurement_ends_our_own_training(tmp_path: Path, since: int) -> None:
    """Finite weights and steps, but NaN in evaluation: not recorded as if nothing had been measured."""

    class SickInEvaluation(Sick):
        def forward(self, x: Tensor) -> Tensor:
            self.since = 10**9 if self.training or self.calls < since else 0
            return super().forward(x)

    found, out = data(), tmp_path / "run"
    model = SickInEvaluation(found.x[17], math.nan, 0)
    with pytest.raises(DivergedError, match="smallest margin is NaN"):
        mf.train(model, found, epochs=60, out=out)
    if since:
        assert 0 < assert_clean(out) < since
    else:
        assert not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text()


def test_flow_meets_nan_on_its_way(tmp_path: Path) -> None:
    """The gradient of a flow turns NaN after 60 evaluations: the last good point is kept."""
    model, calls = network(), [0]

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * math.nan if calls[0] > 400 else output

    model.register_forward_hook(hook)
    out = tmp_path / "flow"
    with pytest.raises(DivergedError, match=r"flow.*NaN|flow.*nan") as caught:
        mf.gradient_flow(model, data(), log_time=60, out=out)
    assert "last good point" in str(caught.value)
    assert_clean(out)


# -------------------------------------------------------------------------------- random injection


@pytest.mark.parametrize("engine", ENGINES)
def test_any_weight_at_any_step(tmp_path: Path, engine: Any) -> None:
    """Twenty times an engine: a weight, a step and a value at random; never a NaN on disk."""
    draw = random.Random(5)
    for case in range(20):
        out, at = tmp_path / str(case), draw.randint(1, 12)
        name = draw.choice([n for n, _ in network().named_parameters()])
        with pytest.raises(DivergedError) as caught:
            mf.train(
                network(), data(), attack=FGSM, batch_size=8, epochs=4, engine=engine, out=out,
                callbacks=[SpoilWeights(at, draw.choice(BAD), name)],
            )  # fmt: skip
        assert at <= caught.value.step <= 3 * (at // 3 + 1), name
        assert assert_clean(out) < at
