"""Sweeps on Ray, each in a process of its own: Ray changes the handlers and the environment of its driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sweeps"))

from sweep_of_twelve import (
    attempts,
    carry_out,
    check_eleven_and_one,
    command,
    interrupt,
    kill_and_resume,
    write_sweep_file,
)

pytestmark = pytest.mark.integrations


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of twelve on Ray that has ended."""
    folder = tmp_path_factory.mktemp("twelve")
    file = write_sweep_file(folder, epochs=120)
    check_eleven_and_one(folder / "out", carry_out(file, folder / "out", "ray"))
    return folder


def test_auto_is_ray_and_has_the_bits_of_processes(twelve: Path) -> None:
    again = carry_out(twelve / "twelve.toml", twelve / "processes", "processes")
    check_eleven_and_one(twelve / "processes", again)
    for run in sorted((twelve / "out" / "trials").iterdir()):
        other = twelve / "processes" / "trials" / run.name / "metrics.jsonl"
        assert (run / "metrics.jsonl").read_bytes() == other.read_bytes()


def test_killed_and_resumed(tmp_path: Path) -> None:
    file = write_sweep_file(tmp_path, epochs=400, retries=1, certify=False)
    done = kill_and_resume(file, tmp_path / "out", "ray", after=3)
    check_eleven_and_one(tmp_path / "out", done)


def test_a_worker_that_is_killed_is_a_failure_of_its_trial_only(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(
        "[sweep]\nretries = 1\ncertify = false\n"
        '[options]\ndata = "digits:3,8"\nmodel = "mlp:64"\nbatch-size = 32\nepochs = 1500\n'
        "[grid]\nlr = [0.05, 0.1]\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(file, out, "ray"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lock = out / "trials" / "lr-0.1" / ".lock"
    while process.poll() is None and not list(lock.parent.glob("checkpoints/step-*1.json")):
        time.sleep(0.01)
        if list(lock.parent.glob("checkpoints/*.json")):
            break
    os.kill(_holder(lock), signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 0, error
    outcomes = [(line["trial"], line["outcome"]) for line in attempts(out)]
    assert sorted(outcomes) == [
        ("lr-0.05", "finished"), ("lr-0.1", "failed"), ("lr-0.1", "finished")
    ]  # fmt: skip
    (failed,) = (line for line in attempts(out) if line["outcome"] == "failed")
    assert "the process of the trial died (WorkerCrashedError" in failed["error"]


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    interrupt(tmp_path, "ray", epochs=20_000)


def test_what_no_machine_here_can_run_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    file = tmp_path / "gpus.toml"
    file.write_text(
        '[options]\ndata = "separable:n=8,d=2"\nmodel = "mlp:4"\nepochs = 2\n'
        "[grid]\nlr = [0.05, 0.1]\n[resources]\ngpus = 64\n"
    )
    done = carry_out(file, tmp_path / "out", "ray")
    assert done.returncode == 2
    assert "a trial needs 64 GPU, this machine has 0" in done.stderr
    gone = carry_out(file, tmp_path / "out", "ray", "--address", "127.0.0.1:1")
    assert gone.returncode == 2
    assert "cannot join the Ray cluster at '127.0.0.1:1'" in gone.stderr
    assert not (tmp_path / "out").exists()


def test_ray_tells_nobody_of_its_use(tmp_path: Path) -> None:
    """What a sweep sets before Ray begins, and that a Ray of the user's own is left running."""
    code = (
        "import os, json, ray, marginflow as mf\n"
        "os.environ['RAY_USAGE_STATS_ENABLED'] = '0'\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "grid = {'lr': [0.05, 0.1]}\n"
        "options = {'data': 'separable:n=8,d=2', 'model': 'mlp:4', 'epochs': 3}\n"
        f"s = mf.sweep({{'options': options, 'grid': grid}}, out={str(tmp_path / 'out')!r})\n"
        "print(json.dumps([[t.state for t in s.trials], ray.is_initialized()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [["finished", "finished"], True]


def _holder(lock: Path) -> int:
    """The process that has the file open."""
    for place in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if place.readlink() == lock:
                return int(place.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody holds {lock}")
