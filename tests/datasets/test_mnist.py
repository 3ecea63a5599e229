from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import logging
import struct
import threading
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from marginflow.datasets import _mnist, load
from marginflow.errors import DataError

STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def write(folder: Path, *, plain: bool = False, **changes: bytes) -> Path:
    """A tiny MNIST: 20 training and 10 test images, the image of label k filled with k + 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, labels in {"train": list(range(10)) * 2, "t10k": list(range(10))}.items():
        pixels = np.repeat(np.array(labels, np.uint8) + 1, 28 * 28).tobytes()
        images = struct.pack(">4I", 0x803, len(labels), 28, 28) + pixels
        for stem, content in zip(
            STEMS[split],
            (images, struct.pack(">2I", 0x801, len(labels)) + bytes(labels)),
            strict=True,
        ):
            content = changes.get(stem.replace("-", "_"), content)
            if plain:
                (folder / stem).write_bytes(content)
            else:
                (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
    return folder


@functools.cache
def real(spec: str, folder: Path):
    return load(spec, data_dir=folder)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may reach for the network or the user's cache unless it says so."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a download was tried: {args}")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    monkeypatch.delenv("MARGINFLOW_DATA", raising=False)


def test_counts_of_3_against_8(mnist_dir):
    data = real("mnist:3,8", mnist_dir)
    assert (data.n, data.test.n) == (11982, 1984)
    assert data.x.shape == (11982, 1, 28, 28)
    assert data.x.dtype == torch.float32
    assert data.binary
    assert data.classes == ("3", "8")
    assert data.bounds == (0.0, 1.0)
    # LeCun's counts: 6131 threes and 5851 eights, in the test files 1010 and 974.
    assert ((data.y == -1).sum(), (data.y == 1).sum()) == (6131, 5851)
    assert ((data.test.y == -1).sum(), (data.test.y == 1).sum()) == (1010, 974)


def test_counts_of_0_against_1(mnist_dir):
    assert real("mnist:0,1", mnist_dir).n == 12665


def test_pixels_and_labels_against_the_bytes_of_the_files(mnist_dir):
    """The oracle takes the files apart by hand: 16 and 8 bytes of header, then the bytes."""
    images = gzip.decompress((mnist_dir / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((mnist_dir / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    rows = [i for i, label in enumerate(labels) if label in (7, 0, 4)]
    data = real("mnist:7,0,4", mnist_dir).test
    assert data.y.tolist() == [(7, 0, 4).index(labels[i]) for i in rows]
    assert data.classes == ("7", "0", "4")
    for k in range(0, len(rows), 97):
        image = images[784 * rows[k] : 784 * (rows[k] + 1)]
        expected = np.array([np.float32(byte / 255) for byte in image])
        assert np.array_equal(data.x[k].numpy().reshape(-1), expected)


def test_first_n_of_the_chosen_classes(mnist_dir):
    whole, part = real("mnist:3,8", mnist_dir), real("mnist:3,8,n=100", mnist_dir)
    assert torch.equal(part.x, whole.x[:100])
    assert torch.equal(part.y, whole.y[:100])
    assert part.test.n == 1984
    with pytest.raises(DataError, match=r"at most 11982.* got 11983"):
        load("mnist:3,8,n=11983", data_dir=mnist_dir)


def test_order_of_the_digits_decides_the_sign(tmp_path):
    write(tmp_path)
    there, back = load("mnist:3,8", data_dir=tmp_path), load("mnist:8,3", data_dir=tmp_path)
    assert there.y.tolist() == [-1, 1, -1, 1]
    assert back.y.tolist() == [1, -1, 1, -1]
    assert back.classes == ("8", "3")
    assert torch.equal(there.x, back.x)


def test_all_ten(tmp_path):
    data = load("mnist", data_dir=write(tmp_path))
    assert data.y.tolist() == list(range(10)) * 2
    assert data.classes == tuple("0123456789")
    assert torch.equal(data.x[:, 0, 5, 5], (data.y + 1).double().div(255).float())


@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("plain", [False, True])
def test_where_the_files_may_lie(tmp_path, folder, plain):
    write(tmp_path / folder, plain=plain)
    assert load("mnist", data_dir=str(tmp_path)).n == 20


def test_environment_variable_and_its_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("MARGINFLOW_DATA", str(write(tmp_path / "there")))
    assert load("mnist").n == 20
    with pytest.raises(DataError, match="elsewhere"):
        load("mnist", data_dir=tmp_path / "elsewhere")


def test_missing_files_are_named_and_not_downloaded(tmp_path):
    with pytest.raises(DataError, match=r"missing: train-images.*t10k-labels.*MARGINFLOW_DATA"):
        load("mnist", data_dir=tmp_path)
    write(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"missing: t10k-labels-idx1-ubyte\. "):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("stem", "content", "message"),
    [
        ("train_images_idx3_ubyte", struct.pack(">4I", 0x803, 1, 28, 28) + bytes(784), "20 labels"),
        ("train_images_idx3_ubyte", struct.pack(">4I", 0x803, 20, 2, 2) + bytes(80), "28 x 28"),
        ("t10k_labels_idx1_ubyte", struct.pack(">2I", 0x801, 10) + bytes([10] * 10), "got 10"),
        ("t10k_labels_idx1_ubyte", b"<html>404</html>", "begins with 00 00 08 01"),
        ("t10k_labels_idx1_ubyte", struct.pack(">2I", 0x801, 10) + bytes(10), "at least one"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, stem, content, message):
    write(tmp_path, **{stem: content})
    with pytest.raises(DataError, match=message):
        load("mnist:1,2", data_dir=tmp_path)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror on this machine that serves the tiny MNIST, its hashes pinned, an empty cache."""
    monkeypatch.undo()  # lift _offline
    folder = write(tmp_path / "served")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=folder, **kwargs)

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hashes = {
        stem: hashlib.sha256((folder / f"{stem}.gz").read_bytes()).hexdigest()
        for stem in _mnist._SHA256
    }
    monkeypatch.delenv("MARGINFLOW_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(_mnist, "_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(_mnist, "_SHA256", hashes)
    yield asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_downloads_once_and_silently(mirror, tmp_path, monkeypatch):
    records, handler = [], logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(pooch.get_logger(), "handlers", [handler])
    level = pooch.get_logger().level
    assert load("mnist:3,8").n == 4
    assert records == []
    assert pooch.get_logger().level == level
    assert len(mirror) == 4
    assert sorted(path.name for path in (tmp_path / "cache/marginflow/mnist").iterdir()) == sorted(
        f"{stem}.gz" for stem in _mnist._SHA256
    )
    assert load("mnist:0,1").n == 4
    assert len(mirror) == 4


def test_refuses_a_download_of_another_hash(mirror, tmp_path, monkeypatch):
    wrong = {**_mnist._SHA256, "t10k-labels-idx1-ubyte": "0" * 64}
    monkeypatch.setattr(_mnist, "_SHA256", wrong)
    with pytest.raises(DataError, match=r"hash.*--data-dir.*MARGINFLOW_DATA"):
        load("mnist:3,8")
    assert not (tmp_path / "cache/marginflow/mnist/t10k-labels-idx1-ubyte.gz").exists()


def test_a_failed_download_comes_with_advice(mirror, monkeypatch):
    monkeypatch.setattr(_mnist, "_URL", "http://127.0.0.1:9/")  # the discard port: refused
    with pytest.raises(DataError, match=r"cannot be downloaded.*--data-dir.*MARGINFLOW_DATA"):
        load("mnist:3,8")
    monkeypatch.setattr(_mnist, "_URL", "http://[bad")
    with pytest.raises(DataError, match="cannot be downloaded"):
        load("mnist:3,8")


def test_an_empty_variable_counts_as_unset(mirror, monkeypatch):
    monkeypatch.setenv("MARGINFLOW_DATA", "")
    assert load("mnist:3,8").n == 4
