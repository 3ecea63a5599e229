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

from marginflow.distributed import first
from marginflow.errors import RunError
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
    path = Path(folder) / _FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{str(path)!r} is damaged: {error}; {_AGAIN}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise RunError(f"{str(path)!r} is damaged: it has no format_version; {_AGAIN}")
    if version > _FORMAT:
        raise RunError(
            f"{str(path)!r} has format {version}; this marginflow reads up to {_FORMAT}: update it"
        )
    return dict(content)


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
