"""Durable small files: the one way this program changes state on disk.

Rules:
* write to a temporary file beside the target, fsync it, rename over the target, fsync the folder;
* a cut at any instruction leaves either the old file or the new one, never a mixture;
* a full or read-only disk becomes a StorageError, and the old file stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import BinaryIO

from .contract.codes import StorageError
from .fail_points import fail_point


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data`, atomically and durably.

    Raises:
        StorageError: storage.full, storage.unwritable; the old content is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as f:
                fail_point("file-begun", path.name)
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            fail_point("file-written", path.name)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fail_point("file-renamed", path.name)
        sync_folder(path.parent)
    except OSError as e:
        raise storage_error(e, path) from e


def scratch(name: str) -> BinaryIO:
    """An open file without a place on any disk, for what a child reads and writes: /tmp may be full, or read-only."""
    return os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC), "w+b")


def sweep(folder: Path) -> None:
    """Remove the temporary files that writers left in `folder` when they were killed; those of the living stay."""
    for path in folder.glob(".*.tmp"):
        pid = path.name.rpartition(".tmp")[0].rpartition(".")[2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            with contextlib.suppress(OSError):  # a leftover is no reason not to start
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(e: OSError, path: Path) -> StorageError:
    """The StorageError that says what an OSError on `path` means."""
    # EFBIG is the file-size limit of the process: to the writer it is the same as a full disk.
    if e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StorageError("storage.full", f"No space left for {path}.", remedy="Free space and try again.")
    return StorageError("storage.unwritable", f"Can't write {path}: {e.strerror or e}.")
