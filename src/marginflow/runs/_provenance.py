"""What ``run.json`` says of where a run came from.

Source: marginflow.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from marginflow._version import __version__
from marginflow.distributed import current


def provenance() -> dict[str, Any]:
    """Versions, the source's git revision (if it lies in a checkout), threads, processes, machine."""
    team = current()
    return {
        "versions": {
            "marginflow": __version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "git_revision": _git_revision(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": 1 if team is None else team.size,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of weights: of their names, shapes, types and bits.

    Args:
        weights: by name, of any shape.
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        # Viewed as bytes: NumPy has no bfloat16.
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def _git_revision() -> str | None:
    source = Path(__file__).resolve().parent
    # An installed package may lie inside somebody else's checkout: only our own layout counts.
    root = source.parents[2]
    if not (root / ".git").exists() or not (root / "src" / "marginflow").is_dir():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
