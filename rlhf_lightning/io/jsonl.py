"""A JSON-lines log that survives kills, and its reader.

A process that is killed while it writes leaves half a line behind. Appending to that would glue the
next record to it and lose both, so the writer first cuts the file back to its last newline.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rlhf_lightning.io.disk import cannot_write

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """The same data in what JSON has: NaN and infinities become None, other objects their text.

    Example:
        >>> plain({"loss": float("nan"), "steps": (1, 2.5), "folder": Path("out")})
        {'loss': None, 'steps': [1, 2.5], 'folder': 'out'}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


class JsonlWriter:
    r"""Appends records to a file, one a line; each call hands its records to the system at once.

    A lone surrogate (half a character, which a tokenizer can produce) is written as its escape
    ``\udc80`` and read back as it was.

    Args:
        path: the file. It is created with its folder, or continued: a torn last line is cut off.

    Example::

        with JsonlWriter("samples.jsonl") as log:
            log.drop_after(step=resumed_step)  # what the killed run wrote beyond its checkpoint
            log.write({"step": 7, "id": 0, "text": "..."})
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what was written is in the system's hands, and no kill of ours can take it.
        self._file = self.path.open("ab", buffering=0)
        self.torn_bytes = self._cut_torn_tail()

    def _cut_torn_tail(self) -> int:
        with self.path.open("r+b") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
        return size - end

    def write(self, *records: Record) -> None:
        """Append the records, all of them or none.

        Raises:
            TypeError: a record holds something that JSON has no form for.
            OSError: naming the file and the room that is left, if they could not be written.
        """
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        data = memoryview(lines.encode("utf-8", errors="backslashreplace"))
        size, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            self._file.truncate(size)
            raise cannot_write(self.path, error, written, "Earlier records are intact.") from error

    def drop_after(self, step: int, key: str = "step") -> int:
        """Drop the records beyond ``step``, so that a resumed run can write them again.

        Lines that cannot be read and records without the key stay. The file is replaced in one
        move: a kill leaves either the old or the new one.

        Args:
            step: the last step to keep.
            key: the field of a record that counts steps.

        Returns:
            How many records were dropped.

        Raises:
            OSError: naming the file, if it could not be rewritten.
        """
        with self.path.open("rb") as file:
            lines = file.readlines()
        kept = [line for line in lines if not _is_beyond(line, step, key)]
        if len(kept) == len(lines):
            return 0
        rewritten = self.path.with_name(self.path.name + ".tmp")
        try:
            with rewritten.open("wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            rewritten.unlink(missing_ok=True)
            raise cannot_write(self.path, error, None, "The file is as it was.") from error
        self._file.close()
        rewritten.replace(self.path)
        self._file = self.path.open("ab", buffering=0)
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_beyond(line: bytes, step: int, key: str) -> bool:
    record = _parse(line)
    at = None if record is None else record.get(key)
    return isinstance(at, (int, float)) and at > step


class JsonlRecords(NamedTuple):
    """What :func:`read_jsonl` found.

    Attributes:
        records: the records, in file order.
        bad_lines: lines that hold no JSON object (torn, damaged, not UTF-8), left out.
        duplicates: records left out because an earlier one has the same identity.
    """

    records: list[Record]
    bad_lines: int
    duplicates: int


def read_jsonl(path: str | Path, identity: Iterable[str] = ()) -> JsonlRecords:
    """Read a log, skipping and counting what is damaged.

    For training data use :func:`rlhf_lightning.io.readers.read_rows`, to which a damaged line is an
    error.

    Args:
        path: the file.
        identity: fields that tell records apart, such as ``("step", "id")``; of records that agree
            in all of them only the first is kept. Records without one of the fields are all kept.
    """
    keys = tuple(identity)
    records: list[Record] = []
    bad_lines = duplicates = 0
    seen: set[str] = set()
    with Path(path).open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is None:
                bad_lines += bool(line.strip())
                continue
            if keys and all(key in record for key in keys):
                mark = json.dumps([record[key] for key in keys])
                if mark in seen:
                    duplicates += 1
                    continue
                seen.add(mark)
            records.append(record)
    return JsonlRecords(records, bad_lines, duplicates)
