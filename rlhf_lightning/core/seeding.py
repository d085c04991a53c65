"""Seeds as pure functions of where in the run one is: nothing to save, nothing to drift."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order.

    >>> derive_seed(0, "prompts", 1) == derive_seed(0, "prompts", 1)
    True
    >>> derive_seed(0, "prompts", 1) == derive_seed(1, "prompts", 0)
    False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(length: int, *parts: int | str) -> Tensor:
    """``[length]`` a random order of ``range(length)`` that depends on the parts alone."""
    generator = torch.Generator().manual_seed(derive_seed(*parts))
    return torch.randperm(length, generator=generator)
