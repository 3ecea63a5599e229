"""The disk full, at every write in turn: old files stay, a clear error, and the job goes on later."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fault_runs import (
    FULL,
    JOBS,
    READERS,
    bits,
    content,
    leftovers,
    made,
    of,
    refusing,
    sweep_here,
    sweep_words,
)

import marginflow as mf
from marginflow.cli import main

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, code: int) -> None:
    """Exit code 2 and one line that says what is full."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert "error: cannot " in error
    assert "No space left on device" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_at_every_write(kind: str, tmp_path: Path, capsys: Capture) -> None:
    whole = made(kind, tmp_path / "whole")
    with refusing(0, FULL, tmp_path) as calls:
        made(kind, tmp_path / "counted")
    assert {"open", "write", "fsync", "mkdir", "replace"} <= set(calls)
    expected = bits(whole)
    # A prime apart, so that every kind of call is among them; all those of the beginning.
    apart = {"train": 13, "flow": 37, "maximize": 17}[kind]
    for at in [*range(1, 8), *range(8, len(calls) + 1, apart)]:
        cut = tmp_path / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        with refusing(at, FULL, tmp_path):
            code = main([*JOBS[kind], "--out", str(cut)])
        refused(capsys, code)
        begun = (cut / "run.json").exists()
        if begun:
            mf.load_run(cut)
        made(kind, cut, *(["--resume"] if begun else []))
        assert bits(cut) == expected, f"call {at}"
        assert leftovers(cut) == []
        capsys.readouterr()


@pytest.mark.parametrize("name", READERS)
def test_a_result_at_every_write(name: str, tmp_path: Path, capsys: Capture) -> None:
    run = made("train", tmp_path / "run")
    words = of(READERS[name], run)
    before = content(run)
    with refusing(0, FULL, tmp_path) as calls:
        assert main(words) == 0
    after = content(run)
    assert after != before
    capsys.readouterr()
    for at in range(1, len(calls) + 1, {"report": 31, "verify": 3}.get(name, 1)):
        with refusing(at, FULL, tmp_path):
            code = main(words)
        refused(capsys, code)
        assert content(run) == after, f"call {at}: the earlier result is there, whole"
        assert leftovers(run) == []


def test_a_sweep_at_its_writes(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_here(monkeypatch)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(sweep_words(tmp_path, whole)) == 0
    with refusing(0, FULL, tmp_path) as calls:
        assert main(sweep_words(tmp_path, tmp_path / "counted")) == 0
    capsys.readouterr()
    for at in [1, 3, 5, len(calls) // 2, *range(len(calls) - 9, len(calls) + 1, 3)]:
        shutil.rmtree(cut, ignore_errors=True)
        with refusing(at, FULL, tmp_path):
            code = main(sweep_words(tmp_path, cut))
        refused(capsys, code)
        begun = (cut / "sweep.json").exists()
        assert main(sweep_words(tmp_path, cut, *(["--resume"] if begun else []))) == 0
        for trial in ("seed-0", "seed-1"):
            assert bits(cut / "trials" / trial) == bits(whole / "trials" / trial), f"call {at}"
        assert leftovers(cut) == []
        capsys.readouterr()


def test_a_line_that_was_refused_is_not_written_later(tmp_path: Path) -> None:
    """The second half of a line must not come behind the cut, when the file is closed and there is room."""
    from marginflow.errors import StorageError
    from marginflow.runs import append_durably

    path = tmp_path / "metrics.jsonl"
    append_durably(path, '{"step": 1}')
    with refusing(2, FULL, tmp_path), pytest.raises(StorageError, match="No space left"):
        append_durably(path, '{"step": 2}')
    assert path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1}\n{"st')
    append_durably(path, '{"step": 2}')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n', "a torn line is cut off first"
