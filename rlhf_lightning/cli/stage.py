"""One stage of a recipe, run inside this process and leaving it as it was.

Stages share a process because importing torch and transformers takes seconds, and because then one
signal, or one ``kill -9``, ends all there is. The price is paid here: whatever a Trainer changes
for the whole process is set back, so that a stage comes out the same whether the stages before it
ran just now or were done before.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from rlhf_lightning.cli.recipe import Stage
from rlhf_lightning.cli.trainer import RLHFCLI, run_trainer
from rlhf_lightning.cli.yaml_files import dump_yaml


def check_stages(stages: Sequence[Stage], output: Path) -> None:
    """Parse the configurations of all stages, so that a mistake in the last one is found first.

    Args:
        stages: what is going to be run.
        output: the folder of the whole run.

    Raises:
        SystemExit: with status 2, after one message.
    """
    for stage in stages:
        text = dump_yaml(stage.at(output))  # not by way of a file: a full /tmp stops nobody
        try:
            RLHFCLI([stage.command, "--config", text], check_only=True)
        except SystemExit:
            sys.stderr.write(f"(in stage {stage.name})\n")
            raise


def execute(command: str, config: Path, resume: bool) -> dict[str, float]:
    """Run a stage.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: its configuration file.
        resume: go on from the last checkpoint.

    Returns:
        The trainer's final metrics.
    """
    arguments = [command, "--config", str(config)]
    if resume:
        arguments += ["--ckpt_path", "last"]
    with _unchanged_process(arguments):
        trainer = run_trainer(arguments).trainer
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


@contextmanager
def _unchanged_process(arguments: list[str]) -> Iterator[None]:
    """Undo what a Trainer does to the process.

    Args:
        arguments: the command line that stands in ``sys.argv`` meanwhile: Lightning starts the
            other processes of a distributed run with it.
    """
    environment, argv = dict(os.environ), sys.argv
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    was_distributed = _is_distributed()
    sys.argv = [argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if _is_distributed() and not was_distributed:
            torch.distributed.destroy_process_group()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
