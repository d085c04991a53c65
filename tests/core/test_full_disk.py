"""A disk that is really full: a small one of the test's own, in a private mount namespace."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MOUNT = "mount -t tmpfs -o size=3m tmpfs {folder}"


def private_disks() -> bool:
    """Whether this machine lets a process mount a disk that only it sees."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    trial = ["unshare", "-rm", "sh", "-c", MOUNT.format(folder="/mnt")]
    return subprocess.run(trial, capture_output=True).returncode == 0


@pytest.mark.skipif(not private_disks(), reason="needs to mount a small disk (unshare -rm)")
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    program = f"{sys.executable} {HERE / 'full_disk_program.py'} {tmp_path}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{MOUNT.format(folder=tmp_path)} && exec {program}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    files = {
        "checkpoint": r"checkpoints-\d+/step=4\.ckpt: writing failed after [\d,]+ bytes",
        "samples": r"samples-\d+\.jsonl: writing failed after [\d,]+ bytes",
        "dropping": r"samples-\d+\.jsonl: writing failed",
        "export": "export: writing failed",
        "tensorboard": r"a disk is full\. .*/tb/version_0: [\d,]+ bytes",
        "config": r"status 2: \S+",
    }
    assert {what.split()[0] for what in said} == set(files)
    for what, message in said.items():
        kind = what.split()[0]
        assert re.search(files[kind], message), f"{what}: {message}"
        assert str(tmp_path) in message
        if kind not in ("tensorboard", "config"):
            assert re.search(
                r"; [\d,]+ bytes are free there\. .* (is|are) intact|as it was", message
            )
