"""Reading checkpoint files: whole, undamaged, and never as code."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from rlhf_lightning.io.disk import first_line

CHECKPOINT_KEY = "rlhf_lightning"
"""Where a checkpoint says what wrote it."""

LAYOUT = 2
"""Which entries a checkpoint has; higher where one that a resumed run needs has come or changed."""

_VERSION = "pytorch-lightning_version"
_OLDEST = 2
_NEIGHBOURS = 8
"""How many other files of the folder are looked at for one to go back to."""


def read_checkpoint(
    path: str | Path, map_location: Callable | str | torch.device | None = "cpu"
) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, whatever the environment asks for.

    A local file's checksums are compared first, because torch does not: a flipped bit would become
    a wrong weight without a word.

    Args:
        path: the file; with a scheme (``s3://...``), whatever Lightning reads from there, but for
            the web.
        map_location: as of ``torch.load``.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder.
        ValueError: if the file is damaged, holds code or something else than a checkpoint of
            Lightning, or is a web address. The message names the newest file beside it that is
            whole, but nothing is read from there.
    """
    text = str(path)
    if "http://" in text.lower() or "https://" in text.lower():
        raise ValueError(f"{path}: checkpoints are not read from the web. Download it first")
    if "://" in text:
        return _checked(_read(path, map_location), path)
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint.{_another(Path(path))}")
    refuse_folder(Path(path))
    try:
        _compare_checksums(Path(path))
        return _checked(_read(path, map_location), path)
    except ValueError as error:
        raise ValueError(f"{error}{_another(Path(path))}") from error


def refuse_folder(path: Path) -> None:
    """Tell someone who gave a folder which file to give.

    Raises:
        IsADirectoryError: if it is a folder, whether of checkpoints or sharded.
    """
    if not path.is_dir():
        return
    if any(path.glob("*.ckpt")):
        raise IsADirectoryError(
            f"{path}: this is a folder; give one checkpoint of it.{_another(path / '*', 'there')}"
        )
    raise IsADirectoryError(
        f"{path}: this is a folder, as sharded strategies write them, and not one file. Make one of"
        f" it with python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
    )


def saved_step(path: Path) -> int | None:
    """Optimizer steps that a checkpoint has behind it, None if it is none. No tensor is read."""
    try:
        return int(_checked(_read(path, "meta"), path)["global_step"])
    except (ValueError, OSError, KeyError):
        return None


def _compare_checksums(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: this checkpoint is damaged: the file is empty.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: this is no checkpoint, or one whose end is missing (a checkpoint is a zip"
            " archive, which this file is not)."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path}: this checkpoint is damaged ({first_line(error)}).") from error
    if damaged is not None:
        raise ValueError(
            f"{path}: this checkpoint is damaged: the checksum of its part {damaged!r} is wrong."
        )


def _read(path: str | Path, map_location: Any) -> Any:
    try:
        return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, because it is no checkpoint or holds more than tensors and plain"
            f" values, which could run code when loaded ({_reason(error)})."
        ) from error
    except PermissionError:
        raise
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{path}: this checkpoint is damaged ({first_line(error)}).") from error


def _checked(found: Any, path: str | Path) -> dict[str, Any]:
    """What Lightning will look for, before it fails with a bare KeyError."""
    if not isinstance(found, dict) or _VERSION not in found or "state_dict" not in found:
        kind = _listed(found) if isinstance(found, dict) else f"a {type(found).__name__}"
        raise ValueError(
            f"{path}: this file is of another program, not a checkpoint of Lightning ({kind}). To"
            " start from the weights of a model, give its Hugging Face folder as model."
        )
    version = re.match(r"\d+", str(found[_VERSION]))
    if version is None or int(version[0]) < _OLDEST:
        raise ValueError(
            f"{path}: written by Lightning {found[_VERSION]!r}, whose checkpoints this package has"
            " never written and cannot continue."
        )
    return found


def _listed(found: dict[Any, Any]) -> str:
    names = [repr(key) for key in found][:3]
    return f"a dictionary with {', '.join(names) or 'no keys'}{', ...' if len(found) > 3 else ''}"


def _another(path: Path, there: str = "beside it") -> str:
    """A sentence on the newest whole checkpoint in the same folder."""
    if not path.parent.is_dir():
        return ""
    others = [p for p in path.parent.glob("*.ckpt") if p.is_file() and not _same(p, path)]
    others.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    for other in others[:_NEIGHBOURS]:
        try:
            _compare_checksums(other)
        except (ValueError, OSError):
            continue
        step = saved_step(other)
        if step is not None:
            return f" The newest whole checkpoint {there} is {other} (step {step})"
    return f" There is no whole checkpoint {there}"


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _reason(error: BaseException) -> str:
    """What the unpickler met, without its advice to switch the check off."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line.startswith(("WeightsUnpickler error", "Unsupported"))]
    return told[0] if told else first_line(error)
