"""`mf.rerun`: run.json is enough to repeat a run, and what differs is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import InputError, RunError
from marginflow.runs import RunDirectory, compare_records, compare_weights
from stopping import CrashAt, InterruptAt

PGD = "pgd-linf:eps=0.05,steps=2,step=0.03,random=true"
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "fgsm": ("mlp:16", {"attack": "fgsm:eps=0.1", "batch_size": 50}),
    "pgd, random starts, momentum": (
        "mlp:16,8", {"attack": PGD, "batch_size": 64, "momentum": 0.9, "dtype": "float64"},
    ),
    "autograd": ("mlp:16", {"attack": "fgm:eps=0.3", "engine": "autograd", "derivative": "total"}),
    "shrink": ("mlp:16", {"lr": 0.5, "batch_size": 20, "shrink": True}),
    "shards": ("mlp:16", {"attack": "fgsm:eps=0.1", "batch_size": 64, "shards": 2}),
    "cnn": ("cnn:2,4,hidden=8,kernel=3", {"attack": "fgsm:eps=0.05", "batch_size": 100}),
    "loss-based": ("mlp:8", {"lr": "loss-based:a=0.1", "loss": "exponential"}),
    "bf16": ("mlp:16", {"attack": "fgsm:eps=0.1", "perturbation_precision": "bf16"}),
    "unmeasured": ("mlp:16", {"attack": "fgsm:eps=0.1", "measure": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_a_training_comes_out_the_same(name: str, tmp_path: Path) -> None:
    model, options = JOBS[name]
    run = mf.train(model, "digits:3,8", **options, epochs=4, seed=3, out=tmp_path / "run")
    torch.manual_seed(12345)  # nothing hangs on the global generators
    again = mf.rerun(tmp_path / "run")
    assert again.identical, str(again)
    assert again.records == len(run.metrics)
    assert again.step == run.checkpoint().info["step"]
    assert again.largest == 0.0
    assert again.surroundings == {}


def test_kept_weights_and_a_linear_network(tmp_path: Path) -> None:
    options = {"attack": "exact-linear:p=2,eps=0.1", "dtype": "float64", "lr": 0.5, "epochs": 20}
    mf.train("deep-linear:4", "separable:n=20,d=6,margin=0.3", **options, out=tmp_path / "run")
    again = mf.rerun(tmp_path / "run", out=tmp_path / "again")
    assert again.identical
    there, here = again.original.trajectory(), again.repeated.trajectory()
    assert there.keys() == here.keys()
    assert not any(compare_weights(there[step], here[step], step) for step in there)


@pytest.mark.parametrize(
    ("method", "model", "data", "attack"),
    [
        ("spheres", "mlp:8", "digits:3,8", "fgsm:eps=0.05"),
        ("relative", "mlp:8", "digits:3,8", "fgsm:eps=0.05"),
        ("dual", "deep-linear", "separable:n=20,d=6,margin=0.3", "exact-linear:p=2,eps=0.1"),
    ],
)
def test_a_margin_maximisation(
    method: str, model: str, data: str, attack: str, tmp_path: Path
) -> None:
    mf.maximize(model, data, attack, method=method, epochs=5, out=tmp_path / "run")
    again = mf.rerun(tmp_path / "run")
    assert again.identical, str(again)
    assert again.records >= 2


def test_a_maximisation_that_began_with_a_run(tmp_path: Path) -> None:
    for seed, name in ((0, "first"), (1, "other")):
        mf.train("mlp:8", "digits:3,8", epochs=2, seed=seed, out=tmp_path / name)
    first = tmp_path / "first"
    mf.maximize("mlp:8", "digits:3,8", start=first, epochs=2, out=tmp_path / "run")
    with pytest.raises(InputError, match="began with the weights of the run 'first': give it"):
        mf.rerun(tmp_path / "run")
    with pytest.raises(RunError, match="expected the weights that the run 'run' began with"):
        mf.rerun(tmp_path / "run", start=tmp_path / "other")
    assert mf.rerun(tmp_path / "run", start=first).identical


def test_a_flow(tmp_path: Path) -> None:
    options = {"attack": "exact-linear:p=2,eps=0.1", "log_time": 12.0}
    mf.gradient_flow("deep-linear:3", "separable:n=12,d=4", **options, out=tmp_path / "run")
    again = mf.rerun(tmp_path / "run")
    assert again.identical, str(again)
    assert again.records > 10


@pytest.mark.parametrize("stop", [InterruptAt, CrashAt])
def test_an_unfinished_run_is_repeated_up_to_where_it_is(stop: Any, tmp_path: Path) -> None:
    with pytest.raises((KeyboardInterrupt, InterruptedError)):
        mf.train(
            "mlp:16", "digits:3,8", attack="fgsm:eps=0.1", batch_size=50, epochs=300,
            out=tmp_path / "run", callbacks=[stop(26)],
        )  # fmt: skip
    steps = [record["step"] for record in mf.load_run(tmp_path / "run").metrics]
    again = mf.rerun(tmp_path / "run", out=tmp_path / "again")
    assert again.identical
    assert again.records == len(steps)
    # Ctrl-C leaves a checkpoint in the middle of an epoch, whose weights are compared too.
    assert again.step == (26 if stop is InterruptAt else steps[-1])
    assert again.repeated.metrics[-1]["step"] <= max(26, steps[-1]) + 6


def test_a_run_that_was_resumed_and_prolonged(tmp_path: Path) -> None:
    options = {"attack": PGD, "batch_size": 50, "momentum": 0.5}
    with pytest.raises(KeyboardInterrupt):
        mf.train(
            "mlp:16", "digits:3,8", **options, epochs=7, out=tmp_path / "run",
            callbacks=[InterruptAt(9)],
        )  # fmt: skip
    for epochs in (7, 13):
        mf.train(
            "mlp:16", "digits:3,8", **options, epochs=epochs, out=tmp_path / "run", resume=True
        )
    again = mf.rerun(tmp_path / "run")
    assert again.identical, str(again)
    assert again.records == len(mf.load_run(tmp_path / "run").metrics)


def test_only_the_first_epochs(tmp_path: Path) -> None:
    mf.train("mlp:16", "digits:3,8", batch_size=50, epochs=200, out=tmp_path / "run")
    again = mf.rerun(tmp_path / "run", epochs=3, out=tmp_path / "again")
    assert again.identical
    assert again.records == 4  # epochs 0, 1, 2, 3
    assert again.step is None
    assert again.repeated.metrics[-1]["epoch"] <= 4


def damage(path: Path, step: int, name: str, factor: float) -> float:
    """One number of the recorded measurements changed, in its last bit or more."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (record,) = (r for r in records if r["step"] == step)
    record[name] *= factor
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return float(record[name])


def test_one_bit_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    mf.train("mlp:16", "digits:3,8", attack="fgsm:eps=0.1", epochs=4, out=path)
    changed = damage(path, 2, "norm_product", 1 + 2**-52)
    again = mf.rerun(path)
    assert not again.identical
    (found,) = again.measurements
    assert (found.name, found.step, found.there) == ("norm_product", 2, changed)
    assert found.there != found.here
    assert 0 < found.relative < 3e-16
    assert not again.weights
    assert main(["rerun", str(path), "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert "equal within rounding: 5 measurements and the weights at step 4" in printed
    assert f"first: norm_product at step 2: {changed!r} there" in printed
    assert main(["rerun", str(path), "--quiet", "--within", "1e-15"]) == 0
    assert main(["rerun", str(path), "--quiet", "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out.partition("that is within 1e-15\n")[2])
    assert (told["identical"], told["measurements"][0]["name"]) == (False, "norm_product")


def test_another_seed_is_found(tmp_path: Path) -> None:
    path = tmp_path / "run"
    mf.train("mlp:16", "digits:3,8", attack="fgsm:eps=0.1", epochs=2, out=path)
    config = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**config, "seed": 1}))
    again = mf.rerun(path)
    assert not again.identical
    assert not again.rounding
    assert str(again).startswith("different: ")
    assert {d.name for d in again.weights} == {"linear1.weight", "linear2.weight"}
    assert again.measurements[0].step == 0
    assert "give it as it was before the run (model=…)" in str(again)


def test_what_ran_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run"
    mf.train("mlp:8", "digits:3,8", epochs=1, out=path)
    config = json.loads((path / "run.json").read_text())
    config["versions"]["torch"] = "2.0.0"
    (path / "run.json").write_text(json.dumps({**config, "machine": "aarch64", "processes": 2}))
    again = mf.rerun(path)
    assert again.surroundings["torch"] == ("2.0.0", torch.__version__)
    assert again.surroundings["machine"][0] == "aarch64"
    assert "processes: 2 there, 1 here" in str(again)


def test_threads_and_precision_are_those_of_the_run_and_put_back(tmp_path: Path) -> None:
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        mf.train("mlp:8", "digits:3,8", epochs=1, out=tmp_path / "run")
    finally:
        torch.set_num_threads(1)
    again = mf.rerun(tmp_path / "run", out=tmp_path / "again")
    assert again.repeated.config["threads"] == 2
    assert again.surroundings == {}
    assert torch.get_num_threads() == 1
    assert torch.get_float32_matmul_precision() == "highest"


def own() -> nn.Module:
    torch.manual_seed(5)
    layers = nn.Linear(64, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)
    return nn.Sequential(nn.Flatten(), *layers)


def test_what_run_json_cannot_hold_has_to_be_given(tmp_path: Path) -> None:
    data = mf.load("digits:3,8")
    pair = data.x[:60], data.y[:60]
    mf.train(own(), pair, epochs=2, out=tmp_path / "run")
    with pytest.raises(InputError, match="cannot be loaded by name; give them"):
        mf.rerun(tmp_path / "run")
    given = mf.Dataset(*pair)
    with pytest.raises(InputError, match="a model of its own kind; give it as it was"):
        mf.rerun(tmp_path / "run", data=given)
    assert mf.rerun(tmp_path / "run", data=given, model=own()).identical
    torch.manual_seed(6)
    other = own()
    nn.init.ones_(other[1].weight)
    again = mf.rerun(tmp_path / "run", data=given, model=other)
    assert not again.identical
    assert "began with other weights" in str(again)
    with pytest.raises(RunError, match="are not those that the run was trained on"):
        mf.rerun(tmp_path / "run", data=data, model=own())


def test_what_cannot_be_repeated_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run"
    mf.train("mlp:8", "digits:3,8", epochs=2, out=path)
    kept = (path / "run.json").read_text()
    config = json.loads(kept)
    for change, words in (
        ({"kind": "monitor"}, "in a training loop of one's own"),
        ({"threads": 10**9}, "expected threads, a number from 1 to 4096"),
        ({"threads": "2"}, "threads: expected a whole number"),
        ({"float32_matmul_precision": "low"}, "none of torch's"),
        ({"products": "mine"}, "expected 'default' or 'onednn'"),
        ({"data_sha256": "0" * 64}, "not those that the run was trained on"),
    ):
        (path / "run.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(RunError, match=words):
            mf.rerun(path)
    del config["lr"]
    (path / "run.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="lacks 'lr', without which it cannot be repeated"):
        mf.rerun(path)
    (path / "run.json").write_text(kept)
    with pytest.raises(InputError, match="another directory than that of the run"):
        mf.rerun(path, out=tmp_path / "x" / ".." / "run", force=True)
    shutil.copytree(path, tmp_path / "copy")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "copy" / "metrics.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(InputError, match="no measurement up to epoch 0; expected at least 1"):
        mf.rerun(tmp_path / "copy", epochs=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "run"]
    RunDirectory.reopen(path).close()


def test_a_folder_of_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mf.train_seeds(
        "mlp:8", "digits:3,8", seeds=2, attack=PGD, batch_size=64, epochs=2, out=tmp_path
    )
    assert main(["rerun", str(tmp_path), "--quiet", "--within", "1e-6"]) == 0
    printed = capsys.readouterr().out
    assert "seed-0" in printed
    assert "seed-1" in printed
    assert main(["rerun", str(tmp_path / "nothing")]) == 2
    assert "no run in" in capsys.readouterr().err


def test_differences_of_records() -> None:
    there = [{"step": 0, "a": 1.0, "b": [1, 2.0], "c": None}, {"step": 3, "a": 4.0, "b": [1, 2.0]}]
    assert compare_records(there, there) == ()
    here = [
        {"step": 0, "a": 1.0, "b": [1, 2.5], "c": 0.0},
        {"step": 3, "a": 3.0, "b": [1], "c": 1.0},
    ]
    found = {d.name: d for d in compare_records(there, here)}
    assert found.keys() == {"b[1]", "c", "a", "b[]"}
    assert (found["a"].step, found["a"].relative) == (3, 0.25)
    # The second entry is missing at step 3: no number says how large that is.
    assert (found["b[1]"].step, found["b[1]"].relative) == (0, float("inf"))
    assert (found["c"].step, found["c"].there, found["c"].here) == (0, None, 0.0)
    assert compare_records([{"step": 1, "a": 0.0}], [{"step": 1, "a": -0.0}])
    (drift,) = compare_records(
        [{"step": 1, "norm_drift": 1e-16}], [{"step": 1, "norm_drift": 3e-16}]
    )
    assert drift.relative == pytest.approx(2e-16)  # of the weights, not of the drift
    assert compare_records([{"step": 1, "a": 1}], [{"step": 2, "a": 7}]) == ()
