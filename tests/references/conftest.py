"""Data for the oracles' tests."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _separable(seed: int, n: int, d: int, push: float = 0.3) -> tuple[Array, Array]:
    """Normal inputs, moved away from a random hyperplane through the origin."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    normal = rng.normal(size=d)
    y = np.where(x @ normal > 0.0, 1.0, -1.0)
    return x + push * y[:, None] * normal, y


@pytest.fixture
def separable() -> Callable[..., tuple[Array, Array]]:
    return _separable


def _idx(path: Path) -> NDArray[np.uint8]:
    data = gzip.decompress(path.read_bytes())
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


@pytest.fixture(scope="session")
def mnist(mnist_dir: Path) -> Callable[[int, int], tuple[Array, Array]]:
    """Two digits of MNIST's training set: pixels in [0, 1], labels +1 for the first digit."""
    folder = mnist_dir / "mnist"
    images = _idx(folder / "train-images-idx3-ubyte.gz").reshape(-1, 784)
    digits = _idx(folder / "train-labels-idx1-ubyte.gz")

    def pair(first: int, second: int) -> tuple[Array, Array]:
        chosen = (digits == first) | (digits == second)
        return images[chosen] / 255.0, np.where(digits[chosen] == first, 1.0, -1.0)

    return pair
