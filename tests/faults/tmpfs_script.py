"""In a mount namespace of its own: ``tmpfs_script.py SMALL LARGE``, SMALL a mounted tmpfs of 96 KiB."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from fault_runs import JOBS, READERS, bits, content, made, main_silently, of
from read_only_commands import refused_words, working_words

import marginflow as mf
from marginflow.cli import main


def _full(small: Path, large: Path) -> int:
    """Trainings that fill the disk with more and more room; how many did."""
    with contextlib.redirect_stdout(sys.stderr):
        whole = made("train", large / "whole")
    times = 0
    for room in range(4, 36, 8):
        filler = small / "filler"
        filler.write_bytes(b"")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - 1024 * room)
        cut, said = small / "cut", io.StringIO()
        with contextlib.redirect_stderr(said):
            code = main([*JOBS["train"], "--out", str(cut)])
        print(room, code, said.getvalue().strip(), file=sys.stderr)
        if code != 2 or "No space left" not in said.getvalue():
            sys.exit(f"room for {room} KiB: exit code {code}")
        times += 1
        before = content(cut)
        filler.unlink()
        begun = (cut / "run.json").exists()
        if begun:
            mf.load_run(cut)
        elif before:
            sys.exit(f"files without run.json: {before}")
        with contextlib.redirect_stdout(sys.stderr):
            made("train", cut, *(["--resume"] if begun else []))
        if bits(cut) != bits(whole):
            sys.exit(f"room for {room} KiB: other bits")
        subprocess.run(["rm", "-r", str(cut)], check=True)
    return times


def _read_only(small: Path, large: Path) -> tuple[int, int]:
    subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
    run = small / "run"
    with contextlib.redirect_stdout(sys.stderr):
        made("train", run)
        for words in READERS.values():
            main(of(words, run))
    before = content(run)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    refused = 0
    for words in refused_words(small, large):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = main(words)
        if code != 2 or "Read-only file system" not in said.getvalue():
            sys.exit(f"{words}: exit code {code}, {said.getvalue()}")
        refused += 1
    worked = 0
    for words in working_words(small, large):
        if main_silently(words) != 0:
            sys.exit(f"{words}: does not work on a read-only run")
        worked += 1
    if content(run) != before:
        sys.exit("a read-only run has changed")
    return refused, worked


if __name__ == "__main__":
    places = Path(sys.argv[1]), Path(sys.argv[2])
    real, sys.stdout = sys.stdout, sys.stderr
    full = _full(*places)
    some, others = _read_only(*places)
    print(f"full {full} times; read-only: {some} refused, {others} worked", file=real)
