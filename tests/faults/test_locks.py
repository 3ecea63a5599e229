"""One writer of a run, whatever its path is called; the lock ends with its owner, forked children or not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import JOBS, READERS, content, made, of, sweep_here, sweep_words

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import RunError
from marginflow.runs import RunDirectory, lock_folder, write_atomically

Capture = pytest.CaptureFixture[str]


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A lock on ``folder`` as a process beside this one has it: of another open file."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("how", ["--resume", "--force"])
@pytest.mark.parametrize("kind", JOBS)
def test_the_second_writer_is_refused(
    kind: str, how: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(kind, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    before = content(run)
    with held(run):
        for name in ("../run", str(run), "../deep/../run", "../link/run"):
            capsys.readouterr()
            assert main([*JOBS[kind], "--out", name, how]) == 2
            error = capsys.readouterr().err
            assert f"error: another process is writing the run {name!r}" in error
            assert len(error.splitlines()) == 1
            assert content(run) == before
    assert main([*JOBS[kind], "--out", str(run), how]) == 0


def test_a_new_run_that_another_process_begins(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"):
        assert main([*JOBS["train"], "--out", str(tmp_path / "run")]) == 2
    assert "another process is writing" in capsys.readouterr().err
    made("train", tmp_path / "run")


def test_a_run_that_was_made_between_look_and_lock_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the path free; one is through before the other has the lock."""
    made("train", tmp_path / "quick")
    real = RunDirectory._acquire

    def late(self: RunDirectory) -> None:
        shutil.copytree(tmp_path / "quick", self.path, dirs_exist_ok=True)
        real(self)

    monkeypatch.setattr(RunDirectory, "_acquire", late)
    with pytest.raises(RunError, match="already holds a run"):
        RunDirectory.create(tmp_path / "run", {})
    monkeypatch.undo()
    assert content(tmp_path / "run") == content(tmp_path / "quick")
    RunDirectory.reopen(tmp_path / "run").close()


def test_a_second_sweep_and_its_trials(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_here(monkeypatch)
    out = tmp_path / "sweep"
    assert main(sweep_words(tmp_path, out)) == 0
    before = content(out)
    with held(out):
        for how in ("--resume", "--force"):
            capsys.readouterr()
            assert main(sweep_words(tmp_path, out, how)) == 2
            assert "another process is carrying out the sweep" in capsys.readouterr().err
            assert content(out) == before


def test_a_second_monitor(tmp_path: Path) -> None:
    data = mf.load("separable:n=16,d=6,margin=0.3")
    model = mf.models.deep_linear(6, 4, 1)
    monitor = mf.Monitor(model, (data.x, data.y), out=tmp_path / "run")
    monitor.measure(0)
    for how in ({"resume": True}, {"force": True}):
        with pytest.raises(RunError, match="a monitor of this one that was not closed"):
            mf.Monitor(model, (data.x, data.y), out=tmp_path / "run", **how)
    monitor.measure(1)
    monitor.close()
    assert [r["step"] for r in mf.load_run(tmp_path / "run").metrics] == [0, 1]


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_is_being_written_can_be_read(name: str, tmp_path: Path) -> None:
    run = made("train", tmp_path / "run")
    with held(run):
        assert main(of(READERS[name], run)) == 0


def test_checkpoints_that_go_while_they_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The writer saves two new ones between the list of names and the reading."""
    run = made("flow", tmp_path / "run")
    real = RunDirectory._checkpoint_paths
    found = real(RunDirectory(run))
    names = iter([[path.with_name("step-00000001.safetensors") for path in found]])
    monkeypatch.setattr(
        RunDirectory, "_checkpoint_paths", lambda self: next(names, None) or real(self)
    )
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        checkpoint = mf.load_run(run).checkpoint()
    assert checkpoint.path == found[0]
    assert caplog.text == ""


_OWNER = """
import os, signal, sys, time
from marginflow.runs import RunDirectory
run = RunDirectory.reopen(sys.argv[1])
child = os.fork()
if child == 0:
    run.close()
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_owner_is_free_though_its_forked_child_lives(tmp_path: Path) -> None:
    """Workers of a data loader, or of a pool, are forked: they inherit what is open."""
    run = made("train", tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(run)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        try:
            with pytest.raises(RunError, match="another process"):
                RunDirectory.reopen(run)
            owner.send_signal(signal.SIGKILL)
            owner.wait()
            os.kill(child, 0)  # it lives
            RunDirectory.reopen(run).close()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, logger="marginflow"):
        made("train", tmp_path / "run")
    assert "has no locks" in caplog.text
    lock = lock_folder(tmp_path)
    assert lock is not None
    lock.close()
    lock.close()
    other = tmp_path / ".page.html.ab12cd34"
    other.write_text("perhaps of a living process")
    write_atomically(tmp_path / "page.html", "new")
    assert other.exists()
