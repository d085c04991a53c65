"""The language model that a command works with: by name, or out of a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.core.restore import read_policy
from rlhf_lightning.io.disk import first_line
from rlhf_lightning.models.loading import (
    ModelConfig,
    load_causal_lm,
    load_tokenizer,
    model_configuration,
)


class Policy(Protocol):
    """A model of which the small parts can be had before the weights are read."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with the chat template."""
        ...

    def configuration(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """Its sizes."""
        ...

    def model(
        self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None
    ) -> PreTrainedModel:
        """The model itself, in the dtype that it was saved in unless another one is given."""
        ...


class PretrainedPolicy:
    """A folder or a hub name."""

    def __init__(self, path: str) -> None:
        self.name = path
        self.config = ModelConfig(path=path, dtype="auto")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See :class:`Policy`."""
        return load_tokenizer(self.config)

    def configuration(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """See :class:`Policy`."""
        return model_configuration(self.config, tokenizer)

    def model(
        self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None
    ) -> PreTrainedModel:
        """See :class:`Policy`."""
        model: Any = load_causal_lm(self.config, tokenizer)
        return model if dtype is None else model.to(dtype)


def open_policy(options: argparse.Namespace) -> Policy:
    """What ``--model`` and ``--ckpt`` name. No weights are loaded yet.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if neither is given, or the checkpoint cannot be used.
    """
    if options.ckpt is not None:
        return read_policy(options.ckpt, options.model)
    if options.model is None:
        raise ValueError("give --model NAME_OR_FOLDER or --ckpt FILE")
    return PretrainedPolicy(options.model)


def chosen_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, None for ``auto``."""
    return None if name == "auto" else getattr(torch, name)


def chosen_device(name: str) -> torch.device:
    """The device of that name, for ``auto`` a GPU where there is one.

    Raises:
        ValueError: if this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise ValueError(f"--device {name}: this machine does not have it ({reason})") from error
    return device
