"""Whether a command will be able to write what it is going to write."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_folder(folder: str | Path, option: str) -> None:
    """Make a folder and write into it, for permissions tell less than trying.

    Args:
        folder: where files will go.
        option: who asked for it, for the message.

    Raises:
        OSError: naming the option and the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"{option}: {folder} cannot be written to ({reason}). Give another folder, or mend it"
        ) from error


def check_file(path: str | Path, option: str) -> None:
    """The same for a file that will be written, replaced or continued.

    Raises:
        OSError: naming the option and the file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {path} is a folder; give the name of a file")
    check_folder(path.parent, option)
    if path.exists():
        try:
            path.open("ab").close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"{option}: {path} cannot be written to ({reason})") from error
