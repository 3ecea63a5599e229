"""The door of every oracle: data, exponents and budgets, checked once and made float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from marginflow._checks import real
from marginflow.errors import DataError, InputError

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def signed_examples(x: npt.ArrayLike, y: npt.ArrayLike) -> Array:
    """The signed examples ``z_i = y_i x_i``, shape (n, d), float64.

    A predictor w through the origin has margin ``<w, z_i>`` at example i, so nothing below
    needs x and y apart.

    Raises:
        DataError: x is not a finite (n, d) array with n, d >= 1, y is not of shape (n,), or a
            label is neither −1 nor +1.
    """
    inputs = _floats("x", x)
    labels = _floats("y", y)
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise DataError(
            f"x: expected shape (examples, features), got {inputs.shape}; flatten each example"
        )
    if labels.shape != inputs.shape[:1]:
        raise DataError(
            f"y: expected shape {inputs.shape[:1]}, one label a row, got {labels.shape}"
        )
    strange = np.flatnonzero(np.abs(labels) != 1.0)
    if strange.size:
        first = strange[0]
        raise DataError(
            f"y: expected labels −1 and +1, got {labels[first]:g} at position {first}; "
            "map the two classes to −1 and +1"
        )
    return labels[:, None] * inputs


def vector(name: str, value: npt.ArrayLike, size: int) -> Array:
    """``value`` as a finite, non-zero float64 vector of ``size`` numbers.

    Raises:
        DataError: another shape, NaN, infinity or all zeros.
    """
    array = _floats(name, value)
    if array.shape != (size,):
        raise DataError(f"{name}: expected shape ({size},), got {array.shape}")
    if not array.any():
        raise DataError(f"{name}: expected a non-zero vector, got zeros; give it a direction")
    return array


def exponent(p: float) -> float:
    """``p`` as a float in [1, ∞].

    Raises:
        InputError: not a number, NaN or below 1.
    """
    if isinstance(p, np.generic):
        p = p.item()
    if isinstance(p, float) and p == math.inf:
        return p
    return real("p", p, least=1.0)


def budget(eps: float) -> float:
    """``eps``, the radius of the perturbations in the units of x, as a float >= 0.

    Raises:
        InputError: not a finite number, or negative.
    """
    return real("eps", eps.item() if isinstance(eps, np.generic) else eps, least=0.0)


def depth_of(depth: int) -> int:
    """``depth``, the number of layers, as an integer >= 1.

    Raises:
        InputError: not a whole number, or below 1.
    """
    if isinstance(depth, bool) or not isinstance(depth, int | np.integer) or depth < 1:
        raise InputError(f"depth: expected a whole number of layers of at least 1, got {depth!r}")
    return int(depth)


def dual_exponent(p: float) -> float:
    """The q in [1, ∞] with 1/p + 1/q = 1."""
    if p == 1.0:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1.0)


def lp_norm(v: Array, p: float) -> float:
    """``‖v‖_p``, p in [1, ∞], without overflow or underflow of the powers."""
    largest = float(np.max(np.abs(v)))
    if largest == 0.0 or p == math.inf:
        return largest
    if p == 1.0:
        return float(np.sum(np.abs(v)))
    return largest * float(np.sum((np.abs(v) / largest) ** p) ** (1.0 / p))


def _floats(name: str, value: npt.ArrayLike) -> Array:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: expected an array of real numbers ({error})") from error
    if not np.isfinite(array).all():
        raise DataError(f"{name}: expected finite numbers, got NaN or infinity; clean the data")
    return array
