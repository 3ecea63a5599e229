from __future__ import annotations

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from marginflow.datasets import load
from marginflow.errors import DataError

X = np.arange(12.0).reshape(4, 3)
Y = np.array([1, -1, -1, 1])


class Evil:
    """Pickled data that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_arrays_arrive(tmp_path):
    spec = save(tmp_path / "a.npz", x=X, y=Y, x_test=X[:2] / 2, y_test=Y[:2], bounds=[0, 11])
    data = load(spec)
    assert np.array_equal(data.x, X)
    assert data.x.dtype == torch.float64
    assert data.y.tolist() == Y.tolist()
    assert np.array_equal(data.test.x, X[:2] / 2)
    assert data.test.y.tolist() == [1, -1]
    assert data.bounds == (0.0, 11.0)
    assert data.name == data.test.name == spec


def test_compressed_and_without_the_optional_arrays(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=X.astype(np.float32), y=Y, ignored=np.zeros(3))
    data = load(f"npz:{tmp_path / 'a.npz'}")
    assert data.x.dtype == torch.float32
    assert data.test is data.bounds is None


@pytest.mark.parametrize("name", ["a,b=c,d.npz", "with blank .npz", "a:b.npz", "ÄÖ.npz"])
def test_any_path_will_do(tmp_path, name):
    spec = save(tmp_path / name, x=X, y=Y)
    assert load(spec).name == spec


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a.npz", x=X, y=Y)
    assert load("npz:~/a.npz").n == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": Y}, "expected an array 'x', got y; save with"),
        ({"x": X}, "expected an array 'y'"),
        ({"X": X, "Y": Y}, "expected an array 'x', got none"),
        ({"x": X, "y": Y, "x_test": X}, "expected an array 'y_test'"),
        ({"x": X, "y": Y, "y_test": Y}, "expected an array 'x_test'"),
        ({"x": X, "y": Y[:3]}, "a.npz: expected one label"),
        ({"x": X, "y": np.array(["a", "b", "c", "d"])}, "a.npz: y: expected an array of numbers"),
        ({"x": X, "y": Y, "bounds": [0, 1]}, "within the bounds"),
        ({"x": X, "y": Y, "bounds": [0]}, "two numbers"),
        ({"x": X, "y": Y, "bounds": 5}, "two numbers"),
        ({"x": X, "y": Y, "x_test": X[:, :2], "y_test": Y}, "shape"),
    ],
)
def test_refuses_unsuitable_arrays(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        load(save(tmp_path / "a.npz", **arrays))


def test_refuses_what_is_no_npz(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load(f"npz:{path}")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load(f"npz:{tmp_path}")
    buffer = io.BytesIO()
    np.save(buffer, X)
    for content in (b"", b"x,y\n1,2\n", buffer.getvalue()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npz: expected an \.npz file"):
            load(f"npz:{path}")


@pytest.mark.parametrize("name", ["x", "y", "x_test", "bounds"])
def test_pickled_arrays_are_refused_and_never_run(tmp_path, name):
    trace, path = tmp_path / "trace", tmp_path / "a.npz"
    arrays = {"x": X, "y": Y, "x_test": X, "y_test": Y, "bounds": np.array([0, 11])}
    arrays[name] = np.array([Evil(trace)], dtype=object)
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=f"array {name!r} cannot be loaded .*allow_pickle"):
        load(f"npz:{path}")
    assert not trace.exists()
    with np.load(path, allow_pickle=True) as careless:  # the trap is armed
        careless[name][0].close()
    assert trace.exists()


def test_a_bare_pickle_is_refused_and_never_run(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(DataError, match=r"expected an \.npz file"):
        load(f"npz:{path}")
    assert not trace.exists()


def test_bytes_in_place_of_an_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x", b"raw")
        archive.writestr("y", b"raw")
    with pytest.raises(DataError, match="x: expected an array of numbers"):
        load(f"npz:{tmp_path / 'a.npz'}")


def test_declared_size_is_limited_before_anything_is_read(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=X, y=Y, z=X)
    content = bytearray(path.read_bytes())
    place = 0
    for _ in range(3):  # forge each uncompressed size in the central directory: 3 × 4 GiB
        place = content.index(b"PK\x01\x02", place) + 4
        struct.pack_into("<I", content, place + 20, 0xFFFFFFF0)
    path.write_bytes(content)
    with pytest.raises(DataError, match="declares 12 GiB of arrays, more than the limit of 8 GiB"):
        load(f"npz:{path}")


HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': %s}\n"


@pytest.mark.parametrize(
    "header",
    [
        HEADER % f"({10**13}, 3)",  # MemoryError in NumPy
        HEADER % f"({10**30},)",  # OverflowError
        HEADER % "(-1,)",
        HEADER % "(11,)",  # one value more than there is
        "((((",  # TokenError
        "\0",
        "[]",
    ],
)
def test_forged_headers_are_refused(tmp_path, header):
    path = tmp_path / "a.npz"
    member = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(80)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", member)
        archive.writestr("y.npy", member)
    with pytest.raises(DataError, match="array 'x' cannot be loaded"):
        load(f"npz:{path}")


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x40])
def test_every_flipped_byte_is_noticed_or_harmless(tmp_path, flip):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=X, y=Y)
    original = load(f"npz:{path}").fingerprint()
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        try:
            assert load(f"npz:{path}").fingerprint() == original
        except DataError:
            refused += 1
    assert refused > len(whole) / 2


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=X, y=Y)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.npz: "):
            load(f"npz:{path}")
