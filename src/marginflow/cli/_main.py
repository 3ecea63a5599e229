"""Entry point: every error becomes one clear message and an exit code.

0 success, 1 training diverged, 2 wrong or missing input, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from marginflow.cli._app import app
from marginflow.errors import DivergedError, MarginflowError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments`` (by default those of the process); the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words, prog_name="marginflow", standalone_mode=False)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MarginflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more to say.
        sys.stderr.close()
        return 0
    except MemoryError:
        print("error: out of memory; try a smaller --batch-size", file=sys.stderr)
        return 2
    except Exception as error:
        # The parser's own errors differ between versions of typer; all can format themselves.
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()}", file=sys.stderr)
        print("try: marginflow --help, or marginflow COMMAND --help", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0
