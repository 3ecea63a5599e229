from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from marginflow.datasets import load
from marginflow.errors import DataError


@pytest.mark.parametrize("digits", [(3, 8), (8, 3), (5, 0, 9), tuple(range(10))])
def test_against_scikit_learn_example_by_example(digits):
    bundle = load_digits()
    train, test = [], []
    chosen = [i for i, label in enumerate(bundle.target) if label in digits]
    for place, i in enumerate(chosen, start=1):
        (test if place % 5 == 0 else train).append(i)

    spec = f"digits:{','.join(map(str, digits))}" if len(digits) < 10 else "digits"
    data = load(spec)
    assert data.classes == tuple(map(str, digits))
    assert data.binary == (len(digits) == 2)
    for part, rows in ((data, train), (data.test, test)):
        assert part.x.dtype == torch.float32
        assert part.bounds == (0.0, 1.0)
        assert np.array_equal(part.x.numpy() * 16, bundle.images[rows][:, None])
        numbers = (-1, 1) if len(digits) == 2 else range(10)
        assert part.y.tolist() == [numbers[digits.index(bundle.target[i])] for i in rows]


def test_counts():
    data = load("digits")
    assert (data.n, data.test.n, data.shape) == (1438, 359, (1, 8, 8))


def test_first_n():
    whole, part = load("digits:3,8"), load("digits:3,8,n=17")
    assert torch.equal(part.x, whole.x[:17])
    assert torch.equal(part.test.x, whole.test.x)
    assert load(f"digits:3,8,n={whole.n}").n == whole.n
    with pytest.raises(DataError, match=f"at most {whole.n}.* got {whole.n + 1}"):
        load(f"digits:3,8,n={whole.n + 1}")


def test_a_short_selection_keeps_all_classes():
    data = load("digits:0,1,2,3,4,5,6,7,8,9,n=3")
    assert data.n == 3
    assert data.num_classes == 10
