"""The folder in which every refusal is tried, and a guard around each."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from refusal_world import build, listing

_SECONDS = 10.0
_BYTES = 3 * 2**30
"""What one call may take beyond what the process has; address space, most of it never touched."""


class _TooSlowError(BaseException):
    """Not an Exception: nothing may catch it."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refusals")
    # Matplotlib looks for its fonts once, and keeps them.
    os.environ.setdefault("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
    (root / "work").mkdir()
    before = Path.cwd()
    os.chdir(root / "work")
    try:
        build(root)
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def world(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, entered; HOME and TMPDIR lie in it too."""
    monkeypatch.chdir(made / "work")
    monkeypatch.setenv("HOME", str(made / "home"))
    monkeypatch.setenv("TMPDIR", str(made / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(made / "tmp"))
    monkeypatch.delenv("MARGINFLOW_DATA", raising=False)
    monkeypatch.syspath_prepend(str(made / "work"))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return made


@pytest.fixture
def unharmed(world: Path) -> Callable[[], AbstractContextManager[None]]:
    """A block that ends soon, takes no more than bounded memory, and changes no file."""

    @contextmanager
    def block() -> Iterator[None]:
        def ring(*_: object) -> None:
            raise _TooSlowError(f"more than {_SECONDS:g} s")

        before = listing(world)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        handler = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _BYTES, hard))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert listing(world) == before, "something was written"

    return block
