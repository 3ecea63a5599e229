"""A training killed at random moments and resumed gives the bits of one that was left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import marginflow as mf

TRAIN = [
    sys.executable, "-m", "marginflow", "train", "--data", "digits:3,8", "--model", "mlp:64",
    "--attack", "pgd-linf:eps=0.1,steps=2,step=0.06,random=true", "--momentum", "0.5",
    "--batch-size", "32", "--epochs", "400", "--threads", "1", "--quiet",
]  # fmt: skip


def progress(path: Path) -> int:
    return max((int(p.stem.removeprefix("step-")) for p in path.glob("step-*.json")), default=-1)


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    subprocess.run([*TRAIN, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    cut = tmp_path / "cut"
    rng = random.Random(11)
    kills, moments = 0, []
    command = [*TRAIN, "--out", str(cut)]
    while True:
        before = progress(cut / "checkpoints")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        command = [*TRAIN, "--out", str(cut), "--resume"]
        if kills < 3:
            while process.poll() is None and progress(cut / "checkpoints") <= before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error.decode()
        kills += 1
        moments.append(progress(cut / "checkpoints"))
    assert kills == 3, f"the training ended after {kills} kills: make it longer"
    assert len(set(moments)) > 1
    print(f"killed {kills} times, at checkpoints {moments}")

    whole, again = mf.load_run(tmp_path / "whole"), mf.load_run(cut)
    assert (cut / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()
    for a, b in zip(whole.load_model().parameters(), again.load_model().parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in cut.rglob(".*")] == [".lock"], "no temporary file is left behind"


@pytest.mark.parametrize("when", [0.3, 1.0])
def test_ctrl_c_writes_a_checkpoint_and_exits_130(tmp_path: Path, when: float) -> None:
    process = subprocess.Popen(
        [*TRAIN, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and progress(tmp_path / "run" / "checkpoints") < 0:
        time.sleep(0.01)
    time.sleep(when)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error.decode()
    assert "continue with: marginflow train --resume" in error.decode()
    assert "Traceback" not in error.decode()
    assert progress(tmp_path / "run" / "checkpoints") > 0
