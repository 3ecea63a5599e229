"""Writing files so that a reader sees the old or the new content, never a part of it.

Source: marginflow.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from marginflow.errors import StorageError


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into a :class:`StorageError` that names ``path``.

    Args:
        path: what is being written, for the message.

    Raises:
        StorageError: the file system refused.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` to ``path``: temporary file, fsync, rename, fsync of the folder.

    Args:
        path: the file.
        content: text (as UTF-8) or bytes.

    Raises:
        StorageError: the disk is full or read-only, …; an old file is then untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    with storing(path):
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for ``folder``, and keep others out inside it.

    Args:
        folder: the folder.
    """
    with storing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Not every network file system has locks; there the caller goes on without.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> int | None:
    """Lock ``folder`` for this process by its file ``.lock``; the lock dies with the process.

    Args:
        folder: the folder.

    Returns:
        the descriptor, which releases the lock when it is closed; None if another process holds it.

    Raises:
        StorageError: the file system refuses.
    """
    with storing(folder):
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def append_durably(path: Path, lines: str) -> None:
    """Append one line, or several with newlines between, and fsync.

    Args:
        path: the file; made if it is not there.
        lines: without the last newline.

    Raises:
        StorageError: the disk is full or read-only; what was written in part is cut off again.
    """
    with storing(path), open(path, "ab") as file:
        end = file.tell()
        try:
            file.write(lines.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, end)
            raise


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
