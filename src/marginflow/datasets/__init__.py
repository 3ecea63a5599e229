"""Data sets: the checked container and the ways to load one.

==============================  ==================================================================
``mnist:3,8``                   MNIST, all ten classes or those named; ``n=1000`` keeps the first
``digits:3,8``                  scikit-learn's 8 × 8 digits, bundled, in the same manner
``separable:n=60,d=20``         synthetic, its maximum margin known; ``margin``, ``seed``, …
``npz:PATH``                    arrays ``x``, ``y`` and perhaps ``x_test``, ``y_test``, ``bounds``
==============================  ==================================================================
"""

from __future__ import annotations

import os
from dataclasses import replace

from marginflow._checks import unknown
from marginflow._specs import Spec, parse
from marginflow.datasets import _digits, _mnist, _npz, _separable
from marginflow.datasets._dataset import Dataset
from marginflow.datasets._distance import ClassDistance, class_distance
from marginflow.datasets._separable import separable
from marginflow.errors import SpecificationError

__all__ = ["ClassDistance", "Dataset", "class_distance", "load", "separable"]

_KIND = "data set"
_NAMES = ("digits", "mnist", "npz", "separable")


def load(spec: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load the data set that ``spec`` describes; its ``name`` is ``spec`` without needless blanks.

    Source: MNIST of LeCun et al. (1998), the digits of scikit-learn, marginflow's separable data.

    Args:
        spec: such as ``mnist:3,8``, ``digits:0,1,n=100``, ``separable:n=60,d=20,margin=0.1`` or
            ``npz:PATH``, where the path is all after the first colon.
        data_dir: where MNIST's files are, instead of ``$MARGINFLOW_DATA`` (the others need none).

    Raises:
        SpecificationError: ``spec`` is malformed or names something unknown.
        InputError: an option is out of range.
        DataError: files or arrays are missing or cannot be used.
        MissingDependencyError: the data need a package that is not installed.

    Examples:
        >>> import marginflow as mf
        >>> mf.load("separable:n=20,d=6,margin=0.3")
        Dataset('separable:n=20,d=6,margin=0.3', n=20, shape=(6,), classes=(-1, +1))
    """
    if isinstance(spec, str):
        # Before the grammar: a path may hold commas, blanks and equals signs.
        head, _, path = spec.partition(":")
        if head.strip().lower() == "npz":
            if not path:
                raise SpecificationError(f"{_KIND} {spec!r}: expected npz:PATH")
            return replace(_npz.load(path), name=f"npz:{path}")
    parsed = parse(spec, _KIND)
    match parsed.name:
        case "mnist":
            data = _mnist.load(parsed, data_dir)
        case "digits":
            data = _digits.load(parsed)
        case "separable":
            data = _separable.load(parsed)
        case name:
            raise unknown(_KIND, name, _NAMES)
    return replace(data, name=_tidy(parsed))


def _tidy(spec: Spec) -> str:
    parts = [*spec.args, *(f"{key}={value}" for key, value in spec.options.items())]
    return ":".join([spec.name, ",".join(parts)] if parts else [spec.name])
