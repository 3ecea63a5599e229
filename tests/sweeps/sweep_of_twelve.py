"""Twelve trials, one of which fails on purpose, as a file; and what is asked of them on any executor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BAD = "lr-1000.0_seed-0"


def write_sweep_file(folder: Path, *, epochs: int, retries: int = 1, certify: bool = True) -> Path:
    """A list of 11 good trials behind a bad one: its loss overflows in the first steps."""
    lines = [
        "[sweep]",
        'name = "twelve"',
        f"retries = {retries}",
        f"certify = {str(certify).lower()}",
        "[options]",
        'data = "digits:3,8"',
        'model = "mlp:32"',
        'attack = "fgsm:eps=0.02"',
        'loss = "exponential"',
        "batch-size = 32",
        f"epochs = {epochs}",
        *("[[trials]]", "lr = 1000.0", "seed = 0"),
    ]
    for seed in range(11):
        lines += ["[[trials]]", "lr = 0.05", f"seed = {seed}"]
    path = folder / "twelve.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def command(file: Path, out: Path, executor: str, *more: str) -> list[str]:
    """The command line of the sweep."""
    return [
        sys.executable, "-m", "marginflow", "sweep", str(file), "--out", str(out),
        "--executor", executor, "--jobs", "2", *more,
    ]  # fmt: skip


def attempts(out: Path) -> list[dict[str, Any]]:
    """The lines of ``attempts.jsonl``, whole ones."""
    path = out / "attempts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def finished(out: Path) -> list[str]:
    """The trials that have ended well, in the order in which they did."""
    return [line["trial"] for line in attempts(out) if line["outcome"] == "finished"]


def carry_out(file: Path, out: Path, executor: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The sweep, to its end."""
    return subprocess.run(
        command(file, out, executor, *more), capture_output=True, text=True, check=False
    )


def check_eleven_and_one(out: Path, done: subprocess.CompletedProcess[str]) -> None:
    """11 results and one failure, which was tried again and is named; exit code 1."""
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == ["failed"] + ["finished"] * 11
    assert rows[0]["trial"] == BAD
    assert len({row["normalized_margin"] for row in rows[1:]} - {None}) == 11
    failed = [line["trial"] for line in attempts(out) if line["outcome"] == "failed"]
    assert set(failed) == {BAD}
    assert len(failed) >= 2
    told = " ".join(done.stderr.split())
    assert f"failed after {len(failed)} attempts: {BAD}: DivergedError: training" in told
    assert "11 of 12 trials finished, 1 failed." in " ".join(done.stdout.split())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert BAD in page
    assert "DivergedError" in page


def kill_and_resume(
    file: Path, out: Path, executor: str, *, after: int
) -> subprocess.CompletedProcess[str]:
    """SIGKILL once ``after`` trials have ended well, then resume: these are not touched again."""
    process = subprocess.Popen(
        command(file, out, executor, "--quiet"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and len(finished(out)) < after:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(out)
    assert after <= len(before) < 11, "killed too late: make the trials longer"
    kept = {name: _state(out, name) for name in before}

    done = carry_out(file, out, executor, "--resume")
    assert done.returncode == 1, done.stderr
    assert f"{len(before)} of 12 trials are finished already" in done.stderr
    assert {name: _state(out, name) for name in before} == kept
    assert sorted(finished(out)) == [f"lr-0.05_seed-{k}" for k in sorted(range(11), key=str)]
    return done


def interrupt(folder: Path, executor: str, *, epochs: int) -> Path:
    """Ctrl-C while two trials run: each leaves a checkpoint. The folder of the sweep."""
    file = write_sweep_file(folder, epochs=epochs, certify=False)
    out = folder / "out"
    process = subprocess.Popen(
        command(file, out, executor),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    good = [out / "trials" / f"lr-0.05_seed-{k}" for k in (0, 1)]
    while process.poll() is None and min(map(last_step, good)) < 0:
        time.sleep(0.01)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 130, error
    assert "continue with: marginflow sweep" in error
    assert "Traceback" not in error
    assert min(map(last_step, good)) > 0, "each running trial has left a checkpoint"
    return out


def last_step(run: Path) -> int:
    """Of the checkpoints in a run directory; −1 without any."""
    steps = (int(p.stem.removeprefix("step-")) for p in run.glob("checkpoints/step-*.json"))
    return max(steps, default=-1)


def _state(out: Path, name: str) -> dict[str, tuple[int, int]]:
    """When each file of the trial was written, and how long it is."""
    folder = out / "trials" / name
    return {
        str(path.relative_to(folder)): (os.stat(path).st_mtime_ns, os.stat(path).st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
