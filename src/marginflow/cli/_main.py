"""Entry point: every error becomes one clear message and an exit code.

0 success, 1 training diverged, 2 wrong or missing input, 3 another process of a data-parallel job is
gone, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from marginflow._memory import is_out_of_memory
from marginflow.cli._app import app
from marginflow.errors import DivergedError, MarginflowError, ProcessLostError

if TYPE_CHECKING:
    from marginflow.distributed import Team

_PARALLEL = ("train", "maximize", "measure", "certify")
"""Commands that divide their work among the processes that torchrun has started."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments`` (by default those of the process); the exit code.

    Source: marginflow.

    Args:
        arguments: the words after ``marginflow``; None takes those of the process.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return _run(words, None)
    return _run_together(words)


def _run_together(words: Sequence[str]) -> int:
    """Run the command in each of the processes of torchrun; the first speaks for all."""
    from marginflow.distributed import join, launched

    if not launched():
        return _run(words, None)
    rank = int(os.environ["RANK"])
    command = next((word for word in words if not word.startswith("-")), "")
    if command not in _PARALLEL or {"-h", "--help"} & set(words):
        if rank:
            return 0
        if command:
            print(
                f"marginflow {command} works in one process; the others are idle", file=sys.stderr
            )
        return _run(words, None)
    if rank:
        logging.getLogger().setLevel(logging.ERROR)
    try:
        with join() as team, _silent(rank > 0):
            code = _run(words, team)
            if code:
                raise _EndedError(code)
            return code
    except _EndedError as ended:
        return ended.code
    except MarginflowError as error:
        _complain(error, None)
        return 3 if isinstance(error, ProcessLostError) else 2


class _EndedError(Exception):
    """The command ended with an exit code other than 0."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@contextlib.contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Inside, nothing is printed but errors: the first process speaks for all."""
    if not wanted:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _run(words: Sequence[str], team: Team | None) -> int:
    try:
        code = app(words, prog_name="marginflow", standalone_mode=False)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except DivergedError as error:
        _complain(error, team)
        return 1
    except ProcessLostError as error:
        _complain(error, team)
        return 3
    except MarginflowError as error:
        _complain(error, team)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more to say.
        sys.stderr.close()
        return 0
    except Exception as error:
        if is_out_of_memory(error):
            _complain("out of memory; use fewer examples or a smaller --batch-size", team, error)
            return 2
        # The parser's own errors differ between versions of typer; all can format themselves.
        if not hasattr(error, "format_message"):
            raise
        _complain(_of_parser(error), team, error)
        print("try: marginflow --help, or marginflow COMMAND --help", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _of_parser(error: Any) -> str:
    """What the parser has to say; of a value that is no number, what was expected and what was given."""
    message = str(error.format_message())
    cause = error.__cause__ or error.__context__
    given = cause.errors() if hasattr(cause, "errors") else []
    name = next(iter(getattr(getattr(error, "param", None), "opts", ())), None)
    if not given or name is None or "input" not in given[0]:
        return message
    kind = str(given[0].get("type"))
    expected = {"int": "a whole number", "float": "a number"}.get(kind.partition("_")[0])
    return (
        message if expected is None else f"{name}: expected {expected}, got {given[0]['input']!r}"
    )


def _complain(message: object, team: Team | None, error: BaseException | None = None) -> None:
    """Print an error, once for all processes; on a terminal its lines break between words."""
    # A name from the file system may hold what no encoding has.
    text = f"error: {message}".encode(errors="backslashreplace").decode()
    if team is not None:
        cause = error or message
        if isinstance(cause, BaseException):
            team.leave_word(cause)
            if team.rank and team.said_by_first(cause):
                return
        if team.rank:
            text = f"process {team.rank}: {text}"
    place = sys.stderr if team is None or team.rank == 0 else sys.__stderr__ or sys.stderr
    if place.isatty():
        text = textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)
    print(text, file=place)
