"""Matching a user's pattern, which may backtrack for ever. Runs in a worker process."""

from __future__ import annotations

import re
from collections.abc import Callable

_match: Callable[[str], object]


def use(pattern: str, method: str) -> None:
    """Set the pattern, and how it is applied: ``"fullmatch"`` or ``"search"``."""
    global _match
    _match = getattr(re.compile(pattern, re.DOTALL), method)


def matches(text: str) -> bool:
    """Whether the pattern matches the text."""
    return _match(text) is not None
