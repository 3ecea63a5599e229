"""The choice of classes and examples that the image data sets share: ``3,8,n=1000``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from marginflow._checks import whole
from marginflow._specs import Spec, integer
from marginflow.errors import DataError, SpecificationError


def digits_of(spec: Spec) -> tuple[int, ...]:
    """Parse the digits of ``spec``, in the order given; none stands for all ten.

    Raises:
        SpecificationError: not a digit from 0 to 9, one given twice, or a single one.
    """
    digits = tuple(integer(arg, f"{spec.text!r}: digit") for arg in spec.args)
    for digit in digits:
        if not 0 <= digit <= 9:
            raise SpecificationError(f"{spec.text!r}: expected digits from 0 to 9, got {digit}")
        if digits.count(digit) > 1:
            raise SpecificationError(f"{spec.text!r}: the digit {digit} is given twice")
    if len(digits) == 1:
        raise SpecificationError(
            f"{spec.text!r}: expected two digits or more, or none for all ten, got one"
        )
    return digits or tuple(range(10))


def limit_of(spec: Spec) -> int | None:
    """Parse the option ``n``, how many training examples to keep.

    Raises:
        InputError: not a whole number of at least 1, or another option than ``n``.
    """
    n = spec.parsed({"n": integer}).get("n")
    return None if n is None else whole(f"{spec.text!r}: n", n, least=1)


def select(
    images: NDArray[Any], labels: NDArray[Any], digits: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Keep the images of ``digits`` and number their classes: −1, +1 for two, else 0, 1, …."""
    kept = np.isin(labels, digits)
    numbers = np.zeros(10, np.int64)
    numbers[list(digits)] = (-1, 1) if len(digits) == 2 else range(len(digits))
    return images[kept], numbers[labels[kept]]


def check_limit(limit: int | None, available: int, spec: Spec) -> None:
    """Refuse to keep more training examples than there are.

    Raises:
        DataError: ``limit`` exceeds ``available``.
    """
    if limit is not None and limit > available:
        raise DataError(
            f"{spec.text!r}: expected n of at most {available}, the number of training examples "
            f"of these classes, got {limit}"
        )
