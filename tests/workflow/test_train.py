"""``mf.train`` as its users call it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import marginflow as mf
from marginflow.errors import (
    DataError,
    DivergedError,
    InputError,
    ModelError,
    NotHomogeneousError,
    RunError,
    SpecificationError,
    StorageError,
)
from stopping import CrashAt

DATA = "separable:n=24,d=6,margin=0.3"
SMALL: dict[str, Any] = {"attack": "fgm:eps=0.1", "lr": 0.2, "batch_size": 8, "epochs": 12}


def final_weights(run: mf.Run) -> list[torch.Tensor]:
    return [p.detach() for p in run.load_model().parameters()]


def test_the_result_is_in_the_model_and_in_the_run(tmp_path: Path) -> None:
    data = mf.load(DATA)
    model = mf.models.mlp(6, 8, 1, seed=1).double()
    start = [p.detach().clone() for p in model.parameters()]
    run = mf.train(model, data, **SMALL, out=tmp_path / "run")
    assert not any(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    read = mf.load_run(tmp_path / "run")
    assert read.metrics == run.metrics
    for a, b in zip(model.parameters(), read.load_model().parameters(), strict=True):
        assert torch.equal(a, b)
    measured = mf.adversarial_margins(model, data.x, data.y, mf.attacks.FGM(0.1))
    assert run.final["normalized_margin"] == measured.normalized_min
    assert run.final["adversarial_accuracy"] == measured.accuracy
    assert run.final["epoch"] == 12
    assert read.config["versions"]["torch"] == torch.__version__


def test_measuring_and_recording_change_no_bit(tmp_path: Path) -> None:
    runs = [
        mf.train("mlp:8", DATA, **SMALL),
        mf.train("mlp:8", DATA, **SMALL, measure=False),
        mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "run", schedule=[3]),
    ]
    for a, b, c in zip(*map(final_weights, runs), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert runs[1].metrics == []
    assert [m["epoch"] for m in runs[2].metrics] == [3, 12]


def test_the_seed_decides() -> None:
    one, same, other = (mf.train("mlp:8", DATA, **SMALL, seed=s) for s in (1, 1, 2))
    assert one.metrics == same.metrics
    assert one.metrics != other.metrics


def test_adversarial_training_beats_standard_training_under_the_same_attack() -> None:
    options = {**SMALL, "epochs": 400, "batch_size": None}
    attack = options.pop("attack")
    hardened = mf.train("mlp:16", DATA, **options, attack=attack)
    standard = mf.train("mlp:16", DATA, **options, measure_with=attack)
    assert hardened.config["measure_with"] == standard.config["measure_with"] == "fgm:eps=0.1"
    assert standard.config["attack"] == "none"
    assert hardened.final["normalized_margin"] > standard.final["normalized_margin"]
    assert hardened.final["adversarial_accuracy"] == 1.0


@pytest.mark.parametrize("stop_at", [1, 2, 10, 11, 29])
def test_a_resumed_run_has_the_very_bits(tmp_path: Path, stop_at: int) -> None:
    whole = mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "whole")
    with pytest.raises(InterruptedError):
        mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "cut", callbacks=[CrashAt(stop_at)])
    mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "cut", resume=True)
    bytes_of = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert bytes_of[0] == bytes_of[1]
    for a, b in zip(
        final_weights(whole), final_weights(mf.load_run(tmp_path / "cut")), strict=True
    ):
        assert torch.equal(a, b)


def test_a_finished_run_resumes_to_itself_and_can_be_prolonged(tmp_path: Path) -> None:
    mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert again.final["epoch"] == 12
    longer = {**SMALL, "epochs": 20}
    prolonged = mf.train("mlp:8", DATA, **longer, out=tmp_path / "run", resume=True)
    straight = mf.train("mlp:8", DATA, **longer)
    for a, b in zip(final_weights(prolonged), final_weights(straight), strict=True):
        assert torch.equal(a, b)
    assert prolonged.config["epochs"] == 20
    with pytest.raises(RunError, match="epochs: expected at least 20"):
        mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "run", resume=True)


def test_resuming_under_other_settings_is_refused_untouched(tmp_path: Path) -> None:
    mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for change in ({"lr": 0.3}, {"attack": "fgm:eps=0.2"}, {"seed": 4}, {"momentum": 0.5}):
        with pytest.raises(RunError, match=f"other settings.*{next(iter(change))}"):
            mf.train("mlp:8", DATA, **{**SMALL, **change}, out=tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="other settings"):
        mf.train("mlp:9", DATA, **SMALL, out=tmp_path / "run", resume=True)
    data = mf.load(DATA)
    changed = mf.Dataset(data.x * 1.5, data.y, name=data.name)
    with pytest.raises(RunError, match="data_sha256"):
        mf.train("mlp:8", changed, **SMALL, out=tmp_path / "run", resume=True)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_model_of_ones_own_is_recorded_and_loaded_into(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1, bias=False)).double()

    model = build()
    mf.train(model, mf.load(DATA), **SMALL, out=tmp_path / "run")
    read = mf.load_run(tmp_path / "run")
    with pytest.raises(RunError, match="load_model"):
        read.load_model()
    loaded = read.load_model(into=build())
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ModelError, match="another model"):
        read.load_model(into=mf.models.mlp(6, 3, 1))


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"last good checkpoint is .*\.safetensors"):
        mf.train("mlp:8", DATA, loss="exponential", lr=1e3, epochs=50, out=tmp_path / "run", seed=1)
    model = mf.load_run(tmp_path / "run").load_model()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_multi_class_training_takes_cross_entropy_by_default() -> None:
    data = mf.load("digits:0,1,2,n=60")
    run = mf.train("cnn:4,4,hidden=8,kernel=3", data, attack="pgd-l2:eps=0.3,steps=2", epochs=2)
    assert run.config["loss"] == "cross-entropy"
    assert run.config["model"]["outputs"] == 3
    assert math.isfinite(run.final["log_loss"])


def test_numpy_arrays_are_data() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 4))
    y = np.where(x[:, 0] > 0, 1, -1)
    run = mf.train("mlp:5", (x, y), epochs=3)
    assert run.config["examples"] == 20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "mpl:8"}, SpecificationError, "did you mean 'mlp'"),
        ({"data": "seperable:n=5,d=3"}, SpecificationError, "did you mean 'separable'"),
        ({"attack": "fgn:eps=0.1"}, SpecificationError, "did you mean 'fgm'"),
        ({"loss": "logistik"}, SpecificationError, "did you mean 'logistic'"),
        ({"attack": "fgm:eps=-1"}, InputError, "eps: expected a number of at least 0"),
        ({"data": "digits:3,8", "attack": "fgsm:eps=8"}, InputError, "eps: expected at most 1"),
        ({"data": "digits:3,8", "measure_with": "fgm:eps=9"}, InputError, "expected at most 8"),
        ({"data": "digits:3,8,1", "loss": "logistic"}, DataError, "logistic loss is binary"),
        ({"loss": "cross-entropy"}, DataError, "one output per class"),
        ({"model": mf.models.mlp(7, 3, 1)}, ModelError, r"shape \(6,\)"),
        ({"model": mf.models.mlp(6, 3, 4)}, DataError, "labels: expected 0 … 3"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"lr": -1.0}, InputError, "lr"),
        ({"epochs": 1.5}, InputError, "epochs"),
        ({"dtype": "float16"}, SpecificationError, "float32"),
        ({"device": "cuda:77"}, InputError, "device"),
        ({"derivative": "partial"}, SpecificationError, "detached, total"),
        ({"resume": True}, RunError, "no run in"),
        ({"resume": True, "force": True}, InputError, "exclude each other"),
        ({"model": nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 1))},
         NotHomogeneousError, "GELU"),
        ({"attack": "exact-linear:p=2,eps=0.1"}, ModelError, "linear in their input"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"model": "mlp:8", "data": DATA, **SMALL, "out": tmp_path / "run", **change}
    with pytest.raises(error, match=message):
        mf.train(arguments.pop("model"), arguments.pop("data"), **arguments)
    assert not (tmp_path / "run").exists()


def test_a_read_only_place_is_refused() -> None:
    with pytest.raises(StorageError, match="cannot write"):
        mf.train("mlp:8", DATA, **SMALL, out="/proc/marginflow/run")


def test_the_effect_of_perturbations_in_bf16(tmp_path: Path) -> None:
    """Recorded once; the margin in float32 is the one that is measured."""
    options = {**SMALL, "perturbation_precision": "bf16", "dtype": "float32"}
    run = mf.train("mlp:8", DATA, **options, out=tmp_path / "run")
    effect = run.config["perturbation_effect"]
    measured = run.metrics[-1]
    assert run.config["perturbation_precision"] == "bf16"
    assert effect["margin_float32"] == pytest.approx(measured["normalized_margin"], rel=1e-6)
    assert effect["accuracy_float32"] == pytest.approx(measured["adversarial_accuracy"])
    # FGM's direction is another one in every coordinate, by 8 bits' rounding.
    assert 0.5 < effect["changed"] <= 1
    assert effect["margin_bf16"] != effect["margin_float32"]
    assert effect["margin_bf16"] == pytest.approx(effect["margin_float32"], rel=1e-3)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["perturbation_effect"] == effect
    again = mf.train("mlp:8", DATA, **options, out=tmp_path / "run", resume=True)
    assert again.config["perturbation_effect"] == effect
    plain = mf.train("mlp:8", DATA, **{**options, "perturbation_precision": "float32"})
    assert "perturbation_effect" not in plain.config


def test_a_resumed_run_goes_on_with_its_engine(tmp_path: Path) -> None:
    mf.train("mlp:8", DATA, **{**SMALL, "epochs": 2}, engine="autograd", out=tmp_path)
    run = mf.train("mlp:8", DATA, **{**SMALL, "epochs": 3}, out=tmp_path, resume=True)
    assert run.config["engine"] == "autograd"
    with pytest.raises(RunError, match="engine: 'autograd' there, 'fused' now"):
        mf.train("mlp:8", DATA, **SMALL, engine="fused", out=tmp_path, resume=True)
    # Runs that were recorded before there was a choice are autograd's.
    stored = json.loads((tmp_path / "run.json").read_text())
    del stored["engine"]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    run = mf.train("mlp:8", DATA, **{**SMALL, "epochs": 4}, out=tmp_path, resume=True)
    assert len(run.metrics) == 5


def test_a_training_that_leaves_examples_out_is_recorded_and_resumed(tmp_path: Path) -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([1, -1] * 20)
    x[:, 0] = y * torch.linspace(0.5, 6, 40)  # few examples near the boundary
    data = (x, y)
    options: dict[str, Any] = {"lr": 1.0, "batch_size": 8, "epochs": 120, "shrink": True}
    full = mf.train("mlp:16", data, **options)
    assert full.config["shrink"] is True
    assert full.final["left_out_examples"] > 0
    assert 0 < full.final["left_out_weight"] <= 2**-24
    assert full.final["shrink_examinations"] > full.final["shrink_violations"] == 0
    with pytest.raises(InterruptedError):
        mf.train("mlp:16", data, **options, out=tmp_path, callbacks=[CrashAt(5 * 118 + 1)])
    run = mf.train("mlp:16", data, **options, out=tmp_path, resume=True)
    assert run.metrics == full.metrics
    for a, b in zip(final_weights(full), final_weights(run), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RunError, match="shrink: True there, False now"):
        mf.train("mlp:16", data, **{**options, "shrink": False}, out=tmp_path, resume=True)


def test_runs_from_before_there_was_shrinking_were_not_shrunk(tmp_path: Path) -> None:
    mf.train("mlp:8", DATA, **{**SMALL, "epochs": 2}, out=tmp_path)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored.pop("shrink") is False
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(RunError, match="shrink: False there, True now"):
        mf.train("mlp:8", DATA, **SMALL, shrink=True, out=tmp_path, resume=True)
    run = mf.train("mlp:8", DATA, **{**SMALL, "epochs": 3}, out=tmp_path, resume=True)
    assert len(run.metrics) == 4
    assert "left_out_examples" not in run.final
