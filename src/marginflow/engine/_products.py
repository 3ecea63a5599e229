"""Which library multiplies float32 matrices on the CPU: a short timing, no loss of accuracy.

On some processors PyTorch's default (MKL) runs at half the speed of oneDNN, which
``torch.set_float32_matmul_precision("medium")`` selects. Where the processor has units of lower
precision (AMX) the same call uses them; the choice then stays with the default.

Source: marginflow.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Products = Literal["default", "onednn"]
"""``default``: as PyTorch is set. ``onednn``: float32 by oneDNN, with float32's accuracy."""

_GAIN = 1.25
_chosen: dict[tuple[object, ...], Products] = {}
_REPEATS = 12
_ROWS = 256


_repeated: contextvars.ContextVar[Products | None] = contextvars.ContextVar(
    "marginflow_products", default=None
)


@contextlib.contextmanager
def repeating(products: Products | None) -> Iterator[None]:
    """Inside, engines multiply with ``products`` without a timing: a run is repeated to the bit.

    Args:
        products: the library that the run recorded; None chooses as always.
    """
    token = _repeated.set(products)
    try:
        yield
    finally:
        _repeated.reset(token)


@contextlib.contextmanager
def multiplying(products: Products) -> Iterator[None]:
    """Multiply with ``products`` inside the block; PyTorch's own setting is put back.

    Args:
        products: the library, or None for the default.
    """
    if products == "default":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_products(weight: Tensor, rows: int) -> Products:
    """``onednn`` where it is a quarter faster at this size and as accurate, else ``default``.

    Times ``(rows, D) · (D, m)`` a dozen times with each, for the (m, D) of ``weight``: some
    milliseconds, once a process for each size and number of threads. A quarter, so that the choice
    (and with it the last bits of a training) does not hang on noise where both are alike.

    Args:
        weight: the largest matrix, (m, D).
        rows: examples in a batch.
    """
    repeated = _repeated.get()
    if repeated is not None:
        return repeated
    if (
        weight.device.type != "cpu"
        or weight.dtype != torch.float32
        or torch.get_float32_matmul_precision() != "highest"
        or not torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        or weight.numel() * rows < 1 << 20
    ):
        return "default"
    rows = min(rows, _ROWS)
    key = (tuple(weight.shape), rows, torch.get_num_threads())
    if key not in _chosen:
        _chosen[key] = _fastest(weight, rows)
    return _chosen[key]


def _fastest(weight: Tensor, rows: int) -> Products:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator)
    w = torch.randn(weight.shape, generator=generator)
    exact = x.double() @ w.double().mT
    out = torch.empty(exact.shape)
    seconds: dict[Products, float] = {}
    errors: dict[Products, float] = {}
    kinds: tuple[Products, ...] = ("default", "onednn")
    for _ in range(_REPEATS):
        for kind in kinds:
            with multiplying(kind):
                start = time.perf_counter()
                torch.mm(x, w.mT, out=out)
                took = time.perf_counter() - start
            seconds[kind] = min(took, seconds.get(kind, took))
            errors[kind] = float((out - exact).abs().max())
    # Orders of summation differ, so errors may differ by a factor; lower precision by hundreds.
    if errors["onednn"] > 4 * errors["default"]:
        return "default"
    return "onednn" if seconds["default"] > _GAIN * seconds["onednn"] else "default"
