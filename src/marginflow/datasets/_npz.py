"""Data of the user's own, as NumPy's ``.npz``; loading never runs code."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marginflow._reading import open_file
from marginflow.datasets._dataset import Dataset
from marginflow.errors import DataError

_LARGEST = 8 * 2**30
_NAMES = ("x", "y", "x_test", "y_test", "bounds")


def load(file: str) -> Dataset:
    """Load the arrays ``x``, ``y`` and, where there, ``x_test``, ``y_test`` and ``bounds`` (2,).

    Shapes and labels are those of :class:`Dataset`; other arrays in the file are ignored.

    Raises:
        DataError: no such file, not an ``.npz`` file, damaged, more than 8 GiB of arrays, pickled
            objects among the named arrays (they are never loaded), ``x`` or ``y`` missing, one of
            ``x_test`` and ``y_test`` without the other, or arrays that are no valid data.
    """
    path = Path(os.path.expanduser(file))
    arrays = _arrays(path)
    for name, partner in (("x", "y"), ("y", "x"), ("x_test", "y_test"), ("y_test", "x_test")):
        if name not in arrays and (name in ("x", "y") or partner in arrays):
            raise DataError(
                f"{path}: expected an array {name!r}, got {', '.join(sorted(arrays)) or 'none'}; "
                "save with numpy.savez(path, x=..., y=...)"
            )
    test = None
    try:
        if "x_test" in arrays:
            test = Dataset(arrays["x_test"], arrays["y_test"])  # type: ignore[arg-type]
        return Dataset(
            arrays["x"],  # type: ignore[arg-type]
            arrays["y"],  # type: ignore[arg-type]
            bounds=arrays.get("bounds"),  # type: ignore[arg-type]
            test=test,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    name = ""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            # zipfile never yields more than a member declares, so the declared sizes bound memory.
            declared = sum(member.file_size for member in archive.infolist())
        if declared > _LARGEST:
            raise DataError(
                f"{path}: declares {declared / 2**30:.0f} GiB of arrays, more than the limit of "
                f"{_LARGEST // 2**30} GiB"
            )
        arrays = {}
        with open_file(path) as file, np.load(file, allow_pickle=False) as loaded:
            for name in _NAMES:
                if name in loaded:
                    arrays[name] = loaded[name]
    except DataError:
        raise
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path}: expected an .npz file ({error}); save with numpy.savez(path, x=..., y=...)"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # Whatever NumPy and zipfile may raise on a forged file: ValueError for pickled objects,
        # MemoryError for a header that lies, TokenError, OverflowError, zlib.error and more.
        raise DataError(
            f"{path}: the array {name!r} cannot be loaded ({error}); save plain numeric arrays "
            "with numpy.savez(path, x=..., y=...)"
        ) from None
    return arrays
