"""NaN and infinity in what a caller gives: examples and weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marginflow.errors import DataError


def finite_examples(name: str, x: Tensor) -> None:
    """Refuse NaN and infinity in examples (n, …).

    Args:
        name: of the argument.
        x: examples; none is fine.

    Raises:
        DataError: with their number and the first such example.
    """
    # What is no dense tensor is refused by the caller's other checks, in their words.
    if not isinstance(x, Tensor) or x.layout != torch.strided or _finite(x):
        return
    bad = (~x.isfinite()).reshape(len(x), -1).sum(1)
    examples = bad.nonzero().flatten().tolist()
    raise DataError(
        f"{name}: expected finite numbers, got {int(bad.sum())} NaN or infinite values in "
        f"{len(examples)} examples, the first of them {name}[{examples[0]}]; "
        "remove those examples or fill the values in"
    )


def _finite(x: Tensor) -> bool:
    """Whether all numbers are finite, in one pass without a mask as large as x."""
    if not x.numel():
        return True
    if x.is_complex():
        return bool(torch.isfinite(x).all())
    # NaN and infinity survive in the extremes.
    low, high = x.aminmax()
    return bool(low.isfinite() & high.isfinite())


def spoilt(model: nn.Module) -> str | None:
    """The name of a parameter that is not finite or of a buffer with NaN, or None.

    A buffer may hold infinity on purpose, as a mask does.

    Args:
        model: any module.
    """
    for name, weight in model.named_parameters():
        if not _finite(weight.detach()):
            return name
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            return name
    return None


def broken_examples(outputs: Tensor, rows: Tensor | None) -> tuple[str, str]:
    """Which examples have outputs that are not finite, and whether NaN or infinite."""
    flat = outputs.reshape(len(outputs), -1)
    wrong = torch.nonzero(~torch.isfinite(flat).all(dim=1)).flatten()
    first = int(wrong[0])
    kind = "NaN" if bool(torch.isnan(flat).any()) else "infinite"
    name = first if rows is None else int(rows[first])
    count = "" if len(wrong) == 1 else f" and {len(wrong) - 1} more of the {len(flat)} in the batch"
    return f"example {name}{count}", kind
