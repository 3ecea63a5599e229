from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from marginflow import datasets
from marginflow.datasets import Dataset, load
from marginflow.errors import DataError, InputError, SpecificationError


def test_public_names():
    assert (
        datasets.__all__
        == sorted(datasets.__all__)
        == ["ClassDistance", "Dataset", "class_distance", "load", "separable"]
    )


@pytest.fixture(params=["mnist:3,8,n=50", "digits:3,8", "digits:1,2,3", "separable", "npz"])
def spec(request, tmp_path):
    if request.param == "npz":
        np.savez(tmp_path / "a.npz", x=np.eye(4), y=[1, -1, 1, -1])
        return f"npz:{tmp_path / 'a.npz'}"
    return request.param


def test_the_contract_of_every_data_set(spec, mnist_dir):
    data = load(spec, data_dir=mnist_dir)
    assert isinstance(data, Dataset)
    assert data.name == spec
    assert data.x.shape == (data.n, *data.shape)
    assert data.y.shape == (data.n,)
    assert data.y.dtype == torch.int64
    assert data.num_classes == len(data.classes)
    assert data.x.isfinite().all()
    assert data.x.is_contiguous()
    assert load(data.name, data_dir=mnist_dir).fingerprint() == data.fingerprint()
    if data.binary:
        assert set(data.y.tolist()) == {-1, 1}
    else:
        assert set(data.y.tolist()) == set(range(data.num_classes))
    if data.bounds is not None:
        assert data.x.min() >= data.bounds[0]
        assert data.x.max() <= data.bounds[1]
    if data.test is not None:
        assert data.test.shape == data.shape
        assert data.test.binary == data.binary
        assert data.test.name == data.name
        train = {row.numpy().tobytes() for row in data.x}
        assert not any(row.numpy().tobytes() in train for row in data.test.x)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (" digits : 3 , 8 , n = 5 ", "digits:3,8,n=5"),
        ("DIGITS:3,8", "digits:3,8"),
        ("separable:", "separable"),
        ("separable:n=9,d=3", "separable:n=9,d=3"),
    ],
)
def test_the_name_is_the_specification_tidied(spec, name):
    assert load(spec).name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("minst", "unknown data set 'minst'; did you mean 'mnist'"),
        ("cifar10:1,2", "valid: digits, mnist, npz, separable"),
        ("", "expected a specification"),
        (None, "expected a specification"),
        ("npz", "expected npz:PATH"),
        ("npz:", "expected npz:PATH"),
        ("digits:3", "expected two digits or more"),
        ("digits:3,3", "the digit 3 is given twice"),
        ("digits:3,10", "from 0 to 9, got 10"),
        ("digits:3,-1", "from 0 to 9, got -1"),
        ("digits:3,x", "expected a whole number, got 'x'"),
        ("digits:3,8,n=1.5", "n: expected a whole number"),
        ("digits:3,8,m=5", r"unknown option of 'digits' 'm' \(valid: n\)"),
        ("mnist:3", "expected two digits or more"),
        ("mnist:3,8,N=5", "unknown option of 'mnist'"),
        ("separable:60", "expected options such as n=60, got '60'"),
        ("separable:n=60,dim=20", "unknown option of 'separable' 'dim'"),
        ("separable:n=6.5", "n: expected a whole number"),
        ("separable:margin=1/0", "margin: expected a number"),
    ],
)
def test_malformed_specifications(spec, message):
    with pytest.raises(SpecificationError, match=message):
        load(spec)


@pytest.mark.parametrize("spec", ["digits:3,8,n=0", "digits:n=-1", "separable:n=0"])
def test_options_out_of_range(spec):
    with pytest.raises(InputError, match="n: expected a whole number of at least 1"):
        load(spec)


def test_more_examples_than_there_are():
    with pytest.raises(DataError, match="at most 286"):
        load("digits:3,8,n=10000")


def test_importing_loads_neither_scikit_learn_nor_pooch():
    code = (
        "import sys, marginflow.datasets as d; d.load('separable:n=4,d=2');"
        "print([m for m in ('sklearn', 'pooch', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
