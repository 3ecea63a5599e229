"""The scripts of examples/: which environment each needs, and how one is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "examples"
ORDINARY = ("batch_norm_cnn.py", "own_attack.py", "own_data.py", "own_loop.py", "plain_loop.py")
INTEGRATIONS = {
    "accelerate_loop.py": ("accelerate", "pip install accelerate"),
    "lightning_module.py": ("lightning", "pip install 'marginflow[lightning]'"),
}
"""By name: the module each needs, and the command that brings it."""
EXTRAS = {"foolbox_scale_trap.py": ("foolbox", "pip install 'marginflow[attack-libraries]'")}


def run_example(
    name: str, *arguments: str, first: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run an example as a user would, with warnings as errors; ``first`` leads its module path."""
    command = [sys.executable, "-W", "error", str(FOLDER / name), *arguments]
    path = [str(p) for p in (first, os.environ.get("PYTHONPATH")) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def check_example(name: str, *arguments: str) -> str:
    """Run an example; return what it printed, if it was content with itself."""
    done = run_example(name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout
