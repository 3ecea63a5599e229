"""What ``marginflow verify`` wrote into a run, on its page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from marginflow.report import write_report
from marginflow.report._svg import formula
from marginflow.report._verdicts import outcomes_table, theories
from marginflow.runs import Run
from marginflow.theorems import Hypothesis, Outcome, Verdict

Make = Callable[..., Run]

ANSWERS = [{"question": "Homogeneous?", "answer": "yes, K = 2", "meaning": "f(aW) = a^K f(W)"}]


def verdict(statement: str, outcome: Outcome, **fields: object) -> Verdict:
    hypotheses = (
        Hypothesis("the exponential loss", False, "logistic", needed=False),
        Hypothesis("float64", True),
    )
    texts = {
        "claim": "‖W_k‖_F grows like σ^-2",
        "quantity": "the exponent",
        "prediction": "-2",
        "measured": f"-1.99 of {statement}",
        "tolerance": "10%",
    }
    return Verdict(
        statement=statement,
        hypotheses=hypotheses,
        outcome=outcome,
        **{**texts, **fields},  # type: ignore[arg-type]
    )


@pytest.fixture
def judged(make_run: Make, tmp_path: Path) -> Callable[..., Run]:
    """A run on disk with the given verdicts."""

    def judge(name: str, verdicts: Sequence[Verdict], *, audited: bool = True) -> Run:
        run = make_run(name)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("")
        content = json.dumps([v.as_dict() for v in verdicts])
        (folder / "verdicts.json").write_text(content, encoding="utf-8")
        if audited:
            (folder / "audit.json").write_text(json.dumps({"answers": ANSWERS}), encoding="utf-8")
        return Run(run.config, run.metrics, folder)

    return judge


THREE: list[tuple[str, Outcome]] = [
    ("Theorem 2", "holds"),
    ("Theorem 3", "fails"),
    ("Lemma 13", "does not apply"),
    ("Theorem 5", "not reached"),
]


def test_the_verdicts_of_one_run(judged: Callable[..., Run], tmp_path: Path) -> None:
    run = judged(
        "fgsm", [verdict(s, o, advice="train longer" * (o == "not reached")) for s, o in THREE]
    )
    (found,) = theories([run])
    assert found.counts == "1 holds, 1 fails, 1 not reached, 1 does not apply"
    assert (found.remark, found.command) == ("", "")
    assert [(v.statement, v.mark, v.kind) for v in found.judged] == [
        ("Theorem 2", "✓ holds", "holds"),
        ("Theorem 3", "✗ fails", "fails"),
        ("Theorem 5", "… not reached", "not-reached"),
    ]
    assert found.judged[0].details == (
        "Of: the exponent.",
        "Predicted: -2 (tolerance 10%).",
        "Although not met: the exponential loss (logistic).",
    )
    assert found.judged[2].details[-1] == "Advice: train longer."
    assert found.others is not None
    assert [row[0] for row in found.others.rows] == ["Lemma 13"]
    assert found.hypotheses is not None
    assert found.hypotheses.rows == [["Homogeneous?", "yes, K = 2", "f(aW) = a^K f(W)"]]
    page = write_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<span class="verdict fails">✗ fails</span>' in page
    assert "‖<i>W</i><sub>k</sub>‖<sub>F</sub> grows like σ<sup>−2</sup>" in page
    assert "1 holds, 1 fails, 1 not reached, 1 does not apply." in page
    assert "marginflow verify" in page  # as what judged it
    assert "<pre><code>marginflow verify" not in page


def test_several_runs_beside_each_other(judged: Callable[..., Run], make_run: Make) -> None:
    first = judged("first", [verdict(s, o) for s, o in THREE])
    second = judged("second", [verdict("Theorem 3", "holds"), verdict("Eq. 36", "holds")])
    table = outcomes_table([first, second, make_run("third")])
    assert table is not None
    assert table.header == ["statement", "first", "second", "third"]
    assert table.rows[1] == ["Theorem 3", "✗ fails", "✓ holds", "–"]
    assert table.rows[-1] == ["Eq. 36", "–", "✓ holds", "–"]
    assert outcomes_table([first]) is None
    assert outcomes_table([make_run("a"), make_run("b")]) is None


def test_a_run_that_was_not_judged_says_how(make_run: Make, tmp_path: Path) -> None:
    (found,) = theories([make_run("my run")])
    assert found.remark.startswith("Not judged yet.")
    assert found.command == "marginflow verify 'runs/my run'"
    assert theories([make_run(None)])[0].command == ""
    assert theories([make_run(data="custom")])[0].command == ""
    page = write_report([make_run("a"), make_run("b")], tmp_path / "page.html").read_text()
    assert "marginflow verify runs/a\nmarginflow verify runs/b" in page


def test_a_damaged_file_spoils_no_page(judged: Callable[..., Run], tmp_path: Path) -> None:
    run = judged("fgsm", [])
    assert run.path is not None
    for content in ("", "{", "{}", "[1]", "null"):
        (run.path / "verdicts.json").write_text(content)
        (run.path / "audit.json").write_text(content)
        (found,) = theories([run])
        assert found.remark == "verdicts.json cannot be read; write it again:"
    assert "cannot be read" in write_report([run], tmp_path / "page.html").read_text()


def test_verdicts_older_than_the_last_measurement_say_so(judged: Callable[..., Run]) -> None:
    run = judged("fgsm", [verdict("Theorem 2", "holds")], audited=False)
    assert run.path is not None
    os.utime(run.path / "verdicts.json", (1e9, 1e9))
    os.utime(run.path / "metrics.jsonl", (1e9 + 0.5, 1e9 + 0.5))
    assert theories([run])[0].remark == ""
    os.utime(run.path / "metrics.jsonl", (1e9 + 60, 1e9 + 60))
    (found,) = theories([run])
    assert "younger than these verdicts" in found.remark
    assert found.command == "marginflow verify runs/fgsm"
    assert found.counts == "1 holds"
    assert found.hypotheses is None


def test_the_step_that_was_judged_goes_before_the_times_of_the_files(
    judged: Callable[..., Run],
) -> None:
    run = judged("fgsm", [verdict("Theorem 2", "holds")])
    assert run.path is not None
    for judged_step, old in ((run.final["step"], False), (run.final["step"] - 1, True)):
        (run.path / "audit.json").write_text(json.dumps({"step": judged_step, "answers": ANSWERS}))
        for later in ("verdicts.json", "metrics.jsonl"):
            for name in ("verdicts.json", "metrics.jsonl"):
                os.utime(run.path / name, (1e9 + 60 * (name == later),) * 2)
            assert bool(theories([run])[0].command) == old


def test_strings_of_the_files_are_text(judged: Callable[..., Run], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = judged("fgsm", [verdict(evil, "holds", claim=evil, measured=evil, advice=evil)])
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("W_k", "<i>W</i><sub>k</sub>"),
        ("v_{k+1}", "<i>v</i><sub>k+1</sub>"),
        ("m_min^(K-2)", "<i>m</i><sub>min</sub><sup>K−2</sup>"),
        ("max_k ‖W_k‖_F", "max<sub>k</sub> ‖<i>W</i><sub>k</sub>‖<sub>F</sub>"),
        ("γ̂_m < γ_m", "<i>γ̂</i><sub>m</sub> &lt; <i>γ</i><sub>m</sub>"),
        ("run_1 and x_train stay", "run_1 and x_train stay"),
        ("(ln t)^{-2+2/K}", "(ln\u00a0t)<sup>−2+2/K</sup>"),
    ],
)
def test_formulas(text: str, expected: str) -> None:
    assert formula(text) == expected
