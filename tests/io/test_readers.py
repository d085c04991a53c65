"""Every format gives the same rows, and whatever is no row is named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rlhf_lightning.io.readers import read_rows

ROWS = [{"a": "x", "b": "1"}, {"a": 'ü\u2028,\n"', "b": "2"}]


def write(path: Path, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


CSV = 'a,b\nx,1\n"ü\u2028,\n""",2\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", as_lines(ROWS)),
        ("r.ndjson", as_lines(ROWS)),
        ("r.json", as_lines(ROWS)),
        ("bom.jsonl", "\ufeff" + as_lines(ROWS)),
        ("blank.jsonl", as_lines(ROWS[:1]) + "\n  \n" + as_lines(ROWS[1:])),
        ("unended.jsonl", as_lines(ROWS).rstrip("\n")),
        ("r.jsonl.gz", as_lines(ROWS)),
        ("list.json", json.dumps(ROWS, indent=1)),
        ("list.json.gz", json.dumps(ROWS)),
        ("r.csv", CSV),
        ("r.csv.gz", CSV),
        ("r.tsv", CSV.replace("a,b", "a\tb").replace("x,1", "x\t1").replace('",2', '"\t2')),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    assert read_rows(path) == ROWS
    assert read_rows(str(path), limit=1) == ROWS[:1]


def test_parquet_keeps_types_and_nests(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "hi"}], "label": True, "n": 3}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert read_rows(tmp_path / "r.parquet") == rows
    assert len(read_rows(tmp_path / "r.parquet", limit=2)) == 2


def test_saved_datasets_and_their_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    assert read_rows(tmp_path / "one") == ROWS
    assert read_rows(tmp_path / "one", limit=1) == ROWS[:1]
    assert read_rows(tmp_path / "two", split="test") == ROWS[1:]
    with pytest.raises(ValueError, match=r"two has the splits \['test', 'train'\]; set split"):
        read_rows(tmp_path / "two")
    with pytest.raises(ValueError, match="remove split='train'"):
        read_rows(tmp_path / "one", split="train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2', r"a\.jsonl, line 3: not JSON .* cut off in writing"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl, line 2: a row must be .* found list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 \(byte 0xff"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", "\n\n", r"a\.jsonl holds no rows"),
        ("a.jsonl", "", r"a\.jsonl holds no rows"),
        ("a.json", '[{"a": 1}, 2]', r"a\.json, item 2: a row must be .* found int"),
        ("a.json", '[{"a": 1}', r"a\.json: not JSON"),
        ("a.csv", "a,b\n1,2\n1\n", r"a\.csv, line 3: 1 values for 2 columns \['a', 'b'\]"),
        ("a.csv", "a,a\n1,2\n", r"line 1: a column name occurs twice"),
        ("a.csv", 'a,b\n"1,2\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.parquet", "no parquet", r"a\.parquet: not readable as Parquet"),
        ("a.txt", "hello", r"a\.txt: its suffix tells no known format"),
    ],
)
def test_bad_content_names_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_bad_lines_can_be_noted_instead(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n[2]\n\n{"a": "\xff"}\nno\n{"a": 3}\n{"a": 4')
    bad: list[str] = []
    assert read_rows(path, bad_lines=bad) == [{"a": 1}, {"a": 3}]
    expected = [
        "line 2: a row must be",
        "line 4: not UTF-8",
        "line 5: not JSON",
        "line 7: not JSON",
    ]
    for message, start in zip(bad, expected, strict=True):
        assert message.startswith(f"{path}, {start}")
    assert bad[-1].endswith("the file ends within this line, so it was cut off in writing")
    table = tmp_path / "rows.csv"
    table.write_text('a,b\n1,2\n3\n4,5\n6,"7')
    bad = []
    assert read_rows(table, bad_lines=bad) == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    assert [message.removeprefix(f"{table}, line ")[:2] for message in bad] == ["3:", "5:"]
    path.write_text("no\n")
    bad = []
    assert read_rows(path, bad_lines=bad) == []
    assert len(bad) == 1
    torn = tmp_path / "rows.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"a": 1}\n' * 9999)[:-9])
    bad = []
    rows = read_rows(torn, bad_lines=bad)
    assert 0 < len(rows) <= 9999
    assert "damaged after line" in bad[-1]


def test_torn_gzip_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", as_lines(ROWS * 2000))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged after line"):
        read_rows(path)


def test_missing_files_and_arguments_that_do_not_apply(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl does not exist \(looked from"):
        read_rows(tmp_path / "no.jsonl")
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n')
    with pytest.raises(ValueError, match=r"is a file, which has no split; remove split='train'"):
        read_rows(path, split="train")
    with pytest.raises(ValueError, match="limit is 0"):
        read_rows(path, limit=0)
    with pytest.raises(ValueError, match=r"save_to_disk did not write \(it holds a\.jsonl\)"):
        read_rows(tmp_path)


def test_an_unreachable_hub_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("offline mode is on")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"'someone/rows' is no file .* offline mode is on"):
        read_rows("someone/rows", split="train")


def test_hub_rows_never_come_with_code(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    seen: dict = {}

    def load(source: str, name: str | None, **kwargs: object) -> object:
        seen.update(kwargs, source=source, name=name)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("someone/rows", name="main", split="train", revision="v1", limit=1)
    assert rows == ROWS[:1]
    assert seen == {"source": "someone/rows", "name": "main", "split": "train", "revision": "v1"}


def test_real_data(shared_data: Path) -> None:
    assert len(read_rows(shared_data / "gsm8k/test.jsonl")) == 1319
    assert len(read_rows(shared_data / "math/train_answers_rllm.json")) == 7474
    assert set(read_rows(shared_data / "hh-rlhf/helpful-base/test.jsonl.gz", limit=2)[1]) == {
        "chosen",
        "rejected",
    }
    assert len(read_rows(shared_data / "imdb/test.parquet", limit=10)) == 10
