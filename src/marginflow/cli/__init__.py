"""The command line: parse, call the API, print, exit code."""

from marginflow.cli._main import main

__all__ = ["main"]
