"""What :class:`~marginflow.datasets.Dataset` asks of its tensors, labels, names and bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marginflow._finite import finite_examples
from marginflow.errors import DataError

_MAX_CLASSES = 65536  # beyond this the labels are surely not class indices


def tensor(value: Any, what: str) -> Tensor:
    """``value`` as a dense, real tensor outside the autograd graph."""
    if not isinstance(value, Tensor) and hasattr(value, "__array__"):
        array = np.asarray(value)
        # torch refuses foreign byte orders and negative strides, and warns of read-only memory.
        native = array.dtype.newbyteorder("=")
        value = np.require(array, native, ["C", "W"]) if array.dtype.kind in "biuf" else array
    try:
        result = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{what}: expected an array of numbers ({error})") from None
    if result.layout != torch.strided or result.is_complex():
        raise DataError(
            f"{what}: expected dense real numbers, got {result.dtype} stored as {result.layout}"
        )
    return result


def features(value: Any) -> Tensor:
    """``value`` as finite float32 or float64 of shape (n, ...), n and the rest not empty."""
    x = tensor(value, "x")
    if x.ndim < 2:
        raise DataError(
            f"x: expected shape (n, features ...), got {tuple(x.shape)}; "
            "make a column of one feature with x.reshape(-1, 1)"
        )
    if x.numel() == 0:
        raise DataError(f"x: expected at least one example and one feature, got {tuple(x.shape)}")
    if not x.is_floating_point():
        x = x.to(torch.get_default_dtype())
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    finite_examples("x", x)
    return x


def labels(value: Any, n: int) -> Tensor:
    """``value`` as ``n`` whole numbers, of shape (n,) and type int64."""
    y = tensor(value, "y")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y.flatten()
    if y.ndim != 1:
        hint = "; turn one-hot rows into labels with argmax(1)" if y.ndim == 2 else ""
        raise DataError(f"y: expected shape (n,), got {tuple(y.shape)}{hint}")
    if len(y) != n:
        raise DataError(
            f"expected one label for each example, got {n} examples and {len(y)} labels"
        )
    if y.is_floating_point():
        wrong = y != y.round()  # NaN differs from itself, infinity falls to the range check
        if wrong.any():
            raise DataError(
                f"y: expected whole numbers, got {float(y[wrong][0]):g}; labels are -1 and +1, or "
                "0 ... C-1 (regression targets cannot be used)"
            )
        y = y.double().clamp(-_MAX_CLASSES, _MAX_CLASSES)  # 1e300 and infinity have no int64
    return y.long()


def is_binary(labels: Tensor) -> bool:
    """Whether all ``labels`` are −1 or +1."""
    return bool((labels.abs() == 1).all())


def check_kind(labels: Tensor, binary: bool, what: str) -> None:
    """Refuse labels that are neither −1 and +1 nor class numbers, or not of the given kind."""
    low, high = int(labels.min()), int(labels.max())
    if binary and not is_binary(labels):
        raise DataError(f"{what}: expected labels -1 and +1, got labels from {low} to {high}")
    if not binary and (low < 0 or high >= _MAX_CLASSES):
        advice = "write -1 as 0, or leave the 0 out" if low == -1 else "number the classes from 0"
        raise DataError(
            f"{what}: expected only -1 and +1 (binary), or class numbers 0 ... C-1, "
            f"got labels from {low} to {high}; {advice}"
        )


def class_names(names: Sequence[str], binary: bool, highest: int) -> tuple[str, ...]:
    """``names``, or the labels themselves where there are none; at least two."""
    fewest = max(2, highest + 1)  # a single class 0 still has two outputs: a margin needs a rival
    if not names:
        return ("-1", "+1") if binary else tuple(map(str, range(fewest)))
    if isinstance(names, str) or (binary and len(names) != 2) or len(names) < fewest:
        needed = "2" if binary else f"at least {fewest}"
        raise DataError(f"classes: expected {needed} names, got {names!r}")
    return tuple(str(name) for name in names)


def bounds(bounds: Any, x: Tensor) -> tuple[float, float]:
    """``bounds`` as two finite numbers low < high, with all of ``x`` between them."""
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise DataError(f"bounds: expected two numbers (low, high), got {bounds!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(f"bounds: expected finite low < high, got ({low:g}, {high:g})")
    least, most = x.aminmax()
    # Compared in the precision of x: rounding to float32 may carry x and the bound up alike.
    floor, ceiling = torch.tensor([low, high], dtype=x.dtype, device=x.device)
    if least < floor or most > ceiling:
        raise DataError(
            f"x: expected features within the bounds [{low:g}, {high:g}], got values from "
            f"{least:g} to {most:g}; rescale x or give the true bounds"
        )
    return low, high
