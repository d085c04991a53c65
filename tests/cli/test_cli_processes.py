"""The command line in two processes, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

REWARD = """
def broken(completions, **columns):
    raise LookupError("no such thing")
"""


def start(folder: Path, config: dict[str, Any], *arguments: str, devices: int = 2) -> Any:
    (folder / "my_rewards.py").write_text(REWARD)
    (folder / "grpo.yaml").write_text(yaml.safe_dump(config))
    flags = ["--trainer.devices", str(devices)]
    flags += ["--trainer.strategy", "ddp"] if devices > 1 else []
    return subprocess.run(
        [sys.executable, "-m", "rlhf_lightning", *arguments, "--config", "grpo.yaml", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_fault_of_a_reward_is_told_by_one_process(tmp_path: Path, grpo_config: dict) -> None:
    grpo_config["data"]["init_args"]["rewards"] = ["my_rewards.broken"]
    done = start(tmp_path, grpo_config, "fit")
    assert done.returncode != 0
    assert done.stderr.count("LookupError: no such thing\n") == 1
    assert done.stderr.count("error: reward function 'broken' raised") == 1
    assert done.stdout.count("rlhf_lightning.algorithms.grpo.GRPOModule") == 1


def test_evaluate_counts_every_row_once(tmp_path: Path, grpo_config: dict) -> None:
    validation = grpo_config["data"]["init_args"]["validation"]
    validation["prompts"]["init_args"]["size"] = 7
    validation["batch_size"] = 2
    reports = []
    for devices in (2, 1):
        done = start(tmp_path, grpo_config, "evaluate", "--output", str(devices), devices=devices)
        assert done.returncode == 0, done.stderr[-2000:]
        folder = tmp_path / str(devices)
        samples = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
        figures = json.loads((folder / "metrics.json").read_text())
        reports.append((list(samples), {**figures, "seconds": None}))
    assert [sample["id"] for sample in reports[0][0]] == [f"{row}-0" for row in range(7)]
    assert reports[0] == reports[1]
