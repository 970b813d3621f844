"""Files that outlive a crash: written under another name, synced to the disk, then moved into place.

Whoever reads a file under its own name finds the old contents or the new ones, whole, whenever the writing
process or its machine stops.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync its contents; its name is safe only after `sync_folder`."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def write_all(file: int, data: bytes) -> None:
    """Write all of `data` to a file descriptor, which may take it in pieces."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def sync_folder(path: Path) -> None:
    """Sync a folder's list of names, so that files made, moved or removed in it stay so."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which is how file systems answer that sync no folders
            raise
    finally:
        os.close(folder)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, and sync their names."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    if missing:
        path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step: until it is whole on the disk, the old one stays.

    Raises:
        OSError: naming the file, the bytes needed and the bytes free; the old file is whole then.
    """

    def kept() -> str:
        return f"the earlier {path.name} is whole" if path.exists() else f"there is no {path.name}"

    with explained(str(path), path.parent, len(data), kept):
        move_into_place(path, data)


def move_into_place(path: Path, data: bytes) -> None:
    """Do what `replace_file` does, with the system's own errors."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed; nobody may be writing the file."""
    for leftover in path.parent.glob(f".{path.name}.*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


@contextmanager
def explained(what: str, folder: Path, size: int, state: Callable[[], str]) -> Iterator[None]:
    """Say in an OSError's message what could not be written, and what there is instead.

    Args:
        what: that is written.
        folder: where.
        size: bytes that it needs.
        state: called on a failure; says what is on the disk now.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"{what} could not be written ({reason}): it needs {size:,} bytes, {_free(folder)}; {state()}",
        ) from error


def _free(folder: Path) -> str:
    """Say how many bytes a file may take in a folder, as far as the file system tells."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"and {shutil.disk_usage(folder).free:,} are free in {folder} (a quota may leave fewer)"
    except OSError as error:
        return f"and {folder} does not tell how many are free ({error.strerror})"
