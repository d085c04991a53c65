"""Checkpoints that a crash cannot damage."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from rlhf_lightning.core.reading import read_checkpoint
from rlhf_lightning.io.disk import cannot_write, first_line

_PARTIAL = ".partial-checkpoint-"
_INTACT = "An earlier checkpoint of this name is intact."


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, and renames: the old file stands until the new one does.

    Lightning's own writer goes through ``$TMPDIR``; where that is another file system the last step
    is a copy, and a kill in the middle of it destroys the previous checkpoint. Reading never
    unpickles code, whatever the caller or the environment asks for.

    Paths with a scheme (``s3://...``) are written by Lightning's own writer, and ``http(s)://`` is
    never read.
    """

    def __init__(self) -> None:
        self._swept: set[Path] = set()
        self._checked = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; the previous file survives every failure.

        Raises:
            OSError: naming the path and the space that is left, if the file cannot be written.
            TypeError: if the checkpoint holds objects that could not be read back.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path).absolute()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._sweep(target.parent)
            handle, name = tempfile.mkstemp(
                prefix=f"{_PARTIAL}{_host()}-{os.getpid()}-", dir=target.parent
            )
        except OSError as error:
            raise cannot_write(target, error, 0, _INTACT) from error
        try:
            self._write(checkpoint, handle, name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _write(self, checkpoint: dict[str, Any], handle: int, name: str, target: Path) -> None:
        written = 0
        try:
            with os.fdopen(handle, "wb") as file:
                try:
                    torch.save(checkpoint, file)
                finally:
                    written = os.fstat(file.fileno()).st_size
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes the file private; a checkpoint gets the permissions that the umask gives
            os.chmod(name, 0o666 & ~current_umask())
            self._check_readable(name, target)
            os.replace(name, target)
            _sync_directory(target.parent)
        except (OSError, RuntimeError) as error:
            # on a full disk torch reports a RuntimeError about an unexpected position
            raise cannot_write(target, error, written, _INTACT) from error

    def _check_readable(self, name: str, target: Path) -> None:
        """Once per run: what was written can be read back without unpickling code."""
        if self._checked:
            return
        try:
            torch.load(name, map_location="meta", weights_only=True)
        except UnpicklingError as error:
            raise TypeError(
                f"{target}: this checkpoint could be written but never resumed, because it holds"
                f" objects other than tensors and plain Python values ({first_line(error)}). Keep"
                " such objects out of save_hyperparameters() and state_dict()"
            ) from error
        self._checked = True

    def _sweep(self, folder: Path) -> None:
        """Remove what runs on this machine left half-written when they were killed."""
        if folder not in self._swept:
            for leftover in folder.glob(f"{_PARTIAL}{_host()}-*"):
                process = leftover.name.removeprefix(f"{_PARTIAL}{_host()}-").partition("-")[0]
                if leftover.is_file() and not _is_alive(process):
                    leftover.unlink(missing_ok=True)
            self._swept.add(folder)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint: tensors and plain values only, whatever ``weights_only`` says.

        See :func:`rlhf_lightning.core.reading.read_checkpoint`.
        """
        return read_checkpoint(path, map_location)


def _host() -> str:
    return re.sub(r"\W", "_", platform.node())


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def current_umask() -> int:
    """The process's umask: which permissions new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(folder: Path) -> None:
    """Make the rename itself survive a power cut (no file system on Windows offers this)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
