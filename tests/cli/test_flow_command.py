"""``marginflow flow``: what it prints, exit codes, resuming, and SIGKILL."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import marginflow as mf
from marginflow.cli import main

SMALL = ["--data", "separable:n=6,d=3,margin=0.4,seed=2", "--model", "deep-linear:4"]
EXACT = ["--attack", "exact-linear:p=2,eps=0.05", "--quiet"]


def test_a_flow_is_followed_verified_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["flow", *SMALL, *EXACT, "--log-time", "60", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "gradient flow to ln t = 60 (reached its log_time)" in text
    assert "stiff from the start: no jump was found" in text
    assert "float32" not in text
    assert f"next: marginflow verify {out}" in text
    assert all(len(line) <= 130 for line in text.splitlines())
    assert main(["verify", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Theorem 4" in text
    verdicts = json.loads((out / "verdicts.json").read_text())
    outcome = {v["statement"]: v["outcome"] for v in verdicts}
    assert outcome["Lemma 11"] == outcome["Theorem 4 (monotone)"] == "holds"
    assert main(["report", str(out)]) == 0
    assert "ln t" in (out / "report.html").read_text(encoding="utf-8")
    assert main(["measure", str(out)]) == 0


def test_resuming_to_a_farther_goal(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["flow", *SMALL, *EXACT, "--log-time", "10", "--out", str(out)]) == 0
    assert main(["flow", "--resume", "--log-time", "20", "--quiet", "--out", str(out)]) == 0
    assert mf.load_run(out).final["log_time"] >= 20
    assert main(["flow", "--resume", "--loss-below", "1e-12", "--quiet", "--out", str(out)]) == 0
    run = mf.load_run(out)
    assert run.config["log_time"] is None
    assert run.config["ended"] == "loss_below"


def test_a_goal_that_is_not_reached_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["flow", *SMALL, "--attack", "exact-linear:p=2,eps=0.6", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 1
    assert "not separated after ln t" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ([], "--data is missing"),
        ([*SMALL, "--attack", "fgm:eps=0.1,objective=loss"], "scale invariant"),
        ([*SMALL, "--method", "magic"], "method"),
        ([*SMALL, "--rtol", "2"], "rtol"),
        ([*SMALL, "--log-time", "nan"], "log_time"),
        (["--resume"], "--resume needs --out"),
    ],
)
def test_bad_input(
    extra: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--resume" in extra else ["--out", str(tmp_path / "run")]
    assert main(["flow", *extra, "--quiet", *out]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_training_is_no_flow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mf.train("deep-linear:4", "separable:n=6,d=3,margin=0.4", epochs=1, out=tmp_path / "t")
    assert main(["flow", "--resume", "--out", str(tmp_path / "t")]) == 2
    assert "not a gradient flow but a training run" in capsys.readouterr().err


def points(path: Path) -> int:
    return len(list(path.glob("trajectory/step-*.safetensors")))


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    flow = [
        sys.executable, "-m", "marginflow", "flow", *SMALL, *EXACT, "--log-time", "100000",
        "--threads", "1",
    ]  # fmt: skip
    subprocess.run([*flow, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    cut = tmp_path / "cut"
    rng = random.Random(5)
    kills, command = 0, [*flow, "--out", str(cut)]
    while True:
        before = points(cut)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < 2:
            while process.poll() is None and points(cut) <= before + 1:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error.decode()
        kills += 1
        command = [*flow, "--out", str(cut), "--resume"]
    assert kills == 2, f"the flow ended after {kills} kills: make it longer"
    whole = tmp_path / "whole"
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    models = [mf.load_run(path).load_model() for path in (whole, cut)]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in cut.rglob(".*")] == [".lock"]
