"""Models that are used but never trained: references and reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn


class FrozenModels:
    """A holder that is deliberately no ``nn.Module``.

    What it holds is in no checkpoint, no optimizer, no model summary, and no ``.train()`` of the
    LightningModule reaches it. The LightningModule moves it to its device when fitting starts.
    """

    def __init__(self) -> None:
        self._models: dict[str, nn.Module] = {}

    def __setitem__(self, name: str, model: nn.Module) -> None:
        self._models[name] = model.eval().requires_grad_(False)

    def __getitem__(self, name: str) -> nn.Module:
        return self._models[name]

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def place(
        self, device: torch.device, convert: Callable[[nn.Module], nn.Module] = lambda m: m
    ) -> None:
        """Move every model to the device, and convert its precision as the trained model's."""
        for name, model in self._models.items():
            self._models[name] = convert(model).to(device)
