"""A log that a killed process leaves behind can be continued and read."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_lightning.io.jsonl import JsonlWriter, read_jsonl


def test_a_torn_tail_is_cut_and_the_next_record_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    with JsonlWriter(path) as log:
        log.write({"step": 1}, {"step": 2})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "te')
    with JsonlWriter(path) as log:
        assert log.torn_bytes == 15
        log.write({"step": 3})
    assert read_jsonl(path).records == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("tail", [b"", b"x", b"x" * 65535, b"x" * 65536, b"x" * 200_000])
@pytest.mark.parametrize("whole", [b"", b'{"a": 1}\n'])
def test_tails_of_every_size_are_cut(tmp_path: Path, whole: bytes, tail: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole + tail)
    JsonlWriter(path).close()
    assert path.read_bytes() == whole


@settings(max_examples=40, deadline=None)
@given(
    st.text(st.characters() | st.characters(categories=["Cs"]) | st.sampled_from("\n\r\x00\u2028"))
)
@example("half \udc80 a character")
@example("\r\n\x00\u2028")
def test_any_text_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    with JsonlWriter(path) as log:
        log.write({"text": text}, {"text": "after"})
    assert read_jsonl(path).records == [{"text": text}, {"text": "after"}]
    path.read_text(encoding="utf-8")  # the file itself is UTF-8, surrogates or not


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonlWriter(path) as log:
        log.write(*({"step": s, "id": i} for s in (1, 2, 3) for i in (0, 1)), {"note": "kept"})
    path.write_bytes(b"damaged\n" + path.read_bytes())
    with JsonlWriter(path) as log:
        assert log.drop_after(3) == 0
        assert log.drop_after(1) == 4
        log.write({"step": 2, "id": 0})
    read = read_jsonl(path)
    steps = [record.get("step") for record in read.records]
    assert steps == [1, 1, None, 2]
    assert read.bad_lines == 1
    assert list(tmp_path.iterdir()) == [path]


def test_reader_skips_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [b'{"step": 1, "id": 0, "x": 1}', b"", b'{"a": "\xff"}', b"[1]", b"[" * 100_000]
    lines += [b'{"step": 1, "id": 0, "x": 2}', b'{"step": 1}', b'{"step": 1}', b'{"st']
    path.write_bytes(b"\n".join(lines))
    read = read_jsonl(path, identity=("step", "id"))
    assert read.records == [{"step": 1, "id": 0, "x": 1}, {"step": 1}, {"step": 1}]
    assert (read.bad_lines, read.duplicates) == (4, 1)


def test_every_written_record_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = (
        "import itertools\n"
        "from rlhf_lightning.io.jsonl import JsonlWriter\n"
        f"log = JsonlWriter({str(path)!r})\n"
        "for i in itertools.count():\n"
        "    log.write({'step': i})\n"
        "    print(i, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(20):
        reported = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    reported = max([reported, *map(int, child.communicate()[0].split())])
    with JsonlWriter(path) as log:
        log.write({"step": "next"})
    steps = [record["step"] for record in read_jsonl(path).records]
    assert steps[:-1] == list(range(len(steps) - 1))
    assert len(steps) - 1 >= reported + 1
    assert steps[-1] == "next"


class FullDisk(io.FileIO):
    """Takes a few bytes more, some at a time, and then none."""

    room = 25

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, 10)
        self.room -= taken
        return super().write(bytes(data[:taken])) or 0


def test_records_that_do_not_fit_leave_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonlWriter(path) as log:
        log.write({"a": 1})
        log._file = FullDisk(path, "ab")
        with pytest.raises(OSError, match=r"log\.jsonl: writing failed after 25 bytes") as error:
            log.write({"a": 2}, {"text": "x" * 30})
        assert error.value.errno == errno.ENOSPC
        assert path.read_text() == '{"a": 1}\n'
        log._file = path.open("ab", buffering=0)
        log.write({"a": 3})
    assert read_jsonl(path).records == [{"a": 1}, {"a": 3}]


def test_what_json_cannot_hold_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonlWriter(path) as log:
        with pytest.raises(TypeError):
            log.write({"a": 1}, {"a": object()})
        log.write({"a": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 2}]
