"""TensorBoard and MLflow, read back with their own readers."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import marginflow as mf
from marginflow.cli import main
from marginflow.runs import RunDirectory
from stopping import InterruptAt

pytestmark = [
    pytest.mark.integrations,
    # MLflow's own store asks SQLAlchemy for it.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

DATA = "separable:n=24,d=6,margin=0.3"
SMALL: dict[str, Any] = {"attack": "fgm:eps=0.1", "lr": 0.2, "batch_size": 8, "epochs": 6}
LAYERS = ("linear1.weight", "linear2.weight")
LEVELS = ("0", "0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "1")

Points = dict[str, list[tuple[int, float]]]


def tensorboard_points(run: Path) -> Points:
    """What TensorBoard shows, in its single precision."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def mlflow_run(run: Path) -> Any:
    from mlflow import MlflowClient

    name = json.loads((run / "mlflow.json").read_text(encoding="utf-8"))["run_id"]
    return MlflowClient().get_run(name)


def mlflow_points(run: Path) -> Points:
    from mlflow import MlflowClient

    found = mlflow_run(run)
    return {
        key: [
            (point.step, point.value)
            for point in MlflowClient().get_metric_history(found.info.run_id, key)
        ]
        for key in found.data.metrics
    }


def expected(run: Path, rounding: Callable[[float], float] = float) -> Points:
    """``metrics.jsonl`` by hand: every finite number of every line, at its step."""
    points: Points = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        step = record.pop("step")
        norms = record.pop("layer_norms")
        levels = record.pop("normalized_margin_quantiles")
        record |= {f"layer_norms/{n}": v for n, v in zip(LAYERS, norms, strict=True)}
        record |= {
            f"normalized_margin_quantiles/{n}": v for n, v in zip(LEVELS, levels, strict=True)
        }
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(name, []).append((step, rounding(float(value))))
    return points


def single(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes a process die between a measurement and the checkpoint that vouches for it."""
    save = RunDirectory.save_checkpoint

    def at(step: int) -> None:
        def saving(self: RunDirectory, tensors: Any, info: Any) -> Path:
            if info["step"] == step:
                raise InterruptedError
            return save(self, tensors, info)

        monkeypatch.setattr(RunDirectory, "save_checkpoint", saving)

    yield at
    monkeypatch.setattr(RunDirectory, "save_checkpoint", save)


def test_tensorboard_shows_the_measurements(tmp_path: Path) -> None:
    out = tmp_path / "run"
    mf.train("mlp:8", DATA, **SMALL, out=out, log="tensorboard")
    assert tensorboard_points(out) == expected(out, single)
    assert "epoch" in tensorboard_points(out)


def test_mlflow_has_the_measurements_and_the_settings(
    tmp_path: Path, mlflow_experiment: str
) -> None:
    from mlflow import MlflowClient

    out = tmp_path / "run"
    environment = dict(os.environ)
    mf.train("mlp:8", DATA, **SMALL, out=out, log="mlflow")
    assert dict(os.environ) == environment
    assert mlflow_points(out) == expected(out)
    run = mlflow_run(out)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert MlflowClient().get_experiment(run.info.experiment_id).name == mlflow_experiment
    config = mf.load_run(out).config
    params = run.data.params
    for name in ("attack", "data", "loss", "model_spec"):
        assert params[name] == config[name]
    for name in ("batch_size", "classes", "epochs", "lr", "model", "seed"):
        assert json.loads(params[name]) == config[name]
    assert run.data.tags["marginflow.version.torch"] == config["versions"]["torch"]
    assert run.data.tags["marginflow.data_sha256"] == config["data_sha256"]


def test_the_bits_do_not_depend_on_trackers(tmp_path: Path, mlflow_experiment: str) -> None:
    for name, log in (("with", ("tensorboard", "mlflow")), ("without", ())):
        mf.train("mlp:8", DATA, **SMALL, out=tmp_path / name, log=log)
    names = ("metrics.jsonl", "run.json", "checkpoints/step-00000018.safetensors")
    for name in names:
        contents = [(tmp_path / run / name).read_bytes() for run in ("with", "without")]
        assert contents[0] == contents[1]


@pytest.mark.parametrize("stop", ["interrupt", "crash"])
def test_a_resumed_run_goes_on_where_it_was(
    stop: str,
    tmp_path: Path,
    mlflow_experiment: str,
    crashing: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {**SMALL, "out": out, "log": ("mlflow", "tensorboard")}
    with monkeypatch.context():
        if stop == "crash":
            crashing(12)
            callbacks = []
        else:
            callbacks = [InterruptAt(10)]
        with pytest.raises((InterruptedError, KeyboardInterrupt)):
            mf.train("mlp:8", DATA, **options, callbacks=callbacks)
    last = 12 if stop == "crash" else 9
    assert mlflow_points(out)["epoch"][-1][0] == tensorboard_points(out)["epoch"][-1][0] == last
    before = mlflow_run(out).info
    assert before.status == ("FAILED" if stop == "crash" else "KILLED")
    crashing(-1)
    for epochs in (6, 6, 8):
        mf.train("mlp:8", DATA, **{**options, "epochs": epochs}, resume=True)
        assert tensorboard_points(out) == expected(out, single)
        assert mlflow_points(out) == expected(out)
    after = mlflow_run(out)
    assert (after.info.run_id, after.info.status) == (before.run_id, "FINISHED")
    assert after.data.params["epochs"] == "6", "MLflow's parameters are fixed"
    assert after.data.tags["marginflow.epochs"] == "8"
    assert len(list((out / "tensorboard").iterdir())) == 3, "the finished run made no file"


def test_what_was_cut_off_is_not_shown(tmp_path: Path, crashing: Callable[[int], None]) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {**SMALL, "out": out, "log": "tensorboard"}
    crashing(12)
    with pytest.raises(InterruptedError):
        mf.train("mlp:8", DATA, **options)
    assert tensorboard_points(out)["epoch"][-1] == (12, 4.0)
    crashing(15)  # dies before anything new has a checkpoint
    with pytest.raises(InterruptedError):
        mf.train("mlp:8", DATA, **options, callbacks=[], resume=True)
    crashing(-1)
    mf.train("mlp:8", DATA, **options, resume=True)
    assert tensorboard_points(out) == expected(out, single)


def test_a_run_gets_its_trackers_when_it_is_resumed(tmp_path: Path, mlflow_experiment: str) -> None:
    out = tmp_path / "run"
    mf.train("mlp:8", DATA, **{**SMALL, "epochs": 3}, out=out)
    mf.train("mlp:8", DATA, **SMALL, out=out, resume=True, log=("mlflow", "tensorboard"))
    assert tensorboard_points(out) == expected(out, single)
    assert mlflow_points(out) == expected(out)
    mf.train("mlp:8", DATA, **{**SMALL, "epochs": 3}, out=out, force=True)
    assert not (out / "tensorboard").exists()
    assert not (out / "mlflow.json").exists()


def test_a_full_disk_stops_tensorboard_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, count = RecordWriter.write, 0

    def filling_up(self: Any, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", filling_up)
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        run = mf.train("mlp:8", DATA, **SMALL, out=out, log="tensorboard")
    (message,) = caplog.messages
    assert "log tensorboard failed" in message
    assert "No space left on device" in message
    assert len(run.metrics) == 7
    assert [step for step, _ in tensorboard_points(out)["epoch"]] == [0, 3]
    monkeypatch.setattr(RecordWriter, "write", write)
    mf.train("mlp:8", DATA, **{**SMALL, "epochs": 7}, out=out, resume=True, log="tensorboard")
    assert tensorboard_points(out) == expected(out, single), "the gap is filled"


def test_a_server_that_does_not_answer_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        run = mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "run", log="mlflow")
    assert len(run.metrics) == 7
    messages = [record.getMessage() for record in caplog.records if record.name == "marginflow"]
    assert ["log mlflow failed" in message for message in messages] == [True]


def test_mlflow_goes_without_a_run_directory(mlflow_experiment: str) -> None:
    from mlflow import MlflowClient

    run = mf.train("mlp:8", DATA, **SMALL, log="mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name(mlflow_experiment)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == run.name == "mlp:8 fgm:eps=0.1"
    history = client.get_metric_history(found.info.run_id, "margin")
    assert [(p.step, p.value) for p in history] == [(m["step"], m["margin"]) for m in run.metrics]


def test_inside_a_run_of_the_users_it_is_a_nested_one(mlflow_experiment: str) -> None:
    import mlflow

    with mlflow.start_run() as outer:
        mf.train("mlp:8", DATA, **SMALL, log="mlflow")
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == outer.info.run_id, "still the user's"
        mlflow.log_metric("own", 1.0)
    runs = mlflow.MlflowClient().search_runs([outer.info.experiment_id])
    inner = next(run for run in runs if run.info.run_id != outer.info.run_id)
    assert inner.data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert "own" not in inner.data.metrics


def test_seeds_side_by_side_have_a_run_each(tmp_path: Path, mlflow_experiment: str) -> None:
    out = tmp_path / "study"
    mf.train_seeds("mlp:8", DATA, **SMALL, seeds=2, out=out, log=["mlflow", "tensorboard"])
    for seed in (0, 1):
        assert mlflow_points(out / f"seed-{seed}") == expected(out / f"seed-{seed}")
        assert tensorboard_points(out / f"seed-{seed}") == expected(out / f"seed-{seed}", single)
        assert mlflow_run(out / f"seed-{seed}").info.run_name == f"study/seed-{seed}"


def test_a_flow_and_a_maximisation_from_the_command_line(
    tmp_path: Path, mlflow_experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = ["--log", "tensorboard", "--log", "mlflow", "--quiet"]
    flow, best = tmp_path / "flow", tmp_path / "best"
    linear = ["--model", "deep-linear:2", "--attack", "exact-linear:p=2,eps=0.1"]
    to = ["--log-time", "2", "--out", str(flow)]
    assert main(["flow", "--data", DATA, *linear, *to, *log]) == 0
    task = ["--model", "mlp:8", "--attack", "fgm:eps=0.1", "--epochs", "2", "--out", str(best)]
    assert main(["maximize", "--data", DATA, *task, *log]) == 0
    assert main(["flow", "--resume", "--out", str(flow), "--log-time", "3", "--quiet"]) == 0
    for out in (flow, best):
        assert mlflow_points(out) == expected(out)
        assert tensorboard_points(out) == expected(out, single)
    assert mlflow_points(flow)["log_time"][-1][1] == pytest.approx(3.0, rel=1e-6)


def test_mlflow_gets_what_a_resumed_loop_measures_anew(
    tmp_path: Path, mlflow_experiment: str
) -> None:
    """The same points once, those that are replaced twice, the later one last."""
    from mlflow import MlflowClient

    out, x, y = tmp_path / "run", torch.eye(4), torch.arange(4) % 2 * 2 - 1
    norm = "layer_norms/linear1.weight"

    def measured(steps: range, seed: int) -> list[float]:
        model = mf.models.mlp(4, 3, 1, seed=seed)
        with mf.Monitor(
            model, (x, y), out=out, resume=True, schedule="every", log="mlflow"
        ) as seen:
            for step in steps:
                seen.measure(step)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.5)
        return [point for _, point in expected(out)[norm]]

    first = measured(range(4), 0)
    second = measured(range(2, 5), 1)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    client, name = MlflowClient(), mlflow_run(out).info.run_id

    def history() -> list[tuple[int, float]]:
        points = client.get_metric_history(name, norm)
        return [(p.step, p.value) for p in sorted(points, key=lambda p: (p.step, p.timestamp))]

    both = [point for step in (2, 3) for point in ((step, first[step]), (step, second[step]))]
    assert history() == [(0, first[0]), (1, first[1]), *both, (4, second[4])]
    measured(range(5, 6), 1)
    assert len(history()) == 8, "what was replaced is not replaced again"
    shown = dict(history())
    assert list(shown.values()) == [value for _, value in expected(out)[norm]]
