"""``mf.Monitor`` in loops of others: what it measures, leaves alone, records and refuses."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

import marginflow as mf
from marginflow.errors import DataError, InputError, ModelError, RunError
from marginflow.report import statement, write_report

EPS = 0.1
FGSM = mf.attacks.FGSM(eps=EPS)


@pytest.fixture(scope="module")
def digits() -> mf.Dataset:
    return mf.load("digits:3,8")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 1, bias=False)
    )


def batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(144, 1),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "batch norm": batch_norm}


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: mf.Dataset) -> None:
    """Adversarial training as people write it."""
    model.train()
    for rows in torch.randperm(data.n).split(48):
        x, y = data.x[rows].clone().requires_grad_(), data.y[rows]
        (slope,) = torch.autograd.grad(softplus(-y * model(x)[:, 0]).sum(), x)
        moved = (x + EPS * slope.sign()).detach()
        optimizer.zero_grad()
        softplus(-y * model(moved)[:, 0]).mean().backward()
        optimizer.step()


def train(model: nn.Module, data: mf.Dataset, epochs: int, monitor: mf.Monitor | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for k in range(epochs):
        epoch(model, optimizer, data)
        if monitor is not None:
            monitor.measure(k + 1, epoch=k + 1)


def everything(model: nn.Module) -> list[Any]:
    """Whatever a measurement must not touch, as bits."""
    return [
        *[w.detach().numpy().tobytes() for w in model.state_dict().values()],
        *[None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        *[m.training for m in model.modules()],
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),  # noqa: NPY002
        random.getstate(),
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_training_is_the_same_to_the_bit_with_a_monitor(
    kind: str, digits: mf.Dataset, tmp_path: Path
) -> None:
    ends = []
    for watched in (False, True):
        model = MODELS[kind]()
        monitor = None
        if watched:
            monitor = mf.Monitor(model, digits, FGSM, out=tmp_path / "run", schedule="every")
        torch.manual_seed(1)
        train(model, digits, 4, monitor)
        ends.append(everything(model))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", MODELS)
def test_measuring_leaves_everything_alone(kind: str, digits: mf.Dataset) -> None:
    model = MODELS[kind]()
    train(model, digits, 1, None)
    model[0].eval()  # a mixed mode
    before = everything(model)
    monitor = mf.Monitor(model, digits, "pgd-linf:eps=0.1,steps=3,random=true", loss="logistic")
    monitor.measure(0)
    assert everything(model) == before


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Margins without and with FGSM, in evaluation mode, from nothing but autograd."""
    model.eval()
    x = x.clone().requires_grad_()
    clean = y * model(x)[:, 0]
    (slope,) = torch.autograd.grad(clean.sum(), x)
    with torch.no_grad():
        hit = y * model(x - EPS * slope.sign())[:, 0]
    return clean.detach(), hit


def test_a_network_with_batch_norm_is_measured_as_far_as_it_goes(
    digits: mf.Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    model = batch_norm()
    train(model, digits, 3, None)
    with caplog.at_level(logging.WARNING, "marginflow"):
        monitor = mf.Monitor(model, digits, FGSM)
    assert "BatchNorm2d" in caplog.text
    assert set(monitor.left_out) >= {"normalized_margin", "norm_product"}
    assert all("BatchNorm2d" in reason for reason in monitor.left_out.values())
    found = monitor.measure(3)
    clean, hit = by_hand(model, digits.x, digits.y)
    assert found["margin"] == pytest.approx(float(hit.min()), rel=1e-5)
    assert found["clean_margin"] == pytest.approx(float(clean.min()), rel=1e-5)
    assert found["adversarial_accuracy"] == pytest.approx(float((hit > 0).double().mean()))
    assert found["margin_quantiles"] == pytest.approx(
        np.quantile(hit.double().numpy(), mf.monitor.QUANTILES).tolist(), rel=1e-5
    )
    norms = [float(p.detach().norm()) for p in model.parameters()]
    assert found["layer_norms"] == pytest.approx(norms, rel=1e-6)
    assert found["total_norm"] == pytest.approx(math.hypot(*norms), rel=1e-6)
    for name in monitor.left_out:
        assert found[name] is None
    assert found["test_adversarial_accuracy"] > 0.5


def test_the_numbers_are_those_of_our_own_training(digits: mf.Dataset) -> None:
    """The weights of a run of mf.train, measured again from outside."""
    run = mf.train("mlp:8", digits, attack=FGSM, epochs=3, lr=0.1, batch_size=32)
    assert run.model is not None
    seen = mf.Monitor(run.model, digits, FGSM, loss="logistic").measure(3)
    for key, value in run.final.items():
        if key in seen and key not in ("step", "epoch"):
            assert seen[key] == value, key


def test_undue_steps_return_the_record_before_and_the_last_comes_with_close(
    digits: mf.Dataset,
) -> None:
    model = plain()
    with mf.Monitor(model, digits, FGSM, schedule=[0, 5]) as monitor:
        first = monitor.measure(0)
        assert monitor.measure(3) is first
        assert monitor.measure(4, now=True)["step"] == 4
        monitor.measure(5)
        monitor.measure(7, note="last")
    assert [r["step"] for r in monitor.records] == [0, 4, 5, 7]
    assert monitor.records[-1]["note"] == "last"


def test_a_run_directory_like_our_own(digits: mf.Dataset, tmp_path: Path) -> None:
    model = plain()
    out = tmp_path / "mine"
    with mf.Monitor(
        model, digits, FGSM, loss="logistic", out=out, training={"attack": FGSM, "momentum": 0.9}
    ) as monitor:
        train(model, digits, 15, monitor)
    run = mf.load_run(out)
    assert run.metrics == monitor.records
    assert run.config["kind"] == "monitor"
    assert run.config["declared"] == ["attack", "momentum"]
    restored = run.load_model(into=plain())
    for one, two in zip(restored.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert "Training against FGSM" in statement([run])
    page = write_report(
        [run, mf.train("mlp:8", digits, attack=FGSM, epochs=2)], tmp_path / "a.html"
    )
    assert "not said" not in page.read_text(encoding="utf-8")
    verdicts = {v.statement: v for v in mf.verify(run, model=plain())}
    assert verdicts["Lemma 3"].outcome == "holds"  # scale invariance needs no path
    assert verdicts["Theorem 4 (identity)"].outcome == "holds"
    same = {v.statement: v.outcome for v in mf.verify(monitor.run, digits)}
    assert same == {name: v.outcome for name, v in verdicts.items()}


def test_what_a_loop_does_not_say_is_unknown(digits: mf.Dataset, tmp_path: Path) -> None:
    """Neither met nor unmet; a declared setting is judged."""
    model = mf.models.deep_linear(64, 4, 1, seed=0)
    x = digits.x.flatten(1)
    data = mf.Dataset(x, digits.y)
    found = []
    for training in (None, {"batch_size": data.n, "momentum": 0.0, "lr": 0.1, "loss": "logistic"}):
        monitor = mf.Monitor(model, data, mf.attacks.FGM(eps=0.01), training=training)
        monitor.measure(0)
        lemma = next(v for v in mf.verify(monitor.run, data) if v.statement == "Lemma 2")
        found.append({h.name: h.met for h in lemma.hypotheses})
    unsaid, said = found
    assert unsaid["full-batch gradient descent"] is None
    assert said["full-batch gradient descent"] is True
    with pytest.raises(InputError, match="training: expected names out of attack, batch_size"):
        mf.Monitor(model, data, training={"learning_rate": 0.1})


def test_the_report_of_a_network_without_normalised_margins(
    digits: mf.Dataset, tmp_path: Path
) -> None:
    model = batch_norm()
    with mf.Monitor(model, digits, FGSM, out=tmp_path / "bn") as monitor:
        train(model, digits, 5, monitor)
    run = mf.load_run(tmp_path / "bn")
    words = statement([run])
    assert "training loop of its own" in words
    assert "not normalised" in words
    text = write_report([run], tmp_path / "bn.html").read_text(encoding="utf-8")
    for expected in ("Margins, not normalised", "BatchNorm2d", "A stronger attack beside it"):
        assert expected in text
    assert "None" not in text
    assert {v.outcome for v in mf.verify(run, model=batch_norm())} == {"does not apply"}


def test_a_killed_loop_goes_on(digits: mf.Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = plain()
    first = mf.Monitor(model, digits, FGSM, out=out, schedule="every")
    for step in range(6):
        first.measure(step)
    first._recorder.close()  # type: ignore[union-attr]  # as if the process had died
    with pytest.raises(RunError, match="already holds a run"):
        mf.Monitor(model, digits, FGSM, out=out)
    with pytest.raises(RunError, match=r"measure_with is 'fgsm:eps=0\.1' there"):
        mf.Monitor(model, digits, mf.attacks.FGSM(eps=0.2), out=out, resume=True)
    kept = [json.dumps(r) for r in first.records]
    second = mf.Monitor(model, digits, FGSM, out=out, schedule="every", resume=True)
    assert len(second.records) == 6
    second.measure(4)
    second.measure(5)
    second.close()
    assert [json.dumps(r) for r in mf.load_run(out).metrics] == kept
    mf.Monitor(model, digits, FGSM, out=out, force=True).close()
    assert mf.load_run(out).metrics == []


def test_a_sample_by_size_and_seed(digits: mf.Dataset, tmp_path: Path) -> None:
    model = plain()
    few = mf.Monitor(model, digits, FGSM, examples=50, seed=3, out=tmp_path / "few")
    assert few.data.n == 50
    assert few.data.test is not None
    assert few.data.test.n == 50
    few.measure(0)
    few.close()
    again = digits.sample(50, seed=3)
    assert torch.equal(again.x, few.data.x)
    assert not torch.equal(digits.sample(50, seed=4).x, few.data.x)
    m = mf.adversarial_margins(model, again.x, again.y, FGSM)
    assert few.records[0]["normalized_margin"] == m.normalized_min
    run = mf.load_run(tmp_path / "few")
    assert torch.equal(run.load_data().x, few.data.x)  # found again from name, size and seed
    assert mf.Monitor(model, digits, examples=10**6).data.n == digits.n


def test_a_loader_of_batches(digits: mf.Dataset) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(digits.x, digits.y), batch_size=37, shuffle=True)
    model = plain()
    state = torch.get_rng_state()
    monitor = mf.Monitor(model, loader, FGSM)
    assert torch.equal(torch.get_rng_state(), state)
    assert monitor.data.n == digits.n
    found = monitor.measure(0)
    m = mf.adversarial_margins(model, digits.x, digits.y, FGSM)
    assert found["normalized_margin"] == pytest.approx(m.normalized_min, rel=1e-5)


def test_wrapped_models_and_several_classes() -> None:
    data = mf.load("digits:0,1,2")
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False))
    wrapped = nn.DataParallel(inner)
    monitor = mf.Monitor(wrapped, (data.x.numpy(), data.y.numpy()), FGSM, loss="cross-entropy")
    assert monitor.model is inner
    with torch.no_grad():
        logits = inner(data.x)
    found = monitor.measure(0)
    assert found["clean_accuracy"] == pytest.approx(
        float((logits.argmax(1) == data.y).double().mean())
    )
    clean = mf.Monitor(inner, data, loss="cross-entropy").measure(0)
    assert clean["log_loss"] == pytest.approx(
        math.log(float(cross_entropy(logits, data.y))), rel=1e-5
    )


def test_in_inference_mode_and_under_autocast(digits: mf.Dataset) -> None:
    model = plain()
    monitor = mf.Monitor(model, digits, FGSM, schedule="every")
    expected = {k: v for k, v in monitor.measure(0).items() if k != "step"}
    with torch.inference_mode():
        one = monitor.measure(1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        two = monitor.measure(2)
    for found in (one, two):
        assert {k: v for k, v in found.items() if k != "step"} == expected


def test_the_alarm_of_catastrophic_overfitting(caplog: pytest.LogCaptureFixture) -> None:
    """FGSM of ε = 0.3 on three hundred digits learns to fool FGSM alone; ε = 0.05 does not."""
    data = mf.load("digits:n=300")
    for eps, fires in ((0.3, True), (0.05, False)):
        monitor = None
        model = mf.models.mlp(64, 128, 10, seed=0)

        class Watch(mf.training.Callback):
            def on_epoch(self, trainer: Any) -> None:
                monitor.measure(trainer.epoch, epoch=trainer.epoch)  # noqa: B023

        monitor = mf.Monitor(model, data, mf.attacks.FGSM(eps=eps), schedule=range(0, 121, 10))
        caplog.clear()
        mf.train(
            model, data, attack=f"fgsm:eps={eps}", lr=0.2, batch_size=16, epochs=120,
            measure=False, callbacks=[Watch()],
        )  # fmt: skip
        assert (monitor.overfitting is not None) == fires
        assert monitor.records[-1]["overfitting"] == fires
        assert caplog.text.count("catastrophic overfitting") == int(fires)
        if fires:
            assert "overfitted catastrophically" in " ".join(
                mf.report._statement.caveats([monitor.run])
            )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": 3}, InputError, r"data: expected a Dataset, a pair"),
        ({"data": [1, 2, 3]}, InputError, "of something else"),
        ({"model": "mlp:3"}, InputError, r"expected a torch\.nn\.Module, got str"),
        ({"schedule": "sometimes"}, InputError, "schedule"),
        ({"schedule": 5}, InputError, "schedule: expected 'log', 'every' or steps"),
        ({"examples": 0}, InputError, "size"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"attack": "fgsm:eps=16"}, InputError, "in units of 1/255"),
        ({"resume": True, "force": True}, InputError, "exclude each other"),
        ({"log": ("tensorbord",)}, InputError, "tensorboard"),
        ({"training": {"lr": torch.zeros(3)}}, InputError, "training: lr: expected a number"),
        ({"training": {"attack": "bogus"}}, InputError, "unknown attack 'bogus'"),
        ({"training": {"attack": len}}, InputError, "expected"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(1))},
            ModelError,
            "run one batch first",
        ),
        ({"model": nn.Bilinear(64, 64, 1)}, ModelError, "does not take inputs"),
        ({"data": (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))}, DataError, r"2\*y - 1"),
    ],
)
def test_misuse_writes_nothing(
    change: dict[str, Any], error: type[Exception], message: str, digits: mf.Dataset, tmp_path: Path
) -> None:
    asked = {"model": plain(), "data": digits, "attack": FGSM, "out": tmp_path / "run"} | change
    with pytest.raises(error, match=message):
        mf.Monitor(asked.pop("model"), asked.pop("data"), asked.pop("attack"), **asked)
    assert not (tmp_path / "run").exists()
    monitor = mf.Monitor(plain(), digits)
    with pytest.raises(InputError, match="step"):
        monitor.measure(-1)


def test_sinks_get_every_record(digits: mf.Dataset) -> None:
    class Keeping:
        def __init__(self) -> None:
            self.seen: list[Any] = []
            self.closed = False

        def write(self, records: Any) -> None:
            self.seen.extend(records)

        def close(self) -> None:
            self.closed = True

    sink = Keeping()
    with mf.Monitor(plain(), digits, FGSM, log=(sink,), schedule="every") as monitor:
        for step in range(3):
            monitor.measure(step)
    assert sink.seen == monitor.records
    assert sink.closed


def test_other_processes_of_a_distributed_loop_measure_nothing(
    digits: mf.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monitor = mf.Monitor(plain(), digits, FGSM, out=tmp_path / "run")
    assert monitor.measure(0) == {}
    monitor.close()
    assert not (tmp_path / "run").exists()


def test_a_loop_that_diverges_is_not_ended(
    digits: mf.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A record without margins, one warning, and the last good weights on disk."""
    for kind, make in MODELS.items():
        model = make()
        out = tmp_path / kind
        monitor = mf.Monitor(model, digits, FGSM, loss="logistic", out=out, schedule="every")
        monitor.measure(0)
        good = {n: w.clone() for n, w in model.state_dict().items()}
        caplog.clear()
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        found = monitor.measure(1)
        monitor.measure(2)
        assert found["normalized_margin"] is None
        assert found["margin"] is None
        assert found["adversarial_accuracy"] == 0
        assert len(found["layer_norms"]) == len(monitor.records[0]["layer_norms"])
        assert caplog.text.count("not normalised") == (kind == "plain")
        monitor.close()
        kept = mf.load_run(out).checkpoint()
        assert kept.info["step"] == 0
        assert all(torch.equal(kept.tensors[f"model.{n}"], w) for n, w in good.items())
        write_report([mf.load_run(out)], out / "report.html")


def test_what_a_caller_adds(digits: mf.Dataset) -> None:
    monitor = mf.Monitor(plain(), digits, schedule="every")
    found = monitor.measure(
        0, loss=torch.tensor(0.5), lr=np.float32(0.25), phase="warm-up", grad=math.nan, t=[1, 2.0]
    )
    json.dumps(monitor.records, allow_nan=False)
    assert (found["loss"], found["lr"], found["phase"], found["grad"]) == (
        0.5,
        0.25,
        "warm-up",
        None,
    )
    with pytest.raises(InputError, match="optimizer: expected a number"):
        monitor.measure(1, optimizer=torch.optim.SGD(plain().parameters(), lr=1.0))
    with pytest.raises(InputError, match="batch: expected a number"):
        monitor.measure(1, batch=torch.zeros(3))
    assert len(monitor.records) == 1


def test_what_is_not_known_to_apply_cannot_fail() -> None:
    from marginflow.theorems._verdict import NOT_SAID, Claim, Hypothesis

    for detail, outcome in ((NOT_SAID, "not reached"), ("not examined", "fails")):
        unknown = Hypothesis("no momentum", None, detail)
        verdict = Claim("Lemma 0", "", (unknown,), "", "", "").judge(False, "1")
        assert verdict.outcome == outcome
    assert (
        Claim("Lemma 0", "", (Hypothesis("m", None, NOT_SAID),), "", "", "")
        .judge(True, "1")
        .outcome
        == "holds"
    )


def test_labels_that_do_not_fit_are_found_before_anything_is_written(
    digits: mf.Dataset, tmp_path: Path
) -> None:
    y = torch.ones(60, dtype=torch.int64)
    y[50] = 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(DataError, match="expected 0 … 1"):
        mf.Monitor(model, (digits.x[:60], y), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_reading_a_loader_moves_no_random_state(digits: mf.Dataset) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    class Drawing(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            random.random()
            np.random.rand()  # noqa: NPY002
            return super().__getitem__(index)

    own = torch.Generator().manual_seed(7)
    loader = DataLoader(
        Drawing(digits.x[:40], digits.y[:40]), batch_size=8, shuffle=True, generator=own
    )
    model = plain()
    before, state = everything(model), own.get_state()
    mf.Monitor(model, loader, FGSM)
    assert torch.equal(own.get_state(), state)
    assert everything(model) == before


def test_data_are_not_changed_by_a_model_that_works_in_place(digits: mf.Dataset) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            x -= 0.1
            return self.last(x.flatten(1))  # type: ignore[no-any-return]

    x = digits.x.clone()
    monitor = mf.Monitor(InPlace(), (x, digits.y), schedule="every")
    first, second = monitor.measure(0), monitor.measure(1)
    assert first["margin"] == second["margin"]
    assert torch.equal(x, digits.x)


def test_layers_are_measured_again_when_parameters_are_set_free(
    digits: mf.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = plain()
    first = next(model.parameters()).requires_grad_(False)
    monitor = mf.Monitor(model, digits, FGSM, schedule="every", out=tmp_path / "run")
    monitor.measure(0)
    first.requires_grad_(True)
    with torch.no_grad():
        first.mul_(10)
    found = monitor.measure(1)
    assert "other parameters are trained" in caplog.text
    fresh = mf.Monitor(model, digits, FGSM).measure(1)
    assert found["normalized_margin"] == fresh["normalized_margin"]
    assert len(mf.load_run(tmp_path / "run").config["layers"]) == 2


def test_outputs_that_depend_on_the_batch_are_told(
    digits: mf.Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    mf.Monitor(nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 1)), digits)
    assert "depend on the others in its batch" in caplog.text
    caplog.clear()
    mf.Monitor(batch_norm(), digits)
    assert "depend on the others" not in caplog.text


def test_made_in_inference_mode(digits: mf.Dataset) -> None:
    model = plain()
    with torch.inference_mode():
        x = digits.x * 1
        monitor = mf.Monitor(model, (x, digits.y), FGSM, examples=50)
    seen = monitor.measure(np.int64(0))
    assert (
        seen["adversarial_accuracy"]
        == mf.Monitor(model, (digits.x, digits.y), FGSM, examples=50).measure(0)[
            "adversarial_accuracy"
        ]
    )


def test_a_closed_monitor_and_another_network_are_refused(
    digits: mf.Dataset, tmp_path: Path
) -> None:
    with mf.Monitor(plain(), digits, FGSM, out=tmp_path / "run") as monitor:
        monitor.measure(0)
        with pytest.raises(InputError, match="margin: a measurement has this name"):
            monitor.measure(1, margin=9)
    with pytest.raises(RunError, match="the monitor is closed"):
        monitor.measure(1)
    wider = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 17, bias=False), nn.ReLU(), nn.Linear(17, 1, bias=False)
    )
    with pytest.raises(RunError, match="shapes is"):
        mf.Monitor(wider, digits, FGSM, out=tmp_path / "run", resume=True)


def test_sinks_are_told_what_ended_a_loop(digits: mf.Dataset) -> None:
    seen: list[object] = []

    class Telling:
        def write(self, records: Any) -> None: ...
        def close(self) -> None: ...

    monitor = mf.Monitor(plain(), digits, log=(Telling(),))
    monitor.measure(0)
    monitor._sinks.close = seen.append  # type: ignore[method-assign,assignment]
    error = ValueError("boom")
    with pytest.raises(ValueError, match="boom"), monitor:
        raise error
    assert seen == [error]
