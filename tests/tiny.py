"""A language model, a task and data modules small enough for a test."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning.algorithms import GRPOModule, SFTModule
from rlhf_lightning.data import PromptSource, RolloutDataModule, SFTDataModule
from rlhf_lightning.data.phase import PhaseConfig
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.types import Completion, SamplingParams

CHARACTERS = "0123456789+="


def tiny_model(seed: int = 0, **config: Any) -> dict[str, Any]:
    """Options of a random two-layer Llama over digits."""
    return {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **config,
        },
        "characters": CHARACTERS,
        "init_seed": seed,
    }


def tiny_float64_model(seed: int = 0) -> dict[str, Any]:
    """Options of a random GPT-2 over digits, without dropout.

    For comparisons to the last digits of float64: transformers computes parts of a Llama in float32
    whatever its precision.
    """
    config = {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    return {"config": config, "characters": CHARACTERS, "init_seed": seed}


class Sums(PromptSource):
    """All sums of two digits, or the first ``size`` of them."""

    def __init__(self, size: int = 100) -> None:
        self.size = size

    def load(self) -> list[dict[str, Any]]:
        rows = []
        for a in range(10):
            for b in range(10):
                total = str(a + b)
                rows.append({"prompt": f"{a}+{b}=", "completion": total, "answer": total})
        return rows[: self.size]


def share_of_digits(completions: list[str], **kwargs: Any) -> list[float]:
    """A dense reward, so that even a random model has something to learn."""
    return [sum(c.isdigit() for c in text) / 4 for text in completions]


class ScriptedEngine(RolloutEngine):
    """Completions that follow from the prompt's seed alone, of very different lengths."""

    def bind(self, model: Any, tokenizer: Any) -> None:
        self.version = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Any,
        *,
        seeds: Sequence[int],
        on_progress: Any = None,
    ) -> list[list[Completion]]:
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            draw, group = random.Random(seed), []
            for _ in range(sampling.n):
                length = draw.choice([1, 1, 2, 12])
                ids = [draw.randrange(3, 13) for _ in range(length)]
                reason = "length" if length == 12 else "stop"
                group.append(Completion(list(prompt), ids, [-1.0] * length, reason))
            groups.append(group)
            if on_progress is not None:
                on_progress(len(groups) * sampling.n, len(prompts) * sampling.n)
        return groups

    def update_weights(self, named_parameters: Iterable, version: int) -> None:
        self.version = version

    def close(self) -> None:
        pass


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def grpo(model: dict[str, Any] | None = None, **options: Any) -> GRPOModule:
    return GRPOModule(model or tiny_model(), **{"optimizer": adamw, **options})


def sft(model: dict[str, Any] | None = None, **options: Any) -> SFTModule:
    return SFTModule(model or tiny_model(), **{"optimizer": adamw, **options})


def rollouts(steps: int = 2, update_epochs: int = 1, **options: Any) -> RolloutDataModule:
    defaults: dict[str, Any] = {
        "prompts": Sums(),
        "rewards": [share_of_digits],
        "sampling": SamplingParams(n=4, max_new_tokens=4),
        "phase": PhaseConfig(prompts=4, steps=steps, update_epochs=update_epochs),
    }
    return RolloutDataModule(**{**defaults, **options})


def sequences(**options: Any) -> SFTDataModule:
    return SFTDataModule(**{"dataset": Sums(), "batch_size": 16, **options})


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(
            isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", [])
        ),
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **options})
