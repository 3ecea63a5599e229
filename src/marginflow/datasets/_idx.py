"""IDX, the format of MNIST: bytes behind a header, plain or compressed with gzip.

offset 0     00 00 08 r         two zeros, the type (08: unsigned byte), the number of axes r
offset 4     r × uint32         length of each axis, most significant byte first
offset 4+4r  product × uint8    the values, last axis fastest
"""

from __future__ import annotations

import gzip
import math
import zlib
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from marginflow._reading import open_file
from marginflow.errors import DataError

_GZIP = b"\x1f\x8b"
_LARGEST = 2**31  # bytes; EMNIST, the largest of the family, declares 0.55e9
_CHUNK = 2**20


def read(path: Path, axes: int) -> NDArray[np.uint8]:
    """Read the ``axes``-dimensional bytes of the IDX file ``path``, as a read-only array.

    Whether the file is compressed is told by its first two bytes, not by its name. Never
    more than the declared body and one byte is decompressed.

    Raises:
        DataError: no such file, damaged or truncated compression, another magic number,
            more than 2 GiB declared, fewer or more bytes than declared.
    """
    try:
        with open_file(path) as raw:
            compressed = raw.read(2) == _GZIP
            raw.seek(0)
            if not compressed:
                return _parse(raw, path, axes)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _parse(stream, path, axes)
    except EOFError:
        raise DataError(f"{path}: the compressed file ends too early; download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the compressed file is damaged ({error}); download it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parse(stream: BinaryIO | BufferedIOBase, path: Path, axes: int) -> NDArray[np.uint8]:
    expected = bytes([0, 0, 8, axes])
    magic = _take(stream, 4)
    if magic != expected:
        raise DataError(
            f"{path}: expected an IDX file of bytes with {axes} axes (it begins with "
            f"{expected.hex(' ')}), got {magic.hex(' ') or 'an empty file'}"
        )
    header = _take(stream, 4 * axes)
    if len(header) < 4 * axes:
        raise DataError(f"{path}: the file ends within its header; download it again")
    shape = tuple(int(length) for length in np.frombuffer(header, ">u4"))
    # Python integers: the product of a forged header may exceed 64 bits.
    size = math.prod(shape)
    declared = " x ".join(map(str, shape))
    if size > _LARGEST:
        raise DataError(f"{path}: declares {declared} bytes, more than the limit of 2 GiB")
    body = _take(stream, size + 1)
    if len(body) != size:
        got = f"only {len(body)}; download it again" if len(body) < size else "more"
        raise DataError(f"{path}: expected {declared} = {size} bytes of values, got {got}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _take(stream: BinaryIO | BufferedIOBase, size: int) -> bytes:
    """At most ``size`` bytes; in chunks, so that memory follows the file and not its header."""
    chunks = []
    while size > 0 and (chunk := stream.read(min(size, _CHUNK))):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
