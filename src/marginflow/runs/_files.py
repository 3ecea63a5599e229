"""Writing files so that a reader sees the old or the new content, never a part of it.

Source: marginflow.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from marginflow.errors import StorageError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What file systems without locks answer."""

_log = logging.getLogger("marginflow")


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

    What a process that was killed in the middle of the same has left is removed.

    Args:
        path: the file.
        content: text (as UTF-8) or bytes.

    Raises:
        StorageError: the disk is full or read-only, …; an old file is then untouched.
    """
    with storing(path):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
            remove_if_left(left)
    write_alone(path, content)


def write_alone(
    path: Path, content: bytes | str, *, outdated: Callable[[], None] | None = None
) -> None:
    """:func:`write_atomically` where a lock says that nobody else writes ``path``.

    It does not look through the folder, which may hold thousands of files.

    Args:
        path: the file.
        content: text (as UTF-8) or bytes.
        outdated: called when all is written but for the new name; removes what holds of the old content.

    Raises:
        StorageError: the disk is full or read-only, …; an old file is then untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    with storing(path):
        descriptor, temporary = _temporary(path)
        try:
            try:
                _write_all(descriptor, data)
                os.fsync(descriptor)
                os.fchmod(descriptor, 0o644)
                if outdated is not None:
                    outdated()
                # Still locked: from here on nobody takes it for what a killed process has left.
                os.replace(temporary, path)
            finally:
                os.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def remove_if_left(temporary: Path) -> None:
    """Remove a temporary file, or a folder that was put aside, unless a living process writes it.

    Args:
        temporary: a name that :func:`write_atomically` or :func:`put_aside` has made.

    Raises:
        StorageError: the file system refuses.
    """
    with storing(temporary):
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary)
            return
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            temporary.unlink(missing_ok=True)
            return
        try:
            if _locked(descriptor, else_=False):
                temporary.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def put_aside(path: Path) -> None:
    """Remove a file or a folder in one moment: a folder goes under another name first.

    A process that is killed meanwhile leaves the folder whole, or none of that name.

    Args:
        path: what is removed; it need not be there.

    Raises:
        StorageError: the file system refuses.
    """
    with storing(path):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        os.replace(path, aside)
        sync_folder(path.parent)
        shutil.rmtree(aside)


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside ``path``, locked as long as it is open."""
    while True:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        # Between these two lines another process may have taken it for a leftover.
        if _locked(descriptor, else_=True) and os.path.exists(temporary):
            return descriptor, temporary
        os.close(descriptor)


def _locked(descriptor: int, *, else_: bool) -> bool:
    """Whether the file could be locked; ``else_`` on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return else_
    return True


def _write_all(descriptor: int, data: bytes) -> None:
    """Write ``data`` without a buffer: what a full disk refused must not be tried again on closing."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def own_folder(folder: Path, *, make: bool = False) -> Path:
    """``folder``, which lies in a run directory and belongs to it: a link out of it is refused.

    Whoever writes or deletes in a run directory stays inside of it. The run directory itself may be
    reached through a link.

    Args:
        folder: the folder.
        make: make it, where it is not there.

    Raises:
        StorageError: a symbolic link, or the file system refuses.
    """
    if folder.is_symlink():
        raise StorageError(
            f"{str(folder)!r} is a symbolic link: expected a folder of the run's own, in which files are "
            "written and deleted; put the folder itself in its place"
        )
    if make:
        with storing(folder):
            folder.mkdir(exist_ok=True)
    return folder


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


class FolderLock:
    """A lock that this process holds on a folder, by its file ``.lock``.

    It dies with the process. A child that is forked (a worker of a data loader, say) does not keep it:
    descriptors are inherited, and with them the lock of a parent that was killed; so the child closes its
    own at once.

    Args:
        descriptor: of the locked file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held.add(self)

    def close(self) -> None:
        """Release the lock; twice, or in a forked child, it does nothing."""
        if self in _held:
            _held.remove(self)
            os.close(self._descriptor)


_held: set[FolderLock] = set()


def _forget_locks() -> None:
    """In a forked child: the locks are the parent's."""
    for lock in tuple(_held):
        lock.close()


os.register_at_fork(after_in_child=_forget_locks)


def lock_folder(folder: Path) -> FolderLock | None:
    """Lock ``folder`` for this process by its file ``.lock``; the lock dies with the process.

    On a file system without locks it is said, and the caller goes on.

    Args:
        folder: the folder.

    Returns:
        the lock, which :meth:`FolderLock.close` releases; None if it is held already.

    Raises:
        StorageError: the file system refuses.
    """
    with storing(folder):
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(folder / ".lock", flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            _log.warning(
                "the file system of %r has no locks: see to it yourself that one process writes there",
                str(folder),
            )
    return FolderLock(descriptor)


def append_durably(path: Path, lines: str) -> None:
    """Append one line, or several with newlines between, and fsync.

    A last line without its end, which a crash left, is cut off first.

    Args:
        path: the file; made if it is not there.
        lines: without the last newline.

    Raises:
        StorageError: the disk is full or read-only; what was written in part is cut off again.
    """
    with storing(path):
        descriptor = _beside_no_link(str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            end = _end_of_lines(descriptor)
            try:
                _write_all(descriptor, lines.encode() + b"\n")
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def _end_of_lines(descriptor: int) -> int:
    """Where the last whole line of the file ends; what stands behind it is cut off."""
    size = os.fstat(descriptor).st_size
    end, block = size, 1 << 16
    while end:
        start = max(0, end - block)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
    return end


def _beside_no_link(path: str, flags: int) -> int:
    """Open an ordinary file of the folder itself: not what a link or a pipe in its place leads to."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no ordinary file", path)
    return descriptor


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
