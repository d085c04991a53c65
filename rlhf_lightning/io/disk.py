"""Errors of writing that say which file, how much room there is, and what is still intact."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path


def cannot_write(
    path: str | Path, error: BaseException, written: int | None = None, intact: str = ""
) -> OSError:
    """The error to raise where writing a file has failed (on a full disk, say).

    Args:
        path: the file or folder that was to be written.
        error: what the system or a library said.
        written: how many bytes were written before that, where it is known.
        intact: a sentence on what is not lost.

    Returns:
        An ``OSError`` with the number of ``error``, or of a full disk where the library that failed
        hides it (as safetensors does).
    """
    path = Path(path)
    free = free_bytes(path)
    if isinstance(error.__context__, OSError):  # torch stumbles over its own half-written archive
        error = error.__context__
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    done = "" if written is None else f" after {written:,} bytes"
    found = OSError(
        " ".join(
            f"{path}: writing failed{done} ({reason}); {free:,} bytes are free there. {intact}"
            " Free some space, or have it written elsewhere".split()
        )
    )
    found.errno = error.errno if isinstance(error, OSError) else errno.ENOSPC
    return found


def free_bytes(path: Path) -> int:
    """Room on the file system of a path, or of its nearest folder that exists."""
    path = path.absolute()
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its kind, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
