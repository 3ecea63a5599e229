"""Section 3.1 from the outside: the command line, the figures, the bound at every step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import RunError
from marginflow.theorems import Verdict, verify

DATA = "separable:n=20,d=6,margin=0.3"


def trained(
    *widths: int,
    data: str = DATA,
    attack: str | None = "exact-linear:p=2,eps=0.1",
    **options: object,
) -> tuple[mf.Run, mf.Dataset]:
    loaded = mf.load(data)
    model = mf.models.deep_linear(*widths, seed=1).double()
    return mf.train(model, loaded, attack=attack, **options), loaded  # type: ignore[arg-type]


def by_name(verdicts: tuple[Verdict, ...]) -> dict[str, Verdict]:
    return {v.statement: v for v in verdicts}


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_margin_never_exceeds_its_bound_at_any_step(depth: int) -> None:
    run, _ = trained(6, *[5] * (depth - 1), 1, lr=0.2, epochs=400, schedule=range(401))
    gaps = np.array([0.3 - 0.1 - r["normalized_margin"] for r in run.metrics])
    assert len(gaps) == 401
    assert gaps.min() > 0
    assert gaps[-1] < gaps[200] < gaps[0]


def test_the_printed_constant_is_a_check_and_not_a_schedule() -> None:
    printed, data = trained(6, 5, 4, 1, lr="lemma2:constant=printed", epochs=50)
    corrected, _ = trained(6, 5, 4, 1, lr="lemma2", epochs=50)
    assert by_name(verify(printed, data))["Lemma 2"].outcome == "holds"
    ratio = corrected.final["learning_rate"] / printed.final["learning_rate"]
    print(f"corrected / printed step size: {ratio:.3g}")
    assert ratio > 1e3


def test_verify_from_disk_and_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = str(tmp_path / "run")
    arguments = ["train", "--data", DATA, "--model", "deep-linear:5,4", "--lr", "lemma2", "--quiet"]
    more = ["--attack", "exact-linear:p=2,eps=0.1", "--epochs", "200", "--dtype", "float64"]
    assert main([*arguments, *more, "--out", out]) == 0
    capsys.readouterr()
    assert main(["verify", out]) == 0
    text = capsys.readouterr().out
    assert max(cell_len(line) for line in text.splitlines() if out not in line) <= 80
    assert "Lemma 2" in text
    written = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    found = {v["statement"]: v["outcome"] for v in written}
    assert found == {v.statement: v.outcome for v in verify(mf.load_run(out))}
    assert found["Lemma 2"] == found["Eq. 36"] == "holds"

    other = mf.load("separable:n=20,d=6,margin=0.3,seed=9")
    with pytest.raises(RunError, match="not those that the run was trained on"):
        verify(mf.load_run(out), other)
    assert main(["verify", str(tmp_path / "nothing")]) == 2


def test_a_failing_statement_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--data", DATA, "--model", "deep-linear:5", "--lr", "0.05", "--quiet"]
    more = ["--attack", "fgm:eps=0.1", "--epochs", "30", "--dtype", "float64", "--out", str(out)]
    assert main([*arguments, *more]) == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    forged = json.loads(lines[-1]) | {"balance_drift": 1e-3}
    (out / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(forged)]) + "\n")
    capsys.readouterr()
    assert main(["verify", str(out)]) == 1
    assert "failed: Eq. 36" in capsys.readouterr().out
