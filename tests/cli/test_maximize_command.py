"""``marginflow maximize``: what it prints, exit codes, ``--from``, resuming, SIGKILL, and its readers."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import marginflow as mf
from marginflow.cli import main
from marginflow.report._command import reproduction

DATA = ["--data", "separable:n=24,d=6,margin=0.3", "--attack", "fgsm:eps=0.05"]
SMALL = [*DATA, "--model", "mlp:8", "--epochs", "12", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("from") / "trained"
    mf.train(
        "mlp:8", DATA[1], attack=DATA[3], lr=0.5, epochs=300, dtype="float64", loss="exponential",
        out=out,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def polished(trained: Path) -> Path:
    out = trained.parent / "polished"
    mf.maximize(
        "mlp:8", DATA[1], DATA[3], method="polish:angle=0.005..1e-4,hard=0.7", epochs=10,
        start=trained, loss="exponential", out=out,
    )  # fmt: skip
    return out


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["maximize", *SMALL, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    run = mf.load_run(out)
    assert re.match(rf"12 epochs in [\d.]+ s; the run is in {re.escape(str(out))}\n", text)
    first, last = (r["normalized_margin"] for r in (run.metrics[0], run.final))
    assert f"γ̂_m: {first:.3g} at the start, {last:.3g} at the end" in text
    assert ("best at epoch" in text) == (run.final["best_epoch"] != 12)
    assert "FGSM, ε = 0.05" in text
    assert text.endswith(f"next: marginflow report {out}\n")
    assert (run.config["dtype"], run.config["epochs"]) == ("float32", 12)


def test_from_takes_weights_and_settings(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["maximize", "--from", str(trained), "--method", "polish", "--epochs", "10", "--quiet"]
    assert main([*given, "--strict", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"at the end, \d\S* times as large\n", text)
    run, source = mf.load_run(out), mf.load_run(trained)
    for name in ("data", "data_sha256", "attack", "loss", "dtype", "model_spec", "model"):
        assert run.config[name] == source.config[name]
    assert run.config["from"]["run"] == "trained"
    begun = run.metrics[0]["normalized_margin"]
    assert begun == pytest.approx(source.final["normalized_margin"], rel=1e-12)
    assert run.final["normalized_margin"] > begun
    other = tmp_path / "other"
    options = ["--attack", "fgsm:eps=0.04", "--dtype", "float32", "--out", str(other)]
    assert main([*given, *options]) == 0
    config = mf.load_run(other).config
    assert (config["attack"], config["dtype"], config["loss"]) == (
        "fgsm:eps=0.04", "float32", "exponential",
    )  # fmt: skip
    capsys.readouterr()
    assert main(["maximize", "--resume", "--out", str(out), "--quiet"]) == 0
    assert mf.load_run(out).metrics == run.metrics
    assert main(["maximize", "--resume", "--epochs", "11", "--out", str(out), "--quiet"]) == 2
    assert "other settings (epochs: 10 there, 11 now)" in capsys.readouterr().err


def test_the_readers_of_runs(
    polished: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", str(polished), "--attack", "none", "--attack", "fgm:eps=0.1"]) == 0
    assert "γ̂_m" in capsys.readouterr().out
    assert main(["report", str(polished)]) == 0
    assert (
        "Maximising margins under FGSM, ε = 0.05 (polish) for 10 epochs" in capsys.readouterr().out
    )
    page = (polished / "report.html").read_text(encoding="utf-8")
    for words in (
        "the weights of trained at step 300",
        "angles 0.005 to 0.0001, falling by equal factors",
        "in units of 1/median |margin|, rising",
        "70.0% of a batch, of the hardest 10.0%",
        "marginflow certify runs/polished",
    ):
        assert words in page
    assert "marginflow verify" not in page
    assert "learning rate" not in page
    parts, caveat = reproduction(mf.load_run(polished))
    assert caveat == ""
    words = shlex.split(" ".join(parts))
    assert words[:2] == ["marginflow", "maximize"]
    assert words[2:4] == ["--from", "runs/trained"]
    assert words[words.index("--method") + 1] == mf.load_run(polished).config["method"]
    assert main(["certify", str(polished)]) == 0
    assert "best multipliers" in capsys.readouterr().out
    assert main(["report", str(polished)]) == 0
    page = (polished / "report.html").read_text(encoding="utf-8")
    assert "marginflow certify runs/polished" not in page
    capsys.readouterr()
    assert main(["compare", str(trained), str(polished), "--out", str(tmp_path / "c.svg")]) == 0
    assert "polished ends with the largest normalised margin of 2 runs" in capsys.readouterr().out


def test_verify_says_what_applies(polished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(polished)]) == 2
    error = capsys.readouterr().err
    assert (
        "'polished' maximises margins, and the steps of method 'polish' follow no gradient" in error
    )
    assert "marginflow certify" in error
    assert not (polished / "verdicts.json").exists()


def test_loss_based_is_a_training_and_is_verified_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = [*SMALL, "--method", "loss-based", "--out", str(out)]
    assert main(["maximize", *options]) == 0
    assert mf.load_run(out).config["kind"] == "train"
    assert main(["verify", str(out)]) in (0, 1)
    assert (out / "verdicts.json").exists()
    capsys.readouterr()
    assert main(["maximize", "--resume", "--out", str(out)]) == 2
    assert "not a margin maximisation but a training run" in capsys.readouterr().err


def test_a_linear_predictor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    linear = [*DATA[:2], "--attack", "fgm:eps=0.1", "--model", "deep-linear", "--method", "dual"]
    assert main(["maximize", *linear, "--epochs", "5000", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    run = mf.load_run(out)
    assert text.startswith(f"{run.final['step']} steps in ")
    assert f"duality gap: {run.final['duality_gap']:.2e} of the bound 0.2 on the margin" in text
    assert "(reached)" in text
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "at most 10⁻⁶ of the bound" in page
    assert "is not finished" not in page
    few = [*linear, "--epochs", "3", "--out", str(tmp_path / "few")]
    assert main(["maximize", *few]) == 0
    assert "(not reached: take more --epochs)" in capsys.readouterr().out
    assert main(["maximize", "--resume", "--out", str(out)]) == 2
    assert "cannot be resumed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ([], "--data is missing; for example --data digits:3,8, or --from RUN"),
        (DATA, "--model is missing"),
        ([*SMALL, "--method", "magic"], "unknown method 'magic'"),
        ([*SMALL, "--method", "spheres:tau=9..1"], "a temperature that rises"),
        ([*SMALL, "--method", "polish", "--strict", "--attack", "fgsm:eps=0.2"], "train first"),
        ([*SMALL, "--batch-size", "0"], "batch_size"),
        ([*SMALL, "--threads", "0"], "--threads"),
        (["--from", "nowhere"], "nowhere"),
        (["--resume"], "--resume needs --out RUN"),
    ],
)
def test_bad_input(
    extra: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--resume" in extra else ["--out", str(tmp_path / "run")]
    assert main(["maximize", *extra, *out]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_warm_up_is_said_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "marginflow", "maximize", *SMALL, "--method", "polish"]
    command += ["--attack", "fgsm:eps=0.2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "WARNING: polish: " in done.stderr
    assert "a warm-up comes first" in done.stderr


def steps(path: Path) -> int:
    return max((int(p.stem.removeprefix("step-")) for p in path.glob("step-*.json")), default=-1)


def test_sigkill_and_ctrl_c(tmp_path: Path) -> None:
    """Killed twice and interrupted once; the bits are those of a run that was left alone."""
    given = [
        sys.executable, "-m", "marginflow", "maximize", "--data", "digits:3,8", "--model", "mlp:64",
        "--attack", "pgd-linf:eps=0.1,steps=2,step=0.06,random=true", "--epochs", "100",
        "--threads", "1", "--quiet",
    ]  # fmt: skip
    subprocess.run([*given, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    cut, rng = tmp_path / "cut", random.Random(3)
    command = [*given, "--out", str(cut)]
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, None):
        before = steps(cut / "checkpoints")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if number is not None:
            while process.poll() is None and steps(cut / "checkpoints") <= before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(number)
        _, error = process.communicate()
        expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, None: 0}[number]
        assert process.returncode == expected, error.decode()
        if number == signal.SIGINT:
            assert "continue with: marginflow maximize --resume --out" in error.decode()
        command = [*given[:4], "--resume", "--threads", "1", "--quiet", "--out", str(cut)]
    whole = tmp_path / "whole"
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for a, b in zip(*(mf.load_run(p).load_model().parameters() for p in (whole, cut)), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in cut.rglob(".*")] == [".lock"]
    assert json.loads((cut / "run.json").read_text())["kind"] == "maximize"
