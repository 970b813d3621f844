"""One writer a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from ..durable import make_folder, write_all

LOCK = ".lock"
_PATIENCE = 2.0  # seconds in which a process that has just taken the lock writes its name
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_held: set[int] = set()  # descriptors through which this process holds locks


class FolderLockedError(ValueError):
    """A run folder that another process writes; the message names it."""


class FolderLock:
    """Keeps other processes from writing a folder; use it as a context manager.

    The lock is the kernel's (`flock` on the file `.lock`): it ends with the process, however that ends, so
    that none is left behind. The file says who holds it. Processes forked meanwhile do not keep the lock.

    On NFS, Linux turns `flock` into a lock of the server (NFSv4, or NFSv3 with its lock daemon), which holds
    between machines as well; mounted with `nolock` or `local_lock=flock`, it holds among the processes of
    one machine alone. Where a machine crashes, the server frees its locks after a grace period. A file
    system without locks (Lustre mounted without `-o flock`) is refused.

    Args:
        folder: it is made if there is none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / LOCK
        self._file: int | None = None

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            FolderLockedError: if another process (or another lock of this one) holds it.
            OSError: if the file system has no locks.
        """
        if self._file in _held:
            raise RuntimeError(f"{self.folder} is locked through this object already")
        make_folder(self.folder)
        while (file := self._try()) is None:
            pass  # whoever held it has just given it back
        self._file = file
        _held.add(file)
        return self

    def release(self) -> None:
        """Give the lock back; without effect if this process does not hold it."""
        if self._file in _held:
            _held.remove(self._file)
            self.path.unlink(missing_ok=True)  # before the lock ends, so that it is surely ours
            os.close(self._file)
        self._file = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *exception) -> None:
        self.release()

    def _try(self) -> int | None:
        """Return the descriptor that holds the lock, None if there is reason to try again."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        held = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_at_path(file):
                self._sign(file)
                held = True
        except BlockingIOError:
            holder = self._holder()
            if holder is not None:
                remedy = "wait for it, stop it, or choose another folder"
                raise FolderLockedError(f"{self.folder} is being written by {holder}; {remedy}") from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                remedy = "mount it with locks (Lustre: -o flock) or choose a folder elsewhere"
                text = f"the file system of {self.folder} has no locks ({error.strerror}); {remedy}"
                raise OSError(error.errno, text) from error
            raise
        finally:
            if not held:
                os.close(file)
        return file if held else None

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _sign(self, file: int) -> None:
        """Write who holds the lock, over whom a killed process may have named."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        os.ftruncate(file, 0)
        write_all(file, json.dumps(holder).encode())

    def _holder(self) -> str | None:
        """Describe the process that holds the lock, which may be about to sign; None if it has ended."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            try:
                holder = json.loads(self.path.read_bytes())
                host, pid, since = holder["host"], holder["pid"], holder["since"]
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, KeyError):
                host = None
            if host is not None and (host != socket.gethostname() or _is_alive(pid)):
                return f"process {pid} on {host} since {since}"
            time.sleep(0.02)
        return f"a process that {self.path} does not name"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _forget() -> None:
    """Close a parent's descriptors in a forked child, which would otherwise keep the lock for it."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
