"""The text of a completion, in whichever of TRL's two forms it comes."""

from __future__ import annotations

from typing import Any


def completion_text(completion: Any) -> str:
    """What the model wrote: a string as it is, of a conversation the last assistant message.

    Args:
        completion: a string, or a list of messages ``{"role": ..., "content": ...}`` whose content
            is a string, None or a list of parts with a ``"text"``.

    Raises:
        TypeError: where it is neither.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, (list, tuple)) or not all(
        isinstance(message, dict) for message in completion
    ):
        raise TypeError(
            "a completion must be a string or a list of messages, and this is"
            f" {type(completion).__name__}: {str(completion)[:80]!r}"
        )
    written = [m for m in completion if m.get("role", "assistant") == "assistant"]
    content = written[-1].get("content") if written else None
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
