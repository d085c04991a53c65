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
        rows = list(islice(_read_file(path, suffix), limit))
    else:
        rows = _read_hub(str(source), split, name, revision, limit)
    if not rows:
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


def _read_file(path: Path, suffix: str | None) -> Iterator[Row]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (looked from {Path.cwd()})")
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in (".csv", ".tsv"):
        return _read_table(path, "," if suffix == ".csv" else "\t")
    if suffix == ".json" and _starts_with_list(path):
        return _read_json_list(path)
    if suffix is not None:
        return _read_json_lines(path)
    known = ", ".join((*TEXT_SUFFIXES, ".parquet"))
    raise ValueError(f"{path}: its suffix tells no known format; rename it to one of {known}")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """``(line number, text, whether a newline ends it)``, decoded strictly, line by line."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                yield number, raw.decode(encoding), raw.endswith(b"\n")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise ValueError(f"{path}, line {number}: not UTF-8 ({found})") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged after line {number} ({error})") from error


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line, ended in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            torn = "" if ended else "; the file ends within this line, so it was cut off in writing"
            raise ValueError(f"{path}, line {number}: not JSON ({error}){torn}") from error
        yield _as_row(row, f"{path}, line {number}")


def _as_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, found {type(row).__name__}")
    return row


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


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    # The module's own limit of 131,072 characters is below what one long document needs.
    before = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader((line for _, line, _ in _lines(path)), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise ValueError(f"{path}, line 1: a column name occurs twice in {header}")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(header)}"
                    f" columns {header}"
                )
            yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
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
