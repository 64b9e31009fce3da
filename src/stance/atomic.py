"""What is written is whole or not there, by one process at a time, and stays through a power cut.

A file is written beside its place and renamed when its bytes are on the disk; a folder changes places
with an earlier one in one step. What these functions did is on the disk when they return, as far as the
file system keeps its word.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from stance.errors import UsageError, first_line

__all__ = [
    "NewFolder",
    "clear_partials",
    "free_lock",
    "hold",
    "remove_locked",
    "replacing",
    "swap",
    "sync_folder",
    "take_lock",
    "why_unwritten",
]

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_NO_SWAP = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
}  # fmt: skip
_FULL = ("No space left", "File too large", "Disk quota exceeded")
_TORCH = ("PytorchStreamWriter", "inline_container")
_held: set[int] = set()
"""The locks of this process, by their handles."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` when the block ends: that is the old or the new one, whole.

    Only one process may write the same path at a time.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def clear_partials(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote a file of this folder."""
    for path in folder.glob(".*.partial*"):
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def swap(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_SWAP:
        return False
    raise OSError(number, os.strerror(number), str(other))


def take_lock(path: Path, output: Path) -> int:
    """Take the lock of an output for this process; return the handle, with which :func:`free_lock` gives it back.

    Processes that this one forks have no part in it, so that it goes with this one, also by a kill.

    Args:
        path: the lock's file, made with its folder; it may be removed by the process that holds it.
        output: what is locked, for the message.

    Raises:
        UsageError: another process has it.
        OSError: the file cannot be made.
    """
    _forget_when_forked()
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        if not _locked(handle):
            os.close(handle)
            raise UsageError(f"{output}: another process is writing it - wait, or choose another output")
        with suppress(FileNotFoundError):  # the file may have gone between opening and locking
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                _held.add(handle)
                return handle
        os.close(handle)


def free_lock(handle: int) -> None:
    """Give a lock back that this process has; without effect in one that was forked from it."""
    if handle in _held:
        _held.remove(handle)
        os.close(handle)


@cache
def _forget_when_forked() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_locks)


def _forget_locks() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


def remove_locked(folder: Path) -> None:
    """Remove a folder, as far as it can be, whose file ``lock`` this process has taken.

    The lock goes last: until then no other process takes the half of it for its own.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()
        (folder / "lock").unlink()
        folder.rmdir()


@contextmanager
def hold(path: Path, output: Path) -> Iterator[None]:
    """Have the lock of an output while the block lasts; its file goes with it. Raises as :func:`take_lock`."""
    handle = take_lock(path, output)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        sync_folder(path.parent)
        free_lock(handle)


def _locked(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not on this system
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # not on this file system
        if error.errno not in _NO_LOCKS:
            raise
    return True


def why_unwritten(error: BaseException) -> str | None:
    """Return why a file could not be written, if that is what an error of any library says: many have no type for it."""
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno not in _UNWRITABLE:  # a connection, too many open files
            return None
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    if any(sign in str(error) for sign in _TORCH):
        return "a file could not be written to its end, as on a full disk"
    return first_line(error) if any(sign in str(error) for sign in _FULL) else None


class NewFolder:
    """A folder that is made out of sight and takes the place of ``output`` when it is whole.

    It lies in ``.NAME.stance/new`` beside the output, locked for one process. What a killed process left there
    is removed, but for an earlier output that it had just put aside: that comes back.

    Attributes:
        path: the folder to fill.

    Raises:
        UsageError: another process makes the same folder.
        OSError: nothing can be written there.
    """

    def __init__(self, output: Path):
        self.output = output
        self._work = output.with_name(f".{output.name}.stance")
        self._aside, self.path = self._work / "old", self._work / "new"
        self._lock = take_lock(self._work / "lock", output)
        try:
            self._put_back()
            for left in (self._aside, self.path):
                if left.exists():
                    shutil.rmtree(left)
            self.path.mkdir()
            self.path.chmod(0o755)
        except BaseException:
            free_lock(self._lock)
            raise

    def commit(self) -> None:
        """Put the folder in its place; an earlier one stands until then."""
        if not self.output.exists():
            os.rename(self.path, self.output)
        elif not swap(self.path, self.output):
            self._change_places()
        sync_folder(self.output.parent)

    def _change_places(self) -> None:
        """In two steps; what comes between them, an error or Ctrl-C, :meth:`close` mends."""
        os.rename(self.output, self._aside)
        sync_folder(self._work)
        os.rename(self.path, self.output)

    def _put_back(self) -> None:
        if self._aside.exists() and not self.output.exists():
            os.rename(self._aside, self.output)

    def close(self) -> None:
        """Remove what is not needed any more, and let other processes in; an earlier output without a new one comes back."""
        try:
            self._put_back()
            remove_locked(self._work)
        except OSError:
            pass  # it cannot be put back now: it stays aside for the next one to do so
        finally:
            sync_folder(self.output.parent)
            free_lock(self._lock)
