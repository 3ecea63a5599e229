from __future__ import annotations

import gzip
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from marginflow.datasets import _idx
from marginflow.errors import DataError

VALUES = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)


def idx(values: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """The IDX bytes of ``values``, by the letter of the format; ``shape`` forges the header."""
    shape = values.shape if shape is None else shape
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    return header + values.tobytes()


def read(content: bytes, axes: int = 3, name: str = "file") -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return _idx.read(path, axes)


@settings(max_examples=60)
@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9)),
    st.booleans(),
    st.sampled_from(["file", "file.gz"]),  # the name says nothing
)
def test_round_trip(values, compressed, name):
    content = gzip.compress(idx(values)) if compressed else idx(values)
    result = read(content, values.ndim, name)
    assert result.dtype == np.uint8
    assert result.shape == values.shape
    assert np.array_equal(result, values)


def test_values_that_begin_like_gzip_do_not_confuse():
    values = np.array([0x1F, 0x8B], np.uint8)
    assert np.array_equal(read(idx(values), 1), values)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_truncation_is_refused(compressed):
    whole = gzip.compress(idx(VALUES)) if compressed else idx(VALUES)
    for length in range(len(whole)):
        with pytest.raises(DataError, match="file: "):
            read(whole[:length])


def test_every_flipped_byte_of_a_compressed_file_is_noticed_or_harmless():
    whole = bytearray(gzip.compress(idx(VALUES)))
    refused = 0
    for place in range(len(whole)):
        flipped = whole.copy()
        flipped[place] ^= 0xFF
        try:
            assert np.array_equal(read(bytes(flipped)), VALUES)
        except DataError:
            refused += 1
    assert refused >= len(whole) - 10  # only the ten bytes of gzip's header are free


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"not IDX at all", "got 6e 6f 74 20"),
        (idx(VALUES.reshape(-1)), "with 3 axes .* 00 00 08 03.* got 00 00 08 01"),
        (idx(VALUES).replace(b"\x08", b"\x0d", 1), "got 00 00 0d 03"),
        (idx(VALUES)[:9], "within its header"),
        (idx(VALUES)[:-1], "3 x 2 x 2 = 12 bytes of values, got only 11"),
        (idx(VALUES) + b"x", "12 bytes of values, got more"),
        (idx(VALUES, (3, 2, 1)), "6 bytes of values, got more"),
        (idx(VALUES, (4, 2, 2)), "16 bytes of values, got only 12"),
        (idx(VALUES, (2**32 - 1,) * 3), "limit of 2 GiB"),
        (idx(VALUES, (2**16, 2**16, 2**32 - 1)), "limit of 2 GiB"),
        (gzip.compress(idx(VALUES))[:-3], "ends too early"),
        (gzip.compress(idx(VALUES)) + b"trailing", "damaged"),
        (gzip.compress(idx(VALUES)) + gzip.compress(b"x"), "got more"),
        (b"\x1f\x8b\x08 garbage behind the magic", "damaged"),
    ],
    # Named by the message: gzip's header holds the time, so the bytes are no stable name.
    ids=lambda value: value if isinstance(value, str) else "bytes",
)
def test_bad_files_are_refused(content, message):
    with pytest.raises(DataError, match=message):
        read(content)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        _idx.read(tmp_path / "nowhere", 3)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        _idx.read(tmp_path, 3)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(idx(VALUES) + bytes(64 * 2**20), 1),  # more than declared: a bomb
        gzip.compress(idx(VALUES, (2**11, 2**10, 2**10)), 1),  # declares 2 GiB, holds 12 bytes
        idx(VALUES, (2**11, 2**10, 2**10)),
    ],
    ids=["bomb", "liar, compressed", "liar"],
)
def test_memory_follows_the_smaller_of_declaration_and_content(content):
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="got"):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
