"""Rows out of files, ``datasets`` folders and the hub.

A row is a plain ``dict``. Whatever cannot be read is an error that names the file and the line: a
reader that skips bad rows trains on fewer rows than its user believes.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


def read_rows(
    source: str | Path,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    bad_lines: list[str] | None = None,
) -> list[Row]:
    r"""Read every row of a source.

    Files: JSON lines (``.jsonl``, ``.ndjson``), JSON (``.json``: a list of objects, or lines),
    comma- or tab-separated values (``.csv``, ``.tsv``: the first line names the columns, values
    stay text), each also compressed (``.gz``), and Parquet (``.parquet``). Folders: what
    ``Dataset.save_to_disk`` wrote. Anything else is a name on the hub. No code that comes with a
    data set is ever run.

    Args:
        source: a file, a folder or a hub name.
        split: which split of a folder or hub data set; files have none.
        name: the configuration of a hub data set (``"main"`` for ``openai/gsm8k``).
        revision: branch, tag or commit of a hub data set. Pin it where a result must be repeated.
        limit: read no more than this many rows.
        bad_lines: takes what is wrong with lines of a file that cannot be read, and the rows are
            those of the others. Without it the first such line is an error.

    Raises:
        FileNotFoundError: nothing is there, or the hub cannot be reached.
        ValueError: the content is not rows, there are none, or an argument does not apply.

    Example::

        read_rows("train.jsonl.gz", limit=100)
        read_rows("openai/gsm8k", name="main", split="train")
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for every row")
    path = Path(source)
    suffix = _suffix(path)
    if path.is_dir():
        _refuse(source, "a folder", name=name, revision=revision)
        rows = _read_saved_dataset(path, split, limit)
    elif path.exists() or suffix is not None:
        _refuse(source, "a file", split=split, name=name, revision=revision)
        rows = list(islice(_read_file(path, suffix, bad_lines), limit))
    else:
        rows = _read_hub(str(source), split, name, revision, limit)
    if not rows and not bad_lines:
        raise ValueError(f"{source} holds no rows")
    return rows


def _suffix(path: Path) -> str | None:
    """The suffix that tells the format, ``.gz`` taken off; None where it tells none."""
    plain = path.name[:-3] if path.name.endswith(".gz") else path.name
    suffix = Path(plain).suffix.lower()
    compressed = plain != path.name
    known = TEXT_SUFFIXES if compressed else (*TEXT_SUFFIXES, ".parquet")
    return suffix if suffix in known else None


def _refuse(source: str | Path, kind: str, **arguments: str | None) -> None:
    for argument, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{source} is {kind}, which has no {argument}; remove {argument}={value!r}"
            )


def _read_file(path: Path, suffix: str | None, bad: list[str] | None) -> Iterator[Row]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (looked from {Path.cwd()})")
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in (".csv", ".tsv"):
        return _read_table(path, "," if suffix == ".csv" else "\t", bad)
    if suffix == ".json" and _starts_with_list(path):
        return _read_json_list(path)
    if suffix is not None:
        return _read_json_lines(path, bad)
    known = ", ".join((*TEXT_SUFFIXES, ".parquet"))
    raise ValueError(f"{path}: its suffix tells no known format; rename it to one of {known}")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _complain(bad: list[str] | None, message: str, cause: Exception | None = None) -> None:
    """Note what is wrong with a line, or raise it where nobody takes notes."""
    if bad is None:
        raise ValueError(message) from cause
    bad.append(message)


def _lines(path: Path, bad: list[str] | None = None) -> Iterator[tuple[int, str, bool]]:
    """``(line number, text, whether a newline ends it)``, decoded strictly, line by line."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
                    _complain(bad, f"{path}, line {number}: not UTF-8 ({found})", error)
                    continue
                yield number, text, raw.endswith(b"\n")
    except (EOFError, gzip.BadGzipFile) as error:
        _complain(bad, f"{path}: damaged after line {number} ({error})", error)


def _read_json_lines(path: Path, bad: list[str] | None) -> Iterator[Row]:
    for number, line, ended in _lines(path, bad):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            torn = "" if ended else "; the file ends within this line, so it was cut off in writing"
            _complain(bad, f"{where}: not JSON ({error}){torn}", error)
            continue
        if isinstance(row, dict):
            yield row
        else:
            _complain(bad, _no_object(row, where))


def _as_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(_no_object(row, where))
    return row


def _no_object(row: Any, where: str) -> str:
    return f"{where}: a row must be a JSON object, found {type(row).__name__}"


def _starts_with_list(path: Path) -> bool:
    first = next((line for _, line, _ in _lines(path) if line.strip()), "")
    return first.lstrip().startswith("[")


def _read_json_list(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line, _ in _lines(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    for number, row in enumerate(rows, start=1):
        yield _as_row(row, f"{path}, item {number}")


def _read_table(path: Path, delimiter: str, bad: list[str] | None) -> Iterator[Row]:
    # The module's own limit of 131,072 characters is below what one long document needs.
    before = csv.field_size_limit(sys.maxsize)
    try:
        lines = (line for _, line, _ in _lines(path, bad))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise ValueError(f"{path}, line 1: a column name occurs twice in {header}")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                where = f"{path}, line {reader.line_num}"
                _complain(bad, f"{where}: {len(values)} values for {len(header)} columns {header}")
                continue
            yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        _complain(bad, f"{path}, line {reader.line_num}: {error}; nothing is read after it", error)
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})") from error


def _read_saved_dataset(path: Path, split: str | None, limit: int | None) -> list[Row]:
    import datasets

    if not ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path} is a folder that Dataset.save_to_disk did not write (it holds {found});"
            " name one of its files"
        )
    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        data = _choose_split(data, str(path), split)
    elif split is not None:
        _refuse(path, "a folder with one data set", split=split)
    return _take(data, limit)


def _read_hub(
    source: str, split: str | None, name: str | None, revision: str | None, limit: int | None
) -> list[Row]:
    import datasets

    try:
        data = datasets.load_dataset(source, name, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"{source!r} is no file or folder here (looked from {Path.cwd()}), and reading it as a"
            f" data set from the hub failed: {type(error).__name__}: {error}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        data = _choose_split(data, source, split)
    return _take(data, limit)


def _choose_split(data: Any, source: str, split: str | None) -> Any:
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise ValueError(
            f"{source} has the splits {sorted(data)}; set split to one (found {split!r})"
        )
    return data[split]


def _take(data: Any, limit: int | None) -> list[Row]:
    rows = data if limit is None else data.select(range(min(limit, len(data))))
    return rows.to_list()
