"""``marginflow train --seeds``: what it prints and leaves, and what the other commands make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import marginflow as mf
from marginflow.cli import main

SMALL = [
    "--data", "digits:3,8", "--model", "mlp:6", "--attack", "fgsm:eps=0.1",
    "--epochs", "2", "--batch-size", "64", "--quiet",
]  # fmt: skip


def test_the_runs_are_ordinary_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x"
    assert main(["train", *SMALL, "--seeds", "0,3", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "2 seeds, 2 epochs each" in printed.out
    assert "seed-3" in printed.out
    assert f"marginflow report {out}/seed-*" in printed.out
    assert printed.err == ""
    assert main(["train", *SMALL, "--seed", "3", "--out", str(tmp_path / "solo")]) == 0
    one, solo = mf.load_run(out / "seed-3"), mf.load_run(tmp_path / "solo")
    assert one.config == solo.config
    assert one.final["margin"] == pytest.approx(solo.final["margin"], rel=1e-4)
    folders = [str(out / "seed-0"), str(out / "seed-3")]
    page = tmp_path / "page.html"
    assert main(["report", *folders, "--out", str(page)]) == 0
    assert main(["compare", *folders]) == 0
    assert main(["verify", folders[0]]) in (0, 1)
    assert page.exists()
    assert (out / "seed-0" / "verdicts.json").exists()


def test_continuing_all_or_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x")
    assert main(["train", *SMALL, "--seeds", "2", "--out", out]) == 0
    again = ["train", "--resume", "--out", out, "--epochs", "3", "--quiet"]
    assert main(again) == 2
    assert f"--seeds 2, or one: --resume --out {out}/seed-0" in capsys.readouterr().err
    assert main([*again, "--seeds", "2"]) == 0
    alone = ["train", "--resume", "--out", f"{out}/seed-1", "--epochs", "4", "--quiet"]
    assert main(alone) == 0
    epochs = [mf.load_run(tmp_path / "x" / f"seed-{seed}").final["epoch"] for seed in (0, 1)]
    assert epochs == [3, 4]


def test_it_says_why_the_seeds_run_one_after_the_other(tmp_path: Path) -> None:
    options = ["--lr", "loss-based:a=0.1", "--seeds", "2", "--out", str(tmp_path / "x")]
    assert main(["train", *SMALL, *options]) == 0
    assert mf.load_run(tmp_path / "x" / "seed-1").final["epoch"] == 2


@pytest.mark.parametrize("seeds", ["many", "", "1.5"])
def test_seeds_that_are_none(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--seeds", seeds]) == 2
    assert "expected a number such as 8" in capsys.readouterr().err


def test_seed_and_seeds_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--seeds", "2", "--seed", "1"]) == 2
    assert "exclude each other" in capsys.readouterr().err
