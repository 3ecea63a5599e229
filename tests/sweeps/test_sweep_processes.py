"""A sweep on the processes of this machine: what fails, dies, is killed or interrupted, and resumed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_of_twelve import (
    BAD,
    attempts,
    check_eleven_and_one,
    finished,
    interrupt,
    kill_and_resume,
    last_step,
    write_sweep_file,
)

import marginflow as mf
from marginflow.errors import InputError, MissingDependencyError, RunError
from marginflow.sweeps import check_trials, load_sweep, read_plan
from marginflow.sweeps._directory import SweepDirectory
from marginflow.sweeps._processes import ProcessExecutor
from marginflow.sweeps._sweep import task_of
from marginflow.sweeps._trial import attempt

SMALL: dict[str, Any] = {
    "options": {"data": "separable:n=8,d=2", "model": "mlp:4", "epochs": 3},
    "grid": {"lr": [0.05, 0.1]},
}


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of twelve, one of them failing, that was killed and resumed to its end."""
    folder = tmp_path_factory.mktemp("twelve")
    file = write_sweep_file(folder, epochs=80)
    done = kill_and_resume(file, folder / "out", "processes", after=3)
    check_eleven_and_one(folder / "out", done)
    return folder


def test_nothing_is_left_of_the_killed_processes(twelve: Path) -> None:
    locks = [path for path in (twelve / "out").rglob(".*") if path.name != ".lock"]
    assert locks == [], "no temporary file is left behind"


def test_a_trial_has_the_bits_of_the_run_alone(twelve: Path) -> None:
    trial = twelve / "out" / "trials" / "lr-0.05_seed-3"
    mf.train(
        "mlp:32", "digits:3,8", attack="fgsm:eps=0.02", loss="exponential", batch_size=32,
        epochs=80, lr=0.05, seed=3, dtype="float32", out=twelve / "alone",
    )  # fmt: skip
    assert (trial / "metrics.jsonl").read_bytes() == (
        twelve / "alone" / "metrics.jsonl"
    ).read_bytes()


def test_the_result_holds_margins_accuracies_and_residuals(twelve: Path) -> None:
    sweep = load_sweep(twelve / "out")
    assert [t.name for t in sweep.failed] == [BAD]
    assert len(sweep.finished) == 11
    for trial in sweep.finished:
        run = trial.load()
        assert trial.final["normalized_margin"] == run.final["normalized_margin"]
        if run.final["normalized_margin"] <= 0:
            assert trial.residual is None
            assert "margins are not positive" in str(trial.uncertified)
    certified = next(t for t in sweep.finished if t.residual is not None)
    own = mf.kkt_certificate(
        certified.load().load_model(), *_data(), "fgsm:eps=0.02", loss="exponential"
    )
    assert certified.residual == own.residual
    table = sweep.table()
    assert {len(column) for column in table.values()} == {12}
    assert table["seed"] == [0, *range(11)]
    assert table["kkt_residual"][0] is None
    header = (twelve / "out" / "results.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == ",".join(table)


def _data() -> tuple[Any, Any]:
    data = mf.load("digits:3,8")
    return data.x, data.y


def test_a_half_done_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Its worker is killed in the middle: the trial is tried again, and has the bits of one left alone."""
    sweep = {
        "sweep": {"retries": 1, "certify": False},
        "options": {"data": "digits:3,8", "model": "mlp:64", "batch_size": 32, "epochs": 400},
        "grid": {"lr": [0.1]},
    }
    out, trial = tmp_path / "out", tmp_path / "out" / "trials" / "lr-0.1"
    executor_pids: list[int] = []
    original = ProcessExecutor.start

    def start(self: ProcessExecutor, task: Any) -> None:
        original(self, task)
        executor_pids.extend(self.pids)

    def kill() -> None:
        while last_step(trial) < 1:
            time.sleep(0.005)
        os.kill(executor_pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessExecutor, "start", start)
        killer.start()
        result = mf.sweep(sweep, out=out, executor="processes", jobs=1)
        killer.join()
    first, second = attempts(out)
    assert (first["outcome"], second["outcome"]) == ("failed", "finished")
    assert first["error"] == "the process of the trial died (SIGKILL)"
    assert [(t.state, t.attempts) for t in result.trials] == [("finished", 2)]
    mf.train(
        "mlp:64", "digits:3,8", batch_size=32, epochs=400, lr=0.1, dtype="float32",
        out=tmp_path / "alone",
    )  # fmt: skip
    assert (trial / "metrics.jsonl").read_bytes() == (
        tmp_path / "alone" / "metrics.jsonl"
    ).read_bytes()


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    assert finished(interrupt(tmp_path, "processes", epochs=5000)) == []


def test_a_sweep_is_resumed_with_more_trials_but_not_with_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = mf.sweep(SMALL, out=out, executor="processes", jobs=1)
    assert [t.state for t in first.trials] == ["finished", "finished"]
    with pytest.raises(RunError, match="already holds a sweep; continue it with resume=True"):
        mf.sweep(SMALL, out=out, executor="processes")
    with pytest.raises(InputError, match="exclude each other"):
        mf.sweep(SMALL, out=out, executor="processes", resume=True, force=True)
    more = {**SMALL, "grid": {"lr": [0.05, 0.2, 0.1]}}
    # As a process leaves it that is killed before it has written run.json.
    (out / "trials" / "lr-0.2" / "checkpoints").mkdir(parents=True)
    second = mf.sweep(more, out=out, executor="processes", jobs=1, resume=True)
    assert [t.name for t in second.trials] == ["lr-0.05", "lr-0.2", "lr-0.1"]
    assert [line["trial"] for line in attempts(out)] == ["lr-0.05", "lr-0.1", "lr-0.2"]
    with pytest.raises(RunError, match=r"has the trial 'lr-0.2', which the file does not name"):
        mf.sweep(SMALL, out=out, executor="processes", resume=True)
    other = {**more, "options": {**SMALL["options"], "epochs": 4}}
    with pytest.raises(RunError, match=r"'lr-0.05' has another epochs there"):
        mf.sweep(other, out=out, executor="processes", resume=True)
    with pytest.raises(RunError, match="no sweep in"):
        mf.sweep(SMALL, out=tmp_path / "none", executor="processes", resume=True)


def test_a_folder_that_is_no_sweep_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(RunError, match="holds files that are no sweep"):
            mf.sweep(SMALL, out=tmp_path, executor="processes", force=force)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_the_executors_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="address: a Ray cluster needs executor 'ray'"):
        mf.sweep(SMALL, out=out, executor="processes", address="auto")
    gpus = {**SMALL, "resources": {"gpus": 1}}
    with pytest.raises(InputError, match="gpus: only Ray"):
        mf.sweep(gpus, out=out, executor="processes")
    with pytest.raises(InputError, match="unknown executor 'rey'; did you mean 'ray'"):
        mf.sweep(SMALL, out=out, executor="rey")  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'marginflow\[ray\]'"):
        mf.sweep(SMALL, out=out, executor="ray")
    assert not out.exists()


@pytest.mark.parametrize(
    ("job", "options", "kind"),
    [
        ("maximize", {"epochs": 5, "method": "spheres"}, "maximize"),
        ("maximize", {"method": "dual"}, "maximize"),
        ("maximize", {"method": "loss-based", "epochs": 3}, "train"),
        ("flow", {"log_time": 2.0}, "flow"),
    ],
)
def test_other_jobs(job: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """What a process does with a task of another job, and with one that it has finished already."""
    model = "deep-linear:" if options.get("method") == "dual" else "deep-linear:3"
    plan = read_plan(
        {
            "sweep": {"job": job, "out": str(tmp_path)},
            "options": {"data": "separable:n=8,d=2", "attack": "fgm:eps=0.01", **options},
            "grid": {"model": [model]},
        }
    )
    check_trials(plan)
    task = task_of(plan, plan.trials[0], SweepDirectory(tmp_path))
    before = torch.get_num_threads()
    try:
        first = attempt(task)
        written = (tmp_path / "trials" / plan.trials[0].name / "metrics.jsonl").read_bytes()
        again = attempt(task)
    finally:
        torch.set_num_threads(before)
    assert "error" not in first
    assert "error" not in again
    run = mf.load_run(tmp_path / "trials" / plan.trials[0].name)
    assert run.config["kind"] == kind
    assert (Path(str(run.path)) / "metrics.jsonl").read_bytes() == written
    assert json.loads(json.dumps(first)) == first


def test_another_version_is_refused(tmp_path: Path) -> None:
    answer = attempt({"version": "0.0.0"})
    assert "the sweep is of marginflow 0.0.0" in answer["error"]
    assert "trace" not in answer
