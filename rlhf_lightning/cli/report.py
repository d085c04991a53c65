"""What ``run`` prints when it is done: figures, samples, where things lie, what to do next."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.cli.recipe import Recipe
from rlhf_lightning.cli.text import printable, table
from rlhf_lightning.io.jsonl import read_jsonl

SAMPLES = "samples.jsonl"
_ROWS = 8


def last_samples(recipe: Recipe, output: Path) -> tuple[Path, list[dict[str, Any]]] | None:
    """The last completions that any stage logged, one a prompt, and the file they are in."""
    for stage in reversed(recipe.stages):
        files = sorted((output / stage.name).glob(f"**/{SAMPLES}"), key=lambda p: p.stat().st_mtime)
        for path in reversed(files):
            records = list(read_jsonl(path).records)
            if records:
                by_prompt = {str(record.get("prompt")): record for record in records}
                return path, list(by_prompt.values())[-_ROWS:]
    return None


def samples_table(samples: Sequence[dict[str, Any]]) -> str:
    """Prompt, completion and reward of logged samples."""
    rows = [("prompt", "completion", "reward")]
    for sample in samples:
        reward = sample.get("reward")
        rows.append(
            (
                printable(_text(sample.get("prompt"))),
                printable(_text(sample.get("completion"))),
                "none" if reward is None else f"{reward:.3g}",
            )
        )
    return table(rows)


def _text(value: Any) -> str:
    """The last message of a conversation, or text as it is."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return "" if value is None else str(value)


def print_report(recipe: Recipe, output: Path, summary: dict[str, float]) -> None:
    """Print everything that a person wants to know after a run.

    Args:
        recipe: what was run.
        output: where.
        summary: the figures.
    """
    figures = [(name, f"{value:.4g}") for name, value in summary.items()]
    print(f"\n{recipe.folder.resolve().name} ({output / 'summary.json'})\n")
    print(textwrap.indent(table([("figure", "value"), *figures]), "  "))
    found = last_samples(recipe, output)
    if found is not None:
        path, samples = found
        print(f"\nThe last samples ({path})\n")
        print(textwrap.indent(samples_table(samples), "  "))
    print("\nWhere the outputs lie\n")
    for stage in recipe.stages:
        folder = output / stage.name
        model = folder / "export"
        print(f"  {folder}" + (f"  (model: {model})" if model.is_dir() else ""))
    if recipe.next_steps:
        print("\nWhat to do next\n")
        for step in recipe.next_steps:
            print(textwrap.indent(step.rstrip(), "  "))
