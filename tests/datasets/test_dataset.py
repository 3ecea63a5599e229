from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marginflow.datasets import Dataset
from marginflow.errors import DataError

X = torch.arange(12.0).reshape(4, 3)
BINARY = torch.tensor([1, -1, -1, 1])


def test_positional_form_and_properties():
    data = Dataset(torch.zeros(4, 2, 3, 5), torch.tensor([0, 2, 1, 0]))
    assert (data.n, data.shape, data.features, data.num_classes) == (4, (2, 3, 5), 30, 3)
    assert not data.binary
    assert data.classes == ("0", "1", "2")
    assert data.name == "custom"
    assert data.bounds is data.test is data.max_margin is data.max_margin_direction is None


@pytest.mark.parametrize(
    ("labels", "binary", "classes"),
    [
        ([1, -1, -1, 1], True, ("-1", "+1")),
        ([1, 1, 1, 1], True, ("-1", "+1")),
        ([-1, -1, -1, -1], True, ("-1", "+1")),
        ([0, 1, 1, 0], False, ("0", "1")),
        ([0, 0, 0, 0], False, ("0", "1")),  # a margin needs a rival class
        ([0, 0, 4, 1], False, ("0", "1", "2", "3", "4")),
    ],
)
def test_the_labels_decide_the_kind(labels, binary, classes):
    data = Dataset(X, labels)
    assert data.binary is binary
    assert data.classes == classes
    assert data.num_classes == len(classes)


@pytest.mark.parametrize(
    ("given_x", "dtype"),
    [
        (np.ones((2, 3)), torch.float64),
        (np.ones((2, 3), np.float32), torch.float32),
        (np.ones((2, 3), np.float16), torch.float32),
        (np.ones((2, 3), np.uint8), torch.float32),
        (np.ones((2, 3), ">f8"), torch.float64),
        (np.ones((2, 3), bool), torch.float32),
        (np.ones((2, 6))[:, ::-2], torch.float64),
        (torch.ones(2, 3, dtype=torch.bfloat16), torch.float32),
        (torch.ones(2, 3, dtype=torch.int64), torch.float32),
        (torch.ones(2, 3, requires_grad=True), torch.float32),
        ([[1, 1, 1], [1, 1, 1]], torch.float32),
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], torch.float32),
    ],
)
def test_whatever_torch_takes_becomes_a_float_tensor(given_x, dtype):
    data = Dataset(given_x, [1, -1])
    assert data.x.dtype == dtype
    assert not data.x.requires_grad
    assert torch.equal(data.x, torch.ones(2, 3, dtype=dtype))


def test_read_only_numpy_memory_is_taken_without_a_warning():
    x = np.ones((2, 3))
    x.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Dataset(x, [1, -1]).n == 2


@pytest.mark.parametrize(
    "labels",
    [
        [1.0, -1.0],
        np.array([1, -1], np.int8),
        np.array([[1.0], [-1.0]], np.float32),
        torch.tensor([1.0, -1.0], dtype=torch.float16),
    ],
)
def test_labels_become_int64_of_one_axis(labels):
    y = Dataset(X[:2], labels).y
    assert y.dtype == torch.int64
    assert y.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(0, 3), [], "at least one example"),
        (torch.zeros(3, 0), [1, 1, 1], "at least one example and one feature"),
        (torch.zeros(3), [1, 1, 1], r"reshape\(-1, 1\)"),
        (torch.tensor(1.0), [1], "shape"),
        (X, [1, -1], "4 examples and 2 labels"),
        (X, [[1, -1], [1, -1], [1, 1], [1, 1]], r"argmax\(1\)"),
        (X, 1, "expected shape"),
        (X, [1, -1, 0.5, 1], "whole numbers, got 0.5"),
        (X, [1, -1, math.nan, 1], "whole numbers, got nan"),
        (X, [1, -1, math.inf, 1], "labels from -1"),
        (X, [1, -1, 1e300, 1], "labels from -1"),
        (X, [1, -1, 0, 1], "write -1 as 0"),
        (X, [0, 1, -2, 1], "number the classes from 0"),
        (X, [-3, -3, 3, 3], "only -1 and"),
        (X, [0, 1, 2, 10**9], "class numbers"),
        (np.array([["a"], ["b"]]), [1, -1], "array of numbers"),
        (np.array([[None], [1]]), [1, -1], "array of numbers"),
        ([[1.0], [1.0, 2.0]], [1, -1], "array of numbers"),
        ("text", [1], "array of numbers"),
        (torch.zeros(2, 3, dtype=torch.complex64), [1, -1], "complex64"),
        (torch.zeros(2, 3).to_sparse(), [1, -1], "sparse"),
        (X, torch.zeros(4, dtype=torch.complex64), "complex64"),
    ],
)
def test_refuses_at_the_door(x, y, message):
    with pytest.raises(DataError, match=message):
        Dataset(x, y)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_counts_values_that_are_not_finite_and_names_the_first_example(bad):
    x = torch.zeros(5, 2, 2)
    x[3, 0, 1] = x[3, 1, 1] = x[4, 0, 0] = bad
    with pytest.raises(DataError, match=r"3 NaN or infinite values in 2 examples.* x\[3\]"):
        Dataset(x, [1, 1, 1, -1, -1])


def test_one_example_and_constant_features_are_data():
    assert Dataset([[0.0, 0.0]], [1]).n == 1
    assert Dataset(torch.zeros(3, 2), [1, -1, 1]).n == 3


def test_bounds():
    x = torch.tensor([[0.0], [1.0]])
    assert Dataset(x, [1, -1], bounds=(0, 1)).bounds == (0.0, 1.0)
    assert Dataset(x, [1, -1], bounds=np.array([-2.0, 2.0])).bounds == (-2.0, 2.0)
    with pytest.raises(DataError, match="within the bounds"):
        Dataset(x, [1, -1], bounds=(0, 0.999999))
    with pytest.raises(DataError, match="within the bounds"):
        Dataset(x, [1, -1], bounds=(1e-6, 1))
    for wrong in [(1, 0), (0, 0), (0, math.inf), (math.nan, 1)]:
        with pytest.raises(DataError, match="low < high"):
            Dataset(x, [1, -1], bounds=wrong)
    for wrong in [(0,), (0, 1, 2), 3, "ab"]:
        with pytest.raises(DataError, match="two numbers"):
            Dataset(x, [1, -1], bounds=wrong)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_rounding_to_float32_never_leaves_the_bounds(high, extent):
    low = high - extent - 1e-3
    x = torch.tensor([[low], [high]], dtype=torch.float64)
    data = Dataset(x, [1, -1], bounds=(low, high))
    assert data.to(torch.float32).bounds == (low, high)
    with pytest.raises(DataError, match="within the bounds"):
        Dataset(x, [1, -1], bounds=(low, math.nextafter(high, low)))


def test_class_names():
    assert Dataset(X, BINARY, classes=("cat", "dog")).classes == ("cat", "dog")
    assert Dataset(X, [0, 1, 1, 0], classes=("a", "b", "c")).num_classes == 3
    for labels, names in [(BINARY, ("a", "b", "c")), ([0, 1, 2, 0], ("a", "b")), (BINARY, "ab")]:
        with pytest.raises(DataError, match="classes: expected"):
            Dataset(X, labels, classes=names)


def test_the_test_set_takes_over_what_describes_the_data():
    test = Dataset(X.double() / 12, [1, 1, 1, 1])
    data = Dataset(X / 12, [0, 1, 2, 1], test=test, bounds=(0, 1), classes=["a", "b", "c"])
    assert data.test.x.dtype == torch.float32
    assert not data.test.binary  # although alone its labels say binary
    assert data.test.classes == ("a", "b", "c")
    assert data.test.bounds == (0.0, 1.0)
    assert data.to(torch.float64).test.x.dtype == torch.float64


def test_refuses_a_test_set_that_does_not_fit():
    with pytest.raises(DataError, match="shape"):
        Dataset(X, BINARY, test=Dataset(X[:, :2], BINARY))
    with pytest.raises(DataError, match="with the test set's"):
        Dataset(X, BINARY, test=Dataset(X, [0, 1, 2, 1]))
    with pytest.raises(DataError, match="test: x: expected features within"):
        Dataset(X, BINARY, bounds=(0, 11), test=Dataset(2 * X, BINARY))
    with pytest.raises(DataError, match="without a test set"):
        Dataset(X, BINARY, test=Dataset(X, BINARY, test=Dataset(X, BINARY)))
    with pytest.raises(DataError, match="expected a Dataset, got tuple"):
        Dataset(X, BINARY, test=(X, BINARY))


def test_known_margin_is_checked():
    with pytest.raises(ValueError, match="max_margin"):
        Dataset(X, BINARY, max_margin=0.0)
    with pytest.raises(DataError, match=r"\(3,\), got \(2,\)"):
        Dataset(X, BINARY, max_margin_direction=torch.ones(2))


def test_to_converts_everything_and_leaves_the_original():
    data = Dataset(X, BINARY, test=Dataset(X, BINARY), max_margin_direction=torch.ones(3))
    double = data.to(torch.float64)
    assert data.x.dtype == torch.float32
    assert double.x.dtype == double.test.x.dtype == torch.float64
    assert double.max_margin_direction.dtype == torch.float64
    assert double.y.dtype == torch.int64
    assert data.to(device="cpu").x.dtype == torch.float32
    with pytest.raises(DataError, match=r"float32 or torch\.float64"):
        data.to(torch.float16)


def test_subset_keeps_the_kind_and_drops_what_is_no_longer_true():
    data = Dataset(X, [0, 1, 2, 1], test=Dataset(X, [0, 1, 2, 1]), name="spec", max_margin=1.0)
    ones = data.subset([3, 1])
    assert torch.equal(ones.x, X[[3, 1]])
    assert ones.y.tolist() == [1, 1]
    assert not ones.binary
    assert ones.classes == data.classes
    assert (ones.name, ones.max_margin, ones.test.n) == ("custom", None, 4)
    assert torch.equal(data.subset(torch.tensor([True, False, False, True])).x, X[[0, 3]])
    assert torch.equal(data.subset(torch.tensor([2, 0], dtype=torch.uint8)).x, X[[2, 0]])
    assert torch.equal(data.subset(range(-2, 0)).x, X[2:])


@pytest.mark.parametrize(
    "indices", [[], [4], [-5], [0.5], [[0, 1]], [True, False], [False] * 4, "ab"]
)
def test_subset_refuses(indices):
    with pytest.raises(DataError, match="indices: expected"):
        Dataset(X, BINARY).subset(indices)


def test_fingerprint_is_of_the_values():
    data = Dataset(X, BINARY)
    mark = data.fingerprint()
    assert len(mark) == 64
    assert mark == data.to(torch.float64).fingerprint()
    assert mark == Dataset(X.T.contiguous().T, BINARY, name="other").fingerprint()
    changed = X.clone()
    changed[3, 2] += 1e-6
    others = [
        Dataset(changed, BINARY),
        Dataset(X, -BINARY),
        Dataset(X.reshape(4, 1, 3), BINARY),
        Dataset(X, BINARY, test=data),
        Dataset(X, BINARY, test=Dataset(changed, BINARY)),
    ]
    assert len({mark, *(other.fingerprint() for other in others)}) == 6


def test_fingerprint_hashes_every_row_of_large_data():
    x = torch.zeros(10_000, 1)
    marks = set()
    for row in (0, 4095, 4096, 9_999):
        one = x.clone()
        one[row] = 1
        marks.add(Dataset(one, torch.ones(10_000)).fingerprint())
    assert len(marks) == 4


def test_repr_is_short():
    data = Dataset(X, BINARY, test=Dataset(X, BINARY))
    assert repr(data) == "Dataset('custom', n=4, shape=(3,), classes=(-1, +1), test=4)"


def test_frozen():
    with pytest.raises(AttributeError):
        Dataset(X, BINARY).x = X
