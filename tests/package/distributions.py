"""Running commands far from the source tree; the two files that are built from it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def version() -> str:
    """The version in the source."""
    names: dict[str, str] = {}
    exec((ROOT / "src/marginflow/_version.py").read_text(encoding="utf-8"), names)
    return names["__version__"]


def call(
    command: Sequence[str | Path], folder: Path, *, expect: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder``, with no source tree on the module path; check its exit code."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


@dataclass(frozen=True)
class Built:
    """A wheel and a source distribution."""

    wheel: Path
    sdist: Path


@dataclass(frozen=True)
class Environment:
    """An environment in which only the wheel is installed, and a folder far from the source."""

    programs: Path
    folder: Path

    def __call__(self, program: str, *arguments: str | Path, **variables: str) -> str:
        """Run one of its programs in the folder; what it printed."""
        return call([self.programs / program, *arguments], self.folder, **variables).stdout
