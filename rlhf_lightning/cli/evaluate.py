"""``evaluate``: a recipe's own validation set, answered and scored as during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.cli.arguments import ArgumentParser, refusing
from rlhf_lightning.cli.messages import nearest

_EXAMPLES = """\
  rlhf-lightning evaluate --config recipes/grpo/gsm8k.yaml --ckpt_path last
  rlhf-lightning evaluate --config recipes/grpo/gsm8k.yaml --model.model.path my-model \\
      --output outputs/evaluation
  rlhf-lightning evaluate --config recipes/grpo/gsm8k.yaml --data.validation.sampling.n 4 \\
      --data.validation.sampling.temperature 0.7"""


def parser() -> ArgumentParser:
    """The command's own options."""
    parser = ArgumentParser(
        "evaluate",
        "Answer and score the validation set of a recipe, and print the figures. Every option of"
        "\n`fit` is accepted and means the same (rlhf-lightning validate --help lists them).",
        _EXAMPLES,
    )
    parser.add_argument("--config", metavar="FILE", help="the recipe; may be repeated")
    parser.add_argument(
        "--ckpt_path",
        metavar="FILE",
        help="a checkpoint, or last; without it the model is the one that training starts from",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="also write metrics.json and, where completions were made, samples.jsonl",
    )
    return parser


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point of ``evaluate``."""
    mine = parser()
    options, others = mine.parse_known_args(arguments)
    for flag in others:  # Lightning's parser would not think of --output
        if flag.startswith("-") and nearest(flag.partition("=")[0].lstrip("-"), ["output"]):
            mine.error(f"unrecognized arguments: {flag}")
    from rlhf_lightning.cli.evaluation import EvaluationReport
    from rlhf_lightning.cli.trainer import run_trainer

    with refusing():
        report = EvaluationReport(options.output)
    # No logger: the figures are printed, and a run's curves are not to be written into.
    forced = ["--trainer.logger", "false", "--verbose", "false"]
    run_trainer(["validate", *_without_output(arguments), *forced], [report])
    return 0


def _without_output(arguments: Sequence[str]) -> list[str]:
    """The arguments that are Lightning's."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and not argument.startswith("--output=") and argument != "--output":
            kept.append(argument)
        skip = argument == "--output"
    return kept
