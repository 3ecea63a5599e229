"""``bounds.json`` of a run: its sandwiches, certified ≤ true ≤ attacked.

Source: marginflow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from marginflow._reading import read_versioned
from marginflow.distributed import first
from marginflow.runs import write_atomically

_FILE = "bounds.json"
_FORMAT = 1
_AGAIN = "make it again with marginflow measure --certified"


@first
def save_bounds(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write ``bounds.json`` into a run directory, in place of an earlier one.

    Args:
        folder: of the run.
        content: what :func:`read_bounds` is to give back.

    Raises:
        StorageError: the file system refuses; the earlier one is then untouched.
        StorageError: the disk refused.
    """
    path = Path(folder) / _FILE
    whole = {"format_version": _FORMAT, **content}
    write_atomically(path, json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


@first
def read_bounds(folder: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """The content of ``bounds.json`` in a run directory, or None where there is none.

    Args:
        folder: of the run.

    Raises:
        RunError: a damaged file, or one of a newer format.
    """
    return read_versioned(Path(folder) / _FILE, _FORMAT, again=_AGAIN)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers, their names and shapes.

    Args:
        model: only its weights and buffers count.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
