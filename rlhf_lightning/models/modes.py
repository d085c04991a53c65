"""Switching models to evaluation and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and each submodule back into the mode it had.

    A bare ``train()`` afterwards would also switch on what was frozen on purpose.
    """
    modes = [(sub, sub.training) for module in modules for sub in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for sub, training in modes:
            sub.training = training
