"""Configurations small enough for the command line's tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

MODEL = {
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "characters": "0123456789+-*=",
}
TRAINER = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}
GRPO: dict[str, Any] = {
    "trainer": TRAINER,
    "model": {
        "class_path": "GRPOModule",
        "init_args": {"model": MODEL, "kl": {"coef": 0.0}},
    },
    "data": {
        "class_path": "RolloutDataModule",
        "init_args": {
            "prompts": {"class_path": "ArithmeticPrompts", "init_args": {"size": 8, "digits": 1}},
            "rewards": ["MathReward"],
            "sampling": {"n": 2, "max_new_tokens": 3},
            "phase": {"prompts": 2},
            "validation": {
                "prompts": {
                    "class_path": "ArithmeticPrompts",
                    "init_args": {"size": 2, "split": "validation", "digits": 1},
                }
            },
        },
    },
}


@pytest.fixture
def grpo_config() -> dict[str, Any]:
    """A GRPO run of two phases, as plain data that a test may change."""
    return copy.deepcopy(GRPO)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def grpo_file(in_tmp: Path, grpo_config: dict[str, Any]) -> str:
    """The same run as a file."""
    Path("grpo.yaml").write_text(yaml.safe_dump(grpo_config))
    return "grpo.yaml"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a short supervised run on a model from a configuration."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = tiny.quiet_trainer(folder, max_epochs=1)
    trainer.fit(tiny.sft(), tiny.sequences())
    trainer.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "model"
    module = tiny.sft()
    module.configure_model()
    module.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    module.export(folder)
    return folder
