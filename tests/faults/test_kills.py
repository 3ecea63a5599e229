"""``benchmarks/faults.py``, with few kills: a part of what it does at full length."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


def test_killed_at_random_and_resumed_to_the_same_bits() -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--short",
            "--kills",
            "4",
            "--only",
            "PGD",
            "certify",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(
        r"(\d+) kills in \d+ s: (\d+) resumed to the same bits, 0 half-written files, 0 failures",
        done.stdout,
    )
    assert told is not None, done.stdout
    assert int(told[1]) == int(told[2]) >= 4
