"""Locks on folders that end with their process: a dead one's blocks nobody, whatever killed it."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
UNKNOWN_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems without locks


class FolderLock:
    """The lock of a folder that one process works in, held from ``take`` until ``release`` or the process ends.

    It is the kernel's lock (flock) on a file ``.lock`` in the folder, which says who holds it.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.descriptor: int | None = None

    def take(self) -> str:
        """Takes the lock of a folder that is there, without waiting. Returns who holds it, empty if it is ours now.

        On a file system without locks it says so, and there is none.
        """
        path = self.folder / LOCK
        while self.descriptor is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                taken = try_lock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if taken is False:
                holder = os.read(descriptor, 500).decode(errors="replace").strip()
                os.close(descriptor)
                return holder or "another process"
            if taken is None:
                self.say(f"note: the disk of {str(self.folder)!r} has no locks: start no other run with this folder")
            if _is_at(descriptor, path):
                self.descriptor = descriptor
            else:  # who held it removed the folder meanwhile
                os.close(descriptor)
        os.ftruncate(self.descriptor, 0)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        os.pwrite(self.descriptor, f"process {os.getpid()} on {platform.node()} since {now}\n".encode(), 0)
        return ""

    def release(self) -> None:
        """Lets others have it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder without waiting: whether it is ours now, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (*UNKNOWN_HERE, errno.EBADF):  # EBADF: folders on NFS
            return None
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
