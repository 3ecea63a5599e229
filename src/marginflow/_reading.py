"""Reading files that may come from a stranger: bounded, never waiting, and safe to print.

Only ordinary files are opened (a link to one counts): a pipe would keep the reader waiting, a device
may never end. JSON that is nested too deep, or holds numbers beyond 64 bits, is damaged. Characters
that steer a terminal, turn the direction of writing or are no Unicode become U+FFFD.

Source: marginflow.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from marginflow.errors import RunError

LARGEST_TEXT = 2**26
"""Bytes of a JSON file or of a line of one, at most."""

_LARGEST_TOML = 2**20
_DEEPEST = 64
_DIGITS = 20
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_ESCAPED = re.compile(
    r"\\(?:[bfr]|u(?:00[0189]|061|20[02]|206|[dD][89a-fA-F]|[fF]{3}))", re.IGNORECASE
)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open an ordinary file for reading, without ever waiting for it.

    Args:
        path: the file, or a link to it.

    Raises:
        OSError: there is none, it cannot be read, or it is a folder, a pipe, a socket or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is no ordinary file", str(path))


def read_file(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """The content of an ordinary file.

    Args:
        path: the file, or a link to it.
        most: bytes that it may have; None for any number.

    Raises:
        OSError: see :func:`open_file`; or the file is longer.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than {most:,}", str(path))
        return file.read() if most is None else file.read(most)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file, see :func:`parse_json`.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON, or none that is accepted.
    """
    return parse_json(read_file(path, LARGEST_TEXT))


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a TOML file, its text made :func:`printable`.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no TOML, longer than 1 MiB or nested too deep.
    """
    import tomllib

    text = read_file(path, _LARGEST_TOML).decode("utf-8")
    try:
        content = tomllib.loads(text)
        return dict(clean(content))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_json(content: bytes | str) -> Any:
    """JSON as a value whose text can be printed, at most 64 levels deep, with numbers of 64 bits.

    Args:
        content: UTF-8, or text.

    Raises:
        ValueError: anything else.
    """
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    if text.count("[") + text.count("{") > _DEEPEST:
        _check_depth(text)
    value = json.loads(text, parse_int=_whole)
    return clean(value) if _UNPRINTABLE.search(text) or _ESCAPED.search(text) else value


def _check_depth(text: str) -> None:
    """Refuse what is nested deeper than anything of ours, before a recursion meets it.

    Brackets inside of strings do not count.
    """
    depth, inside = 0, False
    for token in re.finditer(r'\\.|["\[\]{}]', text, re.DOTALL):
        mark = token[0]
        if mark == '"':
            inside = not inside
        elif not inside and mark in "[{":
            depth += 1
            if depth > _DEEPEST:
                raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
        elif not inside and mark in "]}":
            depth -= 1


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def clean(value: Any) -> Any:
    """``value``, with the text in its mappings and lists made :func:`printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {clean(key): clean(entry) for key, entry in value.items()}
    return [clean(entry) for entry in value] if isinstance(value, list) else value


def printable(text: str) -> str:
    """``text`` without characters that would steer a terminal or turn the direction of writing.

    Args:
        text: of any origin; newlines and tabs stay.
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def read_versioned(path: Path, newest: int, *, again: str = "") -> dict[str, Any] | None:
    """The content of a JSON file that says its ``format_version``; None where there is no such file.

    Args:
        path: the file.
        newest: the format that this version writes.
        again: how to make the file again, for the message.

    Raises:
        RunError: a damaged file, or one of a newer format.
    """
    advice = f"; {again}" if again else ""
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror or error}{advice}") from None
    except ValueError as error:
        raise RunError(f"{str(path)!r} is damaged: {error}{advice}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, bool) or not isinstance(version, int):
        raise RunError(f"{str(path)!r} is damaged: it has no format_version{advice}")
    if version > newest:
        raise RunError(
            f"{str(path)!r} has format {version}; this marginflow reads up to {newest}: update it"
        )
    return dict(content)
