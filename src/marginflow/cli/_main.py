"""Entry point: every error becomes one clear message and an exit code.

0 success, 1 training diverged, 2 wrong or missing input, 130 interrupted by Ctrl-C.

Source: marginflow.
"""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Sequence

from marginflow.cli._app import app
from marginflow.errors import DivergedError, MarginflowError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments`` (by default those of the process); the exit code.

    Args:
        arguments: the words after ``marginflow``; None takes those of the process.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words, prog_name="marginflow", standalone_mode=False)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except DivergedError as error:
        _complain(error)
        return 1
    except MarginflowError as error:
        _complain(error)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more to say.
        sys.stderr.close()
        return 0
    except MemoryError:
        _complain("out of memory; try a smaller --batch-size")
        return 2
    except Exception as error:
        # The parser's own errors differ between versions of typer; all can format themselves.
        if not hasattr(error, "format_message"):
            raise
        _complain(error.format_message())
        print("try: marginflow --help, or marginflow COMMAND --help", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _complain(message: object) -> None:
    """Print an error; on a terminal its lines break between words."""
    text = f"error: {message}"
    if sys.stderr.isatty():
        text = textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)
    print(text, file=sys.stderr)
