"""MNIST (LeCun, Cortes and Burges): 28 × 28 handwritten digits, 60 000 and 10 000 of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from marginflow._checks import optional, place
from marginflow._specs import Spec
from marginflow.datasets import _classes, _idx
from marginflow.datasets._dataset import Dataset
from marginflow.errors import DataError

VARIABLE = "MARGINFLOW_DATA"
_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# SHA-256 of the compressed files as the mirror serves them (the original compression of 1998).
_SHA256 = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_FOLDERS = ("", "mnist", "MNIST/raw")  # the last is where torchvision puts them
# Divided in float64, then rounded once: one table entry per byte value instead of a large copy.
_GREY = (np.arange(256) / 255).astype(np.float32)


def load(spec: Spec, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load ``mnist``, ``mnist:3,8`` (binary: 3 is −1, 8 is +1) or ``mnist:0,1,2,n=1000``.

    ``x``: float32 of shape (n, 1, 28, 28), byte/255 in [0, 1]. Examples keep their order in the
    file; ``n`` keeps the first n training examples of the chosen classes. The files, compressed
    or not, are looked for in ``data_dir`` or else ``$MARGINFLOW_DATA``, there in the folder itself,
    ``mnist/`` and ``MNIST/raw/``. With neither given, they are downloaded once to the user's cache.

    Raises:
        DataError: files missing, damaged, or not downloadable; ``n`` exceeds what there is.
        InputError: bad digits or options.
    """
    digits, limit = _classes.digits_of(spec), _classes.limit_of(spec)
    folder = data_dir if data_dir is not None else os.environ.get(VARIABLE) or None
    files = (
        _download()
        if folder is None
        else _find(Path(os.path.expanduser(place("data_dir", folder))))
    )
    images, labels = _classes.select(*_split(files, "train"), digits)
    _classes.check_limit(limit, len(images), spec)
    test_images, test_labels = _classes.select(*_split(files, "t10k"), digits)
    return Dataset(
        _pixels(images[:limit]),
        torch.from_numpy(labels[:limit]),
        classes=tuple(map(str, digits)),
        bounds=(0.0, 1.0),
        test=Dataset(_pixels(test_images), torch.from_numpy(test_labels)),
    )


def _find(root: Path) -> dict[str, Path]:
    """Locate the four files, all in the first folder that holds them all."""
    missing = list(_SHA256)
    for folder in (root / name for name in _FOLDERS):
        # os.path.isfile, unlike Path.is_file, takes a folder without permission for empty.
        files = {
            stem: path
            for stem in _SHA256
            for path in (folder / f"{stem}.gz", folder / stem)  # the last one found wins: plain
            if os.path.isfile(path)
        }
        if len(files) == len(_SHA256):
            return files
        missing = min(missing, [stem for stem in _SHA256 if stem not in files], key=len)
    raise DataError(
        f"MNIST: expected {', '.join(_SHA256)} (each plain or .gz) in {root}, {root / 'mnist'} or "
        f"{root / 'MNIST' / 'raw'}; missing: {', '.join(missing)}. Put the files there or point "
        f"--data-dir (data_dir=, {VARIABLE}) to the folder that holds them"
    )


def _download() -> dict[str, Path]:
    """Fetch to the user's cache those of the four files that are not there yet."""
    pooch = optional("pooch", "pooch", "downloading MNIST")
    folder = pooch.os_cache("marginflow") / "mnist"
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # pooch announces each file on stderr
    try:
        return {
            stem: Path(pooch.retrieve(f"{_URL}{stem}.gz", f"sha256:{sha256}", f"{stem}.gz", folder))
            for stem, sha256 in _SHA256.items()
        }
    except (OSError, ValueError) as error:  # no network, a read-only cache, another hash
        raise DataError(
            f"MNIST: cannot be downloaded from {_URL} to {folder}: {error}. Fetch the four files "
            f"elsewhere and name their folder with --data-dir (data_dir=) or {VARIABLE}"
        ) from error
    finally:
        logger.setLevel(level)


def _split(files: dict[str, Path], split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images_path = files[f"{split}-images-idx3-ubyte"]
    labels_path = files[f"{split}-labels-idx1-ubyte"]
    images, labels = _idx.read(images_path, 3), _idx.read(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_path}: expected images of 28 x 28, got {images.shape[1:]}")
    if len(images) != len(labels):
        raise DataError(
            f"{images_path}: expected as many images as labels, got {len(images)} images and "
            f"{len(labels)} labels in {labels_path}"
        )
    if labels.size and labels.max() > 9:
        raise DataError(f"{labels_path}: expected digits from 0 to 9, got {labels.max()}")
    return images, labels


def _pixels(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(_GREY[images]).unsqueeze(1)
