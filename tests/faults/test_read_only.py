"""A file system that is read-only: what writes says so and leaves everything; what reads works."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import READ_ONLY, READERS, content, made, of, refusing
from read_only_commands import refused_words, working_words

import marginflow as mf
from marginflow.cli import main
from marginflow.errors import StorageError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fixed")
    run = made("train", folder / "run")
    for words in READERS.values():
        assert main(of(words, run)) == 0
    return folder


@pytest.mark.parametrize("place", range(10))
def test_what_writes_is_refused(place: int, fixed: Path, tmp_path: Path, capsys: Capture) -> None:
    before = content(fixed)
    words = refused_words(fixed, tmp_path)[place]
    capsys.readouterr()
    with refusing(1, READ_ONLY, fixed):
        code = main(words)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: cannot ")
    assert "Read-only file system" in error
    assert len(error.splitlines()) == 1
    assert content(fixed) == before
    assert not (fixed / "new").exists()


@pytest.mark.parametrize("place", range(5))
def test_what_reads_works(place: int, fixed: Path, tmp_path: Path) -> None:
    before = content(fixed)
    with refusing(1, READ_ONLY, fixed) as calls:
        assert main(working_words(fixed, tmp_path)[place]) == 0
    assert calls == []
    assert content(fixed) == before


def test_in_python(fixed: Path) -> None:
    with refusing(1, READ_ONLY, fixed):
        run = mf.load_run(fixed / "run")
        assert run.load_model() is not None
        assert mf.verify(run)
        with pytest.raises(StorageError, match="Read-only file system"):
            mf.Monitor(run.load_model(), (run.load_data().x, run.load_data().y), out=fixed / "m")
