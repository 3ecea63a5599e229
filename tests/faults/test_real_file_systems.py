"""A real small tmpfs that fills up, and one that is read-only, where this process may mount."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parent / "tmpfs_script.py"


def test_on_a_tmpfs(tmp_path: Path) -> None:
    """The same with injected refusals is in test_disk_full and test_read_only, and always runs."""
    place = tmp_path / "small"
    place.mkdir()
    enter = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=96k tmpfs '{place}'"
    mounts = shutil.which("unshare") is not None
    if mounts:
        tried = subprocess.run([*enter, mount], check=False, capture_output=True)
        mounts = tried.returncode == 0
    if not mounts:
        pytest.skip("mounting is not permitted here (unshare --map-root-user --mount)")
    done = subprocess.run(
        [*enter, f"{mount} && exec '{sys.executable}' '{_SCRIPT}' '{place}' '{tmp_path}'"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "full 4 times; read-only: 10 refused, 5 worked" in done.stdout, done.stdout
