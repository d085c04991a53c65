"""Checkpoint files survive kills, full disks and failing system calls."""

from __future__ import annotations

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf_lightning.core import checkpoint
from rlhf_lightning.core.checkpoint import AtomicCheckpointIO


def payload(value: float, size: int = 1000) -> dict:
    return {"state_dict": {"weight": torch.full((size,), value)}, "step": int(value)}


def test_a_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    io_plugin = AtomicCheckpointIO()
    io_plugin.save_checkpoint(payload(3.0), tmp_path / "deep" / "a.ckpt")
    found = io_plugin.load_checkpoint(tmp_path / "deep" / "a.ckpt")
    assert found["step"] == 3
    assert torch.equal(found["state_dict"]["weight"], torch.full((1000,), 3.0))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.ckpt"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        AtomicCheckpointIO().save_checkpoint(payload(1.0), tmp_path / "a.ckpt")
    finally:
        os.umask(old)
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_the_old_file_survives_the_nth_failing_call(
    call: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io_plugin = AtomicCheckpointIO()
    path = tmp_path / "last.ckpt"
    io_plugin.save_checkpoint(payload(1.0), path)
    real, calls = getattr(os, call), []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.EIO, "injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    for value in (2.0, 3.0, 4.0):
        try:
            io_plugin.save_checkpoint(payload(value), path)
        except OSError as error:
            message = str(error)
            assert str(path) in message
        assert io_plugin.load_checkpoint(path)["step"] in (1, 2, 3, 4)
    assert len(calls) >= nth
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


class FailingFile(io.FileIO):
    """Runs out of space after a number of bytes."""

    left = 0

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        if size > type(self).left:
            raise OSError(errno.ENOSPC, "No space left on device")
        type(self).left -= size
        return super().write(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("room", [0, 100, 2000])
def test_a_full_disk_is_named_and_the_old_file_survives(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io_plugin = AtomicCheckpointIO()
    path = tmp_path / "last.ckpt"
    io_plugin.save_checkpoint(payload(1.0), path)
    FailingFile.left = room
    monkeypatch.setattr(os, "fdopen", lambda handle, mode: FailingFile(handle, "wb"))
    with pytest.raises(OSError, match=r"last\.ckpt: the checkpoint could not be written") as error:
        io_plugin.save_checkpoint(payload(2.0), path)
    assert "bytes are free" in str(error.value)
    monkeypatch.undo()
    assert io_plugin.load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


SAVER = """
import sys, torch
from pathlib import Path
from rlhf_lightning.core import checkpoint
from rlhf_lightning.core.checkpoint import AtomicCheckpointIO
plugin, path, value = AtomicCheckpointIO(), Path(sys.argv[1]), 1
while True:
    plugin.save_checkpoint(
        {"state_dict": {"weight": torch.full((2_000_000,), float(value))}, "step": value}, path)
    print(value, flush=True)
    value += 1
"""


def test_kill_9_while_saving_never_harms_the_newest_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for delay in (0.0, 0.004, 0.009, 0.015):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert saver.stdout is not None
        reported = [int(saver.stdout.readline()) for _ in range(2)][-1]
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        found = AtomicCheckpointIO().load_checkpoint(path)
        assert found["step"] >= reported
        assert (found["state_dict"]["weight"] == found["step"]).all()
    AtomicCheckpointIO().save_checkpoint(payload(1.0), path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"], "leftovers were not swept"


def test_leftovers_of_living_processes_and_other_things_stay(tmp_path: Path) -> None:
    host = checkpoint._host()
    alive = tmp_path / f".partial-checkpoint-{host}-{os.getpid()}-abc"
    elsewhere = tmp_path / ".partial-checkpoint-another_host-1-abc"
    dead = tmp_path / f".partial-checkpoint-{host}-999999999-abc"
    for path in (alive, elsewhere, dead):
        path.touch()
    (tmp_path / f".partial-checkpoint-{host}-1-folder").mkdir()
    AtomicCheckpointIO().save_checkpoint(payload(1.0), tmp_path / "last.ckpt")
    assert alive.exists()
    assert elsewhere.exists()
    assert not dead.exists()


def test_what_could_not_be_resumed_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="never resumed"):
        AtomicCheckpointIO().save_checkpoint({"hyper": Path("x")}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("force", [False, True])
def test_code_in_a_checkpoint_is_never_run(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": Malicious(tmp_path / "canary")}, tmp_path / "evil.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Malicious(tmp_path / "canary")))
    for name in ("evil.ckpt", "raw.ckpt"):
        with pytest.raises(ValueError, match=name):
            AtomicCheckpointIO().load_checkpoint(tmp_path / name, weights_only=False)
    assert not (tmp_path / "canary").exists()


def test_damaged_missing_and_remote_files_are_named(tmp_path: Path) -> None:
    io_plugin = AtomicCheckpointIO()
    path = tmp_path / "torn.ckpt"
    io_plugin.save_checkpoint(payload(1.0), path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ValueError, match=r"torn\.ckpt: this checkpoint is damaged"):
        io_plugin.load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        io_plugin.load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="not read from the web"):
        io_plugin.load_checkpoint("http://127.0.0.1:9/a.ckpt")
