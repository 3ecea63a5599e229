"""Out of memory, of whichever library, as one error that says which batch size to try."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from marginflow.errors import OutOfMemoryError

_SIGNS = (
    "can't allocate memory",  # torch's allocator of the CPU
    "not enough memory",  # the same, on Windows
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "could not create a memory object",  # oneDNN
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_ASKED = re.compile(r"(?:allocate|allocate about) ([0-9.]+) (bytes|[KMGT]iB)")


@contextlib.contextmanager
def memory_watched(
    doing: str, batch_size: int | None, *, option: str = "batch_size", advice: str = ""
) -> Iterator[None]:
    """Turn an allocation that is refused inside into the error with the batch size to try.

    Args:
        doing: what is done, for the message.
        batch_size: the present number of examples at once; half of it is advised. None where it
            has no part in the memory.
        option: what sets the batch size.
        advice: what else to do.

    Raises:
        OutOfMemoryError: memory was refused.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _explained(error, doing, batch_size, option, advice) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library says by ``error`` that it got no memory."""
    # torch.OutOfMemoryError is a RuntimeError; its name is asked, for torch may not be loaded.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in str(error) for sign in _SIGNS)
    )


def _explained(
    error: BaseException, doing: str, batch_size: int | None, option: str, advice: str
) -> OutOfMemoryError:
    found = _ASKED.search(str(error))
    asked = None if found is None else int(float(found[1]) * _UNITS[found[2]])
    more = "" if asked is None else f", {_size(asked)} more were refused"
    fewer = batch_size // 2 if batch_size is not None and batch_size > 1 else None
    ways = [] if fewer is None else [f"try {option}={fewer}"]
    if advice:
        ways.append(advice)
    if not ways:
        ways = ["use a smaller network, or a machine with more memory"]
    at_once = "" if batch_size is None else f" with {batch_size} examples at once"
    return OutOfMemoryError(
        f"out of memory while {doing}{at_once}{more}; {', or '.join(ways)}", fewer, asked
    )


def _size(count: int) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.3g} {unit}"
    return f"{count} bytes"
