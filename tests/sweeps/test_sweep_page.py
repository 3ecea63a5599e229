"""The blocks of docs/howto/sweep.md, carried out as they stand, but for fewer epochs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from marginflow.cli import main
from marginflow.sweeps import read_plan
from marginflow.sweeps._plan import _RESOURCES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "sweep.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds == ["toml", "sh", "text", "sh", "python", "sh", "toml"]
    content = BLOCKS[0][1].replace("epochs = 100", "epochs = 5")
    assert content != BLOCKS[0][1]
    Path("sweep.toml").write_text(content, encoding="utf-8")
    for kind, written in BLOCKS[1:]:
        block = re.sub(r"(--jobs |jobs=)2", r"\g<1>1", written)  # a process less to begin
        if kind == "sh":
            program, *words = shlex.split(block)
            assert program == "marginflow"
            # Ray, where it is installed, has tests of its own.
            assert main([*words, "--executor", "processes"]) == 0
        elif kind == "text":
            assert capsys.readouterr().out == block
            assert not Path("runs").exists()
        elif kind == "python":
            exec(block, {})
    printed = capsys.readouterr()
    assert "6 of 6 trials are finished already" in printed.err
    assert max(map(len, printed.out.splitlines())) <= 200
    folder = Path("runs/eps-and-width")
    listed = set(re.findall(r"^    ([\w.]+)", PAGE.read_text("utf-8"), re.MULTILINE))
    assert {path.name for path in folder.iterdir() if path.name != ".lock"} <= listed | {
        "results.jsonl"
    }
    assert len(list((folder / "trials").iterdir())) == 6


def test_the_other_tables_of_the_page(tmp_path: Path) -> None:
    assert set(_RESOURCES) == {"cpus", "gpus"}
    file = tmp_path / "sweep.toml"
    file.write_text(BLOCKS[0][1] + BLOCKS[-1][1], encoding="utf-8")
    plan = read_plan(file)
    assert (plan.cpus, plan.gpus, len(plan.trials)) == (4, 1, 6)


def test_the_sweep_of_all_of_mnist_can_be_carried_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options are checked against the data and the networks; that takes hours, so nothing is trained."""
    file = PAGE.parents[2] / "examples" / "ten_digits.toml"
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 trials of train")
    assert "model-cnn_eps-32: attack = fgsm:eps=32/255, model = cnn" in printed
