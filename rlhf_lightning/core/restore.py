"""The trained policy in one of our checkpoints, without a Trainer.

Nothing is instantiated that a checkpoint names: what it says about the model are plain values
(a path, sizes, a chat template), which are checked as a user's would be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.core.config import as_config
from rlhf_lightning.core.reading import CHECKPOINT_KEY, read_checkpoint
from rlhf_lightning.models.loading import ModelConfig, load_tokenizer, model_configuration
from rlhf_lightning.models.restore import restore_causal_lm

_PREFIX = "policy.model."


@dataclass(frozen=True)
class SavedPolicy:
    """What a checkpoint says about its language model.

    Attributes:
        path: the file.
        algorithm: the module that wrote it.
        step: optimizer steps that it has behind it.
        config: the model's architecture and tokenizer.
        weights: its state dictionary.
        chat_template: the tokenizer's when the checkpoint was written, None for its own.
    """

    path: Path
    algorithm: str
    step: int
    config: ModelConfig
    weights: dict[str, Tensor]
    chat_template: Any

    @property
    def name(self) -> str:
        """The file and the step, for people."""
        return f"{self.path} (step {self.step})"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the model was trained with.

        Raises:
            OSError: if the model's base is not where the checkpoint says.
        """
        try:
            tokenizer = load_tokenizer(self.config)
        except OSError as error:
            raise OSError(f"{self._missing_base()} ({error})") from error
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    def configuration(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """The model's sizes.

        Raises:
            OSError: if the model's base is not where the checkpoint says.
        """
        try:
            return model_configuration(self.config, tokenizer)
        except OSError as error:
            raise OSError(f"{self._missing_base()} ({error})") from error

    def model(
        self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """The model with the checkpoint's weights, in evaluation mode.

        Args:
            tokenizer: the checkpoint's.
            dtype: what the weights become; by default what they are.

        Raises:
            OSError: if the model's base is not where the checkpoint says.
            ValueError: if the weights do not fit it.
        """
        dtype = dtype or next(w.dtype for w in self.weights.values() if w.is_floating_point())
        try:
            return restore_causal_lm(self.config, tokenizer, self.weights, dtype)
        except OSError as error:
            raise OSError(f"{self._missing_base()} ({error})") from error
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _missing_base(self) -> str:
        return (
            f"{self.path}: it was trained from the model {self.config.path!r}, whose configuration"
            " and tokenizer are needed beside it and were not found. Name the model with --model"
        )


def read_policy(path: str | Path, base: str | None = None) -> SavedPolicy:
    """Read the model part of a checkpoint.

    Args:
        path: a checkpoint file of one of this package's modules.
        base: folder or hub name with configuration and tokenizer of the model, instead of what the
            checkpoint says.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder of checkpoints, or sharded.
        ValueError: if it is damaged, holds code or was written by another program.
    """
    checkpoint = read_checkpoint(path)
    path = Path(path)
    about = checkpoint.get(CHECKPOINT_KEY)
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in (checkpoint.get("state_dict") or {}).items()
        if name.startswith(_PREFIX) and isinstance(value, Tensor)
    }
    if not isinstance(about, Mapping) or not weights:
        raise ValueError(
            f"{path}: this checkpoint was not written by a module of rlhf_lightning (it has no"
            f" weights under {_PREFIX!r})"
        )
    return SavedPolicy(
        path=path,
        algorithm=str(about.get("algorithm")),
        step=int(checkpoint.get("global_step", 0)),
        config=_model_config(checkpoint, path, base),
        weights=weights,
        chat_template=about.get("chat_template"),
    )


def _model_config(checkpoint: Mapping[str, Any], path: Path, base: str | None) -> ModelConfig:
    saved = (checkpoint.get("hyper_parameters") or {}).get("model")
    if base is None and not isinstance(saved, Mapping):
        raise ValueError(
            f"{path}: the checkpoint does not say which model it was trained from, because the"
            " module was given a model object. Name the model with --model"
        )
    if not isinstance(saved, Mapping):
        return ModelConfig(path=base, dtype="auto")
    try:
        config = as_config(ModelConfig, saved, "model")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its hyperparameters describe no model ({error})") from error
    if base is not None:
        config = dataclasses.replace(
            config, path=base, config=None, tokenizer=None, characters=None, revision=None
        )
    return config
