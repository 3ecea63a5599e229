"""Runs whose files do not fit each other: an error that says so, whichever statement meets it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from marginflow.errors import MarginflowError, RunError
from marginflow.runs import Run

_SIGNS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def judged(run: Run) -> Iterator[None]:
    """Inside, what a damaged run directory makes go wrong is a :class:`RunError` that names it.

    Each number of a run is read by some statement; numbers that contradict each other (layers without
    norms, weights of other shapes) are met where they are used. The error has its cause with it.

    Args:
        run: whose files are read.

    Raises:
        RunError: a run on disk that cannot be judged.
    """
    try:
        yield
    except MarginflowError:
        raise
    except _SIGNS as error:
        if run.path is None or "allocate" in str(error):  # torch's way to say: out of memory
            raise
        reason = str(error).splitlines()[0] if str(error) else ""
        raise RunError(
            f"the run {run.name!r} cannot be judged: its files do not fit each other "
            f"({type(error).__name__}: {reason}); if nobody has changed them, please report it"
        ) from error
