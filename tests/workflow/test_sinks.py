"""Sinks of measurements: what they are given, and that no run depends on them.

TensorBoard and MLflow themselves are tested in tests/integrations.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import DivergedError, InputError, MissingDependencyError, SpecificationError
from marginflow.runs import Sink, check_sinks, open_sinks, sinks_of
from stopping import CrashAt, InterruptAt

DATA = "separable:n=24,d=6,margin=0.3"
SMALL: dict[str, Any] = {"attack": "fgm:eps=0.1", "lr": 0.2, "batch_size": 8, "epochs": 6}


class Remembering:
    """Keeps what it is given, and what was on disk by then."""

    def __init__(self, metrics: Path | None = None) -> None:
        self.metrics = metrics
        self.records: list[dict[str, Any]] = []
        self.on_disk: list[int] = []
        self.closed = 0

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.records += [dict(record) for record in records]
        if self.metrics is not None:
            self.on_disk.append(len(self.metrics.read_text(encoding="utf-8").splitlines()))

    def close(self) -> None:
        self.closed += 1

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.records]


class Failing(Remembering):
    """Breaks down when it has taken so many records."""

    def __init__(self, after: int, *, closes: bool = True) -> None:
        super().__init__()
        self.after = after
        self.closes = closes
        self.calls = 0

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.calls += 1
        super().write(records)
        if len(self.records) > self.after:
            raise ConnectionError("the server is gone\nwith much to tell")

    def close(self) -> None:
        super().close()
        if not self.closes:
            raise ConnectionError("gone again")


def files_of(run: Path) -> dict[str, bytes]:
    """What must not depend on sinks. The side files of checkpoints carry seconds."""
    content = {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.suffix in {".safetensors", ".jsonl"}
    }
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return content | {"run.json": json.dumps(config).encode()}


def test_a_sink_is_given_every_measurement_once_it_is_on_disk(tmp_path: Path) -> None:
    sink = Remembering(tmp_path / "run" / "metrics.jsonl")
    run = mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "run", log=sink)
    assert sink.records == run.metrics == mf.load_run(tmp_path / "run").metrics
    assert sink.on_disk == list(range(1, len(run.metrics) + 1))
    assert sink.closed == 1


def test_a_run_in_memory_has_sinks_too() -> None:
    sink = Remembering()
    run = mf.train("mlp:8", DATA, **SMALL, log=[sink])
    assert sink.records == run.metrics
    assert (len(sink.records), sink.closed) == (7, 1)


JOBS: dict[str, Callable[..., Any]] = {
    "flow": lambda **to: mf.gradient_flow(
        "deep-linear:2", DATA, attack="exact-linear:p=2,eps=0.1", log_time=2.0, **to
    ),
    "spheres": lambda **to: mf.maximize("mlp:8", DATA, "fgm:eps=0.1", epochs=3, **to),
    "loss-based": lambda **to: mf.maximize(
        "mlp:8", DATA, "fgm:eps=0.1", epochs=3, method="loss-based", **to
    ),
    "dual": lambda **to: mf.maximize(
        "deep-linear", DATA, "fgm:eps=0.1", epochs=50, method="dual", **to
    ),
}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("job", JOBS)
def test_every_kind_of_run_has_sinks(job: str, recorded: bool, tmp_path: Path) -> None:
    sink = Remembering()
    run = JOBS[job](log=sink, out=tmp_path / "run" if recorded else None)
    assert sink.records == run.metrics
    assert len(sink.records) >= 2
    assert sink.closed == 1


def test_a_sink_that_fails_is_named_once_and_changes_no_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = Failing(2), Remembering()
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "with", log=(failing, other))
    assert failing.calls == 3, "it is not asked again"
    assert len(other.records) == 7, "the others go on"
    (message,) = caplog.messages
    assert "Failing failed" in message
    assert "ConnectionError: the server is gone);" in message
    mf.train("mlp:8", DATA, **SMALL, out=tmp_path / "without")
    assert files_of(tmp_path / "with") == files_of(tmp_path / "without")


def test_a_sink_that_does_not_close_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        run = mf.train("mlp:8", DATA, **SMALL, log=Failing(99, closes=False))
    assert len(run.metrics) == 7
    assert ["gone again" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("stop", [CrashAt(10), InterruptAt(10)])
def test_a_run_that_is_resumed_gives_no_point_twice(tmp_path: Path, stop: Any) -> None:
    sink, out = Remembering(), tmp_path / "run"
    with pytest.raises((InterruptedError, KeyboardInterrupt)):
        mf.train("mlp:8", DATA, **SMALL, out=out, log=sink, callbacks=[stop])
    assert sink.closed == 1
    assert 1 < len(sink.steps) < 7
    run = mf.train("mlp:8", DATA, **SMALL, out=out, log=sink, resume=True)
    assert sink.records == run.metrics
    assert sink.closed == 2
    mf.train("mlp:8", DATA, **SMALL, out=out, log=sink, resume=True)
    assert (len(sink.steps), sink.closed) == (7, 2), "a finished run has nothing to say"
    longer = {**SMALL, "epochs": 8}
    run = mf.train("mlp:8", DATA, **longer, out=out, log=sink, resume=True)
    assert sink.records == run.metrics
    assert "log" not in run.config


def test_a_flow_that_is_resumed_gives_no_point_twice(tmp_path: Path) -> None:
    sink = Remembering()
    follow: dict[str, Any] = {"attack": "exact-linear:p=2,eps=0.1", "out": tmp_path, "log": sink}
    mf.gradient_flow("deep-linear:2", DATA, **follow, log_time=1.0)
    before = list(sink.steps)
    mf.gradient_flow("deep-linear:2", DATA, **follow, log_time=1.0, resume=True)
    assert (sink.steps, sink.closed) == (before, 1)
    flow = mf.gradient_flow("deep-linear:2", DATA, **follow, log_time=2.0, resume=True)
    assert sink.records == flow.metrics
    assert len(sink.steps) > len(before)


def test_a_training_that_diverges_closes_its_sinks(tmp_path: Path) -> None:
    sink = Remembering()
    with pytest.raises(DivergedError):
        mf.train("mlp:8", DATA, **{**SMALL, "lr": 1e30}, out=tmp_path / "run", log=sink)
    assert sink.closed == 1


def test_sinks_are_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, library, None)
    out = tmp_path / "run"
    for library in ("mlflow", "tensorboard"):
        with pytest.raises(MissingDependencyError, match=rf"install 'marginflow\[{library}\]'$"):
            mf.train("mlp:8", DATA, **SMALL, out=out, log=library)
        for job in JOBS.values():
            with pytest.raises(MissingDependencyError):
                job(out=out, log=library)
        with pytest.raises(MissingDependencyError):
            mf.train_seeds("mlp:8", DATA, **SMALL, seeds=2, out=out, log=library)
    with pytest.raises(SpecificationError, match="unknown log 'tensorbord'; did you mean 'tensorb"):
        mf.train("mlp:8", DATA, **SMALL, out=out, log="tensorbord")
    with pytest.raises(InputError, match="give one with out="):
        mf.train("mlp:8", DATA, **SMALL, log="tensorboard")
    for wrong in (3, Remembering):
        with pytest.raises(InputError, match="an object with write and close"):
            mf.train("mlp:8", DATA, **SMALL, out=out, log=[wrong])  # type: ignore[list-item]
    with pytest.raises(InputError, match="takes one run"):
        mf.train_seeds("mlp:8", DATA, **SMALL, seeds=2, out=out, log=Remembering())
    assert list(tmp_path.iterdir()) == []


def test_one_sink_is_one_sink() -> None:
    sink = Remembering()
    assert isinstance(sink, Sink)
    assert check_sinks((sink, sink), out=None) == (sink,)
    opened = open_sinks(sink, None, {}, records=[{"step": 0}])
    opened.write([{"step": 1}])
    opened.write([])
    opened.close()
    opened.close()
    assert (sink.steps, sink.closed) == ([1], 1), "it was there when step 0 was measured"
    assert not opened


def test_the_command_line_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for library in ("mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, library, None)
    options = ["--data", DATA, "--model", "mlp:4", "--out", "run", "--quiet"]
    Path("options.toml").write_text('log = ["mlflow"]\nepochs = 2\n', encoding="utf-8")
    for command, log in [
        ("train", ["--log", "mlflow"]),
        ("train", ["--log", "tensorboard", "--log", "mlflow"]),
        ("train", ["--config", "options.toml"]),
        ("train", ["--config", "options.toml", "--seeds", "2"]),
        ("maximize", ["--log", "mlflow"]),
        ("flow", ["--log", "tensorboard"]),
    ]:
        assert main([command, *options, *log]) == 2
        assert "pip install 'marginflow[" in capsys.readouterr().err
        assert not Path("run").exists()
    assert main(["train", *options, "--config", "options.toml", "--log", "none"]) == 0


def test_the_command_line_resumes_with_the_sinks_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["--data", DATA, "--model", "mlp:4", "--out", str(out), "--quiet"]
    assert main(["train", *options, "--epochs", "2"]) == 0
    assert sinks_of(out) == ()
    (out / "mlflow.json").write_text("{}", encoding="utf-8")
    (out / "tensorboard").mkdir()
    assert sinks_of(out) == ("mlflow", "tensorboard")
    for library in ("mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, library, None)
    resumed = ["train", "--resume", "--out", str(out), "--epochs", "3", "--quiet"]
    assert main(resumed) == 2
    assert "log 'tensorboard' needs the package 'tensorboard'" in capsys.readouterr().err
    assert main([*resumed, "--log", "none"]) == 0
    assert len(mf.load_run(out).metrics) == 4
    assert main(["train", *options, "--epochs", "2", "--force"]) == 0
    assert sinks_of(out) == (), "a run that is replaced leaves none of its files"
