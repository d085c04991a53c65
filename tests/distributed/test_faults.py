"""Two processes, one of which is stopped, dies or hangs: both end soon, and say why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fault_program import TIMEOUT

HERE = Path(__file__).parent
# What leaving takes on a busy machine, where the interpreter alone needs seconds to end.
LEAVING = 20.0


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        status: its exit status.
        seconds: from the fault to the end of all processes.
        last_line: of what they wrote.
    """

    status: int
    seconds: float
    last_line: str


def run(folder: Path, *arguments: object, devices: int = 2) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE.parent}:{HERE}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, HERE / "fault_program.py", folder, devices, *arguments]
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    started = time.monotonic()
    for line in process.stdout:
        if line.startswith("AT "):
            started = time.monotonic()
            break
    try:
        # both pipes close when the last process that holds them has ended
        _, errors = process.communicate(timeout=TIMEOUT + 4 * LEAVING)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = [line for line in errors.splitlines() if line.strip()]
    return Outcome(process.returncode, time.monotonic() - started, lines[-1])


def assert_exact(folder: Path, place: str, where: str = "") -> None:
    """The run that was stopped in ``folder`` goes on to the end of the whole one."""
    uninterrupted = run(folder / "whole", place, "none", 0)
    assert uninterrupted.status == 0, uninterrupted.last_line
    checkpoint = folder / "checkpoints" / "last.ckpt"
    resumed = run(folder, place, "none", 0, checkpoint)
    assert resumed.status == 0, resumed.last_line
    whole, stopped, end = (
        torch.load(folder / name) for name in ("whole/end.pt", "end.pt", "resumed.pt")
    )
    assert end["step"] == whole["step"]
    for name, value in whole["weights"].items():
        assert torch.equal(value, end["weights"][name]), name
    assert stopped["rows"] + end["rows"] == whole["rows"]


def test_sigterm_to_one_process_in_a_rollout_stops_all_exactly(tmp_path: Path) -> None:
    outcome = run(tmp_path, "rollout", "term", 1)
    assert outcome.status == 143
    assert "stopped at step 2; go on with" in outcome.last_line
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]
    assert_exact(tmp_path, "rollout")


def test_a_process_that_is_killed_ends_the_others_and_is_named(tmp_path: Path) -> None:
    outcome = run(tmp_path, "rollout", "kill", 1)
    assert outcome.status == 1
    assert outcome.seconds < TIMEOUT + LEAVING
    cause = "error: process 1 was killed by signal 9; it was last in the rollout of phase 1"
    assert outcome.last_line == cause


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("place", ["engine", "update", "validation"])
def test_sigterm_anywhere(place: str, who: int, tmp_path: Path) -> None:
    outcome = run(tmp_path, place, "term", who)
    assert outcome.status == 143
    assert "go on with ckpt_path=" in outcome.last_line
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]
    assert_exact(tmp_path, place)


PLACES = {
    "rollout": "the rollout of phase 1",
    "update": "the end of step 3",
    "validation": "validation",
}


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("fault", ["kill", "raise", "hang"])
@pytest.mark.parametrize("place", PLACES)
def test_a_lost_process_ends_the_others(place: str, fault: str, who: int, tmp_path: Path) -> None:
    outcome = run(tmp_path, place, fault, who)
    assert outcome.status != 0
    assert outcome.seconds < TIMEOUT + LEAVING
    where = PLACES[place]
    reward = "RewardError: reward function 'noisy_reward' raised KeyError"
    expected = {
        "kill": f"process {who} was killed by signal 9; it was last in",
        "raise": f"process {who} failed in {where}: "
        + ("KeyError: 'out of luck'" if place == "update" else reward),
        "hang": f"process {who} has not answered for {TIMEOUT:g} s; it was last in {where}",
    }[fault]
    if (fault, who) == ("kill", 0):  # it is who would have told
        expected = "process 0 has ended without a word, while process 1 was in"
    assert outcome.last_line.startswith(f"error: {expected}")


@pytest.mark.slow
def test_a_process_that_is_slow_but_alive_is_waited_for(tmp_path: Path) -> None:
    outcome = run(tmp_path, "engine", "progress", 1)
    assert outcome.status == 0, outcome.last_line
