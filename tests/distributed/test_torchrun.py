"""``torchrun -m marginflow``: the same run, one voice, and what is left when a process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torchrun import command, environment, torchrun

from marginflow.cli import main

TRAIN = [
    "train", "--data", "digits:3,8", "--model", "mlp:24,8", "--attack", "fgsm:eps=0.1",
    "--batch-size", "40", "--dtype", "float64", "--quiet",
]  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(record: dict[str, Any]) -> list[float]:
    """All of a record's numbers but those that are rounding (or time) themselves."""
    found: list[float] = []
    for key, value in sorted(record.items()):
        if "drift" in key or "second" in key:
            continue
        values = value if isinstance(value, list) else [value]
        found += [float(v) for v in values if isinstance(v, int | float)]
    return found


def assert_same(run: Path, other: Path, rel: float) -> None:
    one, two = metrics(run), metrics(other)
    assert len(one) == len(two) > 3
    for a, b in zip(one, two, strict=True):
        assert numbers(b) == pytest.approx(numbers(a), rel=rel, abs=1e-13)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main([*TRAIN, "--epochs", "30", "--out", str(out)]) == 0
    return out


def test_the_run_is_that_of_one_process(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    done = torchrun(2, "-m", "marginflow", *TRAIN, "--epochs", "30", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("30 epochs in") == 1
    assert done.stdout.count("next: marginflow report") == 1
    assert_same(alone, out, 1e-10)
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    measured = torchrun(2, "-m", "marginflow", "measure", out, "--json")
    assert measured.returncode == 0, measured.stderr
    (found,) = json.loads(measured.stdout)
    assert found["normalized_margin"] == pytest.approx(metrics(alone)[-1]["normalized_margin"])
    certified = torchrun(2, "-m", "marginflow", "certify", out, "--fitted-only", "--json")
    assert certified.returncode == 0, certified.stderr
    assert main(["certify", str(alone), "--fitted-only"]) == 0
    expected = json.loads((alone / "certificate.json").read_text())
    assert json.loads(certified.stdout)["residual"] == pytest.approx(expected["residual"], rel=1e-8)


def test_an_error_is_said_once_and_the_exit_code_tells(tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong = [*TRAIN, "--epochs", "2", "--out", out, "--loss", "hinge"]
    done = torchrun(2, "-m", "marginflow", *wrong)
    assert done.returncode != 0
    assert done.stderr.count("error: unknown loss 'hinge'") == 1
    assert "exitcode  : 2" in done.stderr
    assert not out.exists()


def test_other_commands_work_in_the_first_process(alone: Path) -> None:
    done = torchrun(2, "-m", "marginflow", "compare", alone, alone)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("marginflow compare works in one process; the others are idle") == 1
    assert "γ̂_m" in done.stdout


def started(out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A long training of two processes, once its first checkpoint after the start is there."""
    arguments = ["-m", "marginflow", *TRAIN, "--epochs", "100000", "--out", str(out), *more]
    job = subprocess.Popen(
        command(2, *arguments, launcher=launcher),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    until = time.monotonic() + 90
    while not any(int(p.stem[5:]) > 0 for p in out.glob("checkpoints/step-*.json")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    return job


def workers(job: subprocess.Popen[str]) -> list[int]:
    """The process of each rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        ranks = [v for v in variables if v.startswith(b"RANK=")]
        if parent == job.pid and ranks:
            found[int(ranks[0][5:])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def ended(job: subprocess.Popen[str]) -> str:
    try:
        _, stderr = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode != 0
    return stderr


def finished(out: Path, epochs: int) -> None:
    """Continue in this one process."""
    assert main(["train", "--resume", "--out", str(out), "--epochs", str(epochs), "--quiet"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_job_with_a_message_and_a_checkpoint(
    tmp_path: Path, rank: int
) -> None:
    out = tmp_path / "run"
    job = started(out)
    os.kill(workers(job)[rank], signal.SIGKILL)
    said = ended(job)
    assert f"the processes of this job lost each other: process {rank} of 2 is gone" in said
    assert f"the run '{out}' is kept up to step " in said
    assert "continue it with --resume" in said
    last = max(int(p.stem[5:]) for p in out.glob("checkpoints/step-*.json"))
    epochs = last // 9 + 5  # of 9 steps
    finished(out, epochs)
    again = tmp_path / "again"
    assert main([*TRAIN, "--epochs", str(epochs), "--out", str(again)]) == 0
    resumed = {r["epoch"]: numbers(r) for r in metrics(out)}
    for record in metrics(again):
        if record["epoch"] in resumed:
            expected = pytest.approx(numbers(record), rel=1e-8, abs=1e-11)
            assert resumed[record["epoch"]] == expected


def test_ctrl_c_leaves_a_checkpoint_of_the_last_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = started(out)
    job.send_signal(signal.SIGINT)
    said = ended(job)
    assert said.count("a checkpoint is written; continue with: marginflow train --resume") == 1
    assert "lost each other" not in said
    last = max(int(p.stem[5:]) for p in out.glob("checkpoints/step-*.json"))
    finished(out, last // 9 + 2)


def test_torchrun_starts_a_job_again_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = started(out, launcher=("--max-restarts", "1"))
    before = workers(job)
    os.kill(before[1], signal.SIGKILL)
    until = time.monotonic() + 60
    # The second pair takes the run over: its lock and, later, new checkpoints.
    last = max(int(p.stem[5:]) for p in out.glob("checkpoints/step-*.json"))
    while max(int(p.stem[5:]) for p in out.glob("checkpoints/step-*.json")) <= last + 900:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    assert set(workers(job)).isdisjoint(before)
    job.send_signal(signal.SIGINT)
    ended(job)
    epochs = [record["epoch"] for record in metrics(out)]
    assert epochs == sorted(set(epochs))
