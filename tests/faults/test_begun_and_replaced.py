"""What a process leaves that is killed while it begins or replaces a run is taken up, and nothing else is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from fault_runs import bits, content, leftovers, made, sweep_here, sweep_words

from marginflow.cli import main
from marginflow.errors import RunError
from marginflow.runs import RunDirectory, write_atomically


class _Killed(BaseException):
    """In place of SIGKILL: nothing in the library catches it and goes on."""


def test_a_folder_in_which_a_run_was_only_begun_is_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".lock").touch()
    (run / ".run.json.ab12_xyz").write_text('{"form')
    made("train", run)
    assert leftovers(run) == []


@pytest.mark.parametrize(
    "name", ["figures/mine.pdf", "checkpoints/mine.txt", ".run.json.mine", "a"]
)
def test_a_folder_with_anything_else_is_not(name: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    for force in (False, True):
        with pytest.raises(RunError, match="holds files that are no run"):
            RunDirectory.create(tmp_path, {}, force=force)
    assert (tmp_path / name).read_text() == "years of work"


def test_killed_at_every_call_of_a_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder always has a run.json; the old run cannot go on with measurements missing."""
    whole = made("train", tmp_path / "whole")
    expected = bits(whole)
    at, ended = 0, False
    while not ended:
        at += 1
        run = Path(shutil.copytree(whole, tmp_path / f"run-{at}"))
        with monkeypatch.context() as patch:
            _kill_at(patch, at)
            try:
                RunDirectory.create(run, {"kind": "train"}, force=True).close()
                ended = True
            except _Killed:
                pass
        config = RunDirectory(run).read_config()
        if "data" not in config or at % 3:  # the new run; or as for those beside it
            continue
        made("train", run, "--resume")
        assert bits(run) == expected, f"call {at}"
        assert leftovers(run) == []
    assert at > 10


def test_killed_twice_while_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt finds what the first one left, and may be killed while it clears that away."""
    for first in range(13, 18):  # the calls before these remove what is not there
        for second in range(1, 34):
            run = tmp_path / f"run-{first}-{second}"
            killed = []
            for at in (first, second):
                with monkeypatch.context() as patch:
                    _kill_at(patch, at)
                    try:
                        RunDirectory.create(run, {"kind": "train"}, force=True).close()
                    except _Killed:
                        killed.append(at)
            RunDirectory.create(run, {"kind": "train"}, force=True).close()
            assert {path.name for path in run.iterdir()} == {".lock", "run.json", "checkpoints"}
    assert killed == [first], "the last attempt had fewer calls than it was killed at"


def _kill_at(patch: pytest.MonkeyPatch, at: int) -> None:
    count = 0
    for name in ("unlink", "replace", "rename", "rmdir", "mkdir", "write", "fsync"):
        real = getattr(os, name)

        def called(*args: object, real: object = real, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count >= at:
                raise _Killed
            return real(*args, **kwargs)  # type: ignore[operator]

        patch.setattr(os, name, called)


def test_a_sweep_only_begun_or_half_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_here(monkeypatch)
    out = tmp_path / "sweep"
    out.mkdir()
    (out / ".lock").touch()
    (out / ".sweep.json.ab12_xyz").write_text("{")
    assert main(sweep_words(tmp_path, out)) == 0
    assert leftovers(out) == []
    before = content(out / "trials")
    # Replaced, and killed when attempts.jsonl was gone and the trials were put aside.
    (out / "attempts.jsonl").unlink()
    (out / "trials").rename(out / ".trials.ab12_xyz")
    assert main(sweep_words(tmp_path, out, "--resume")) == 0
    assert leftovers(out) == []
    after = content(out / "trials")
    assert after.keys() == before.keys()
    assert [bits(out / "trials" / f"seed-{k}") for k in (0, 1)]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    assert main(sweep_words(tmp_path, tmp_path / "foreign", "--force")) == 2


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    import fcntl

    left, alive = (tmp_path / f".page.html.{end}" for end in ("killed12", "living34"))
    for path in (left, alive):
        path.write_text("half")
    with alive.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomically(tmp_path / "page.html", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [alive.name, "page.html"]
