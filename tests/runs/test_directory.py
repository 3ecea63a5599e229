"""Run directories: each file is whole or absent, and what is damaged is noticed."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marginflow.errors import RunError, StorageError
from marginflow.runs import FORMAT_VERSION, RunDirectory, _files, load_run, write_atomically


def saved(path: Path, steps: tuple[int, ...] = (1, 2, 3)) -> RunDirectory:
    run = RunDirectory.create(path / "run", {"kind": "train"})
    for step in steps:
        run.append_metrics({"step": step, "value": 0.1 * step})
        run.save_checkpoint({"model.w": torch.full((3,), float(step))}, {"step": step})
    run.close()
    return run


def test_round_trip(tmp_path: Path) -> None:
    run = saved(tmp_path)
    assert run.read_config() == {"format_version": FORMAT_VERSION, "kind": "train"}
    assert [r["step"] for r in run.read_metrics()] == [1, 2, 3]
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.info["step"] == 3
    assert torch.equal(checkpoint.tensors["model.w"], torch.full((3,), 3.0))
    names = sorted(p.name for p in (run.path / "checkpoints").iterdir())
    assert names == [f"step-0000000{k}.{end}" for k in (2, 3) for end in ("json", "safetensors")], (
        "only the newest two are kept, and no temporary file"
    )


def test_a_checkpoint_cut_at_any_length_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = saved(tmp_path)
    newest = run.path / "checkpoints" / "step-00000003.safetensors"
    whole = newest.read_bytes()
    for length in range(len(whole)):
        newest.write_bytes(whole[:length])
        with caplog.at_level(logging.WARNING, logger="marginflow"):
            checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.info["step"] == 2
    assert "step-00000003.safetensors is damaged" in caplog.text
    assert "using the checkpoint before it" in caplog.text


def test_a_checkpoint_without_its_side_file_does_not_count(tmp_path: Path) -> None:
    run = saved(tmp_path)
    (run.path / "checkpoints" / "step-00000003.json").unlink()
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.info["step"] == 2
    (run.path / "checkpoints" / "step-00000002.json").write_text("{")
    assert run.latest_checkpoint() is None


def test_metrics_survive_a_torn_last_line_but_no_damage_before(tmp_path: Path) -> None:
    run = saved(tmp_path)
    whole = run.metrics_path.read_bytes()
    for length in range(len(whole)):
        run.metrics_path.write_bytes(whole[:length])
        expected = whole[:length].count(b"\n")
        assert len(run.read_metrics()) == expected
    run.metrics_path.write_bytes(b'{"step": 1\n' + whole)
    with pytest.raises(RunError, match="line 1 is damaged"):
        run.read_metrics()


def test_truncation_keeps_the_bytes_of_what_stays(tmp_path: Path) -> None:
    run = saved(tmp_path)
    whole = run.metrics_path.read_bytes()
    run.truncate_metrics(2)
    assert run.metrics_path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


def test_a_taken_or_foreign_directory_is_refused_untouched(tmp_path: Path) -> None:
    run = saved(tmp_path)
    content = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"--resume.*--force"):
        RunDirectory.create(run.path, {})
    assert content == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}

    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(RunError, match="no run"):
            RunDirectory.create(foreign, {}, force=force)
    assert (foreign / "thesis.tex").read_text() == "years of work"

    with pytest.raises(RunError, match="no directory"):
        RunDirectory.create(foreign / "thesis.tex", {}, force=True)


def test_force_replaces_the_run_and_spares_other_files(tmp_path: Path) -> None:
    run = saved(tmp_path)
    (run.path / "notes.txt").write_text("mine")
    replaced = RunDirectory.create(run.path, {"kind": "flow"}, force=True)
    replaced.close()
    assert replaced.read_config()["kind"] == "flow"
    assert replaced.read_metrics() == []
    assert replaced.latest_checkpoint() is None
    assert (run.path / "notes.txt").read_text() == "mine"


def test_a_second_writer_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    run = saved(tmp_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from marginflow.runs import RunDirectory;"
            "r = RunDirectory.reopen(sys.argv[1]); print('held', flush=True); time.sleep(60)",
            str(run.path),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        if holder.stdout is None or holder.stdout.readline().strip() != b"held":
            pytest.fail("the first writer did not start")
        with pytest.raises(RunError, match="another process"):
            RunDirectory.reopen(run.path)
        with pytest.raises(RunError, match="another process"):
            RunDirectory.create(run.path, {}, force=True)
        assert len(run.read_metrics()) == 3, "reading needs no lock, and nothing was removed"
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
    RunDirectory.reopen(run.path).close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "no format_version"),
        ('{"kind": "train"}', "no format_version"),
        ('{"format_version": 999}', "format 999"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, content: str, message: str) -> None:
    run = saved(tmp_path)
    (run.path / "run.json").write_text(content)
    with pytest.raises(RunError, match=message):
        load_run(run.path)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run in"):
        load_run(tmp_path / "nothing")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path)
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        run.save_checkpoint({"model.w": torch.ones(3)}, {"step": 9})
    with pytest.raises(StorageError, match="No space left"):
        run.append_metrics({"step": 9})
    with pytest.raises(StorageError, match="No space left"):
        run.write_config({"kind": "other"})
    assert before == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def test_a_metric_on_a_device_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path)

    def full(path: str, flags: int) -> int:
        return os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(_files, "_beside_no_link", full)
    with pytest.raises(StorageError, match="No space left"):
        run.append_metrics({"step": 4})


def test_atomic_writes_leave_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "old")
    write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "a.txt", "x")


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    run = saved(tmp_path)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    run = saved(tmp_path)
    left = [
        run.path / ".run.json.x1y2",
        run.path / ".metrics.jsonl.x1y2",
        run.path / "checkpoints" / ".step-00000004.safetensors.x1y2",
    ]
    kept = [run.path / ".notes", run.path / ".run.jsonc", run.path / "checkpoints" / "mine.txt"]
    for path in left + kept:
        path.write_text("half")
    RunDirectory.reopen(run.path).close()
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)
