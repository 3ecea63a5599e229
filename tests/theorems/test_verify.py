"""``verify``: from memory, from disk, from the command line; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from theorem_runs import DATA, EXACT, deep, trained

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import InputError, RunError
from marginflow.runs import Run
from marginflow.theorems import verify

STATEMENTS = [
    "Lemma 1", "Lemma 2", "Lemma 5", "Lemma 6", "Eq. 36", "Lemma 7", "Lemma 8", "Eq. 68",
    "Theorem 2 (direction)", "Theorem 2 (rank one)", "Theorem 2 (alignment)",
    "Lemma 3", "Lemma 4", "Lemma 9", "Lemma 10", "Lemma 11",
    "Theorem 3 (growth)", "Theorem 3 (rate)", "Corollary 1",
    "Theorem 4 (identity)", "Theorem 4 (monotone)", "Theorem 4 (γ̂_m)",
    "Theorem 5 (ξ)", "Theorem 5 (χ)", "Theorem 5 (direction)", "Eq. 20", "Eq. 129",
    "Lemma 12", "Lemma 12 (rate)", "Theorem 6", "Lemma 13", "Appendix B.5",
]  # fmt: skip


def test_every_statement_in_the_order_of_the_paper(by_lemma_2: Run) -> None:
    assert [v.statement for v in verify(by_lemma_2)] == STATEMENTS
    for verdict in verify(by_lemma_2):
        for text in (verdict.claim, verdict.quantity, verdict.prediction, verdict.tolerance):
            assert text
        assert verdict.hypotheses
        json.dumps(verdict.as_dict())
    assert verify(by_lemma_2, mf.load(DATA)) == verify(by_lemma_2)


@pytest.mark.parametrize("spec", ["deep-linear:5,4", "deep-linear:2,2,2,2,2,2,2,2,2,2,2"])
def test_a_run_on_disk_gets_the_same_verdicts(tmp_path: Path, spec: str) -> None:
    """Also with more than nine layers, whose files list the tenth before the second."""
    run = mf.train(
        spec, DATA, attack=EXACT, lr=0.01, epochs=30, dtype="float64", out=tmp_path / "run"
    )
    memory = mf.train(spec, DATA, attack=EXACT, lr=0.01, epochs=30, dtype="float64")
    expected = verify(memory)
    assert verify(run) == expected
    assert verify(tmp_path / "run") == expected
    assert verify(str(tmp_path / "run"), mf.load(DATA)) == expected
    assert {v.statement: v.outcome for v in expected}["Eq. 36"] == "holds"


def test_a_resumed_run_gets_the_same_verdicts(tmp_path: Path) -> None:
    for name, parts in (("whole", [40]), ("parts", [10, 25, 40])):
        for number, epochs in enumerate(parts):
            mf.train(
                "deep-linear:5,4", DATA, attack=EXACT, lr="lemma2", epochs=epochs,
                dtype="float64", out=tmp_path / name, resume=number > 0,
            )  # fmt: skip
    assert verify(tmp_path / "whole")[4].measured == verify(tmp_path / "parts")[4].measured
    outcomes = [[v.outcome for v in verify(tmp_path / name)] for name in ("whole", "parts")]
    assert outcomes[0] == outcomes[1]


def test_other_data_are_refused(by_lemma_2: Run) -> None:
    for other in ("separable:n=20,d=6,margin=0.31", "separable:n=21,d=6,margin=0.3"):
        with pytest.raises(RunError, match="are not those that the run was trained on"):
            verify(by_lemma_2, mf.load(other))
    data = mf.load(DATA)
    with pytest.raises(RunError, match="not those"):
        verify(by_lemma_2, mf.Dataset(data.x, -data.y, name=data.name))


def test_data_without_a_name_must_be_given(tmp_path: Path) -> None:
    data = mf.load(DATA)
    own = mf.Dataset(data.x * 2, data.y)
    mf.train(deep(5), own, lr=0.1, epochs=3, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"give them: data=…"):
        verify(tmp_path / "run")
    assert len(verify(tmp_path / "run", own)) == len(STATEMENTS)


def test_what_is_no_training_run_is_refused(tmp_path: Path, by_lemma_2: Run) -> None:
    with pytest.raises(RunError):
        verify(tmp_path)
    with pytest.raises(RunError, match="is not a training run"):
        verify(Run({**by_lemma_2.config, "kind": "figure"}, by_lemma_2.metrics))


def test_a_run_without_measurements() -> None:
    run = trained(5, lr=0.1, epochs=3, measure=False)
    outcomes = {v.statement: v.outcome for v in verify(run)}
    assert outcomes["Lemma 7"] == "holds"
    assert outcomes["Theorem 2 (direction)"] == "does not apply"
    assert "fails" not in outcomes.values()


def test_judging_changes_nothing(by_lemma_2: Run) -> None:
    before = {
        step: {n: w.clone() for n, w in weights.items()}
        for step, weights in by_lemma_2.trajectory().items()
    }
    state = torch.get_rng_state()
    one, two = verify(by_lemma_2), verify(by_lemma_2)
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)
    for step, weights in by_lemma_2.trajectory().items():
        assert all(torch.equal(w, before[step][n]) for n, w in weights.items())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mf.train(
        "deep-linear:5,4", DATA, attack=EXACT, lr="lemma2", epochs=30, dtype="float64",
        out=tmp_path / "run",
    )  # fmt: skip
    assert main(["verify", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for statement in STATEMENTS:
        assert statement.split(" (")[0] in text
    written = json.loads((tmp_path / "run" / "verdicts.json").read_text(encoding="utf-8"))
    assert [v["statement"] for v in written] == STATEMENTS
    assert [v["outcome"] for v in written] == [v.outcome for v in verify(tmp_path / "run")]


def test_the_command_ends_with_1_where_a_statement_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    mf.train("deep-linear:5", DATA, lr=0.1, epochs=5, dtype="float64", out=folder)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1]["balance_drift"] = 1e-6
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["verify", str(folder)]) == 1
    assert "failed: Eq. 36" in capsys.readouterr().out
