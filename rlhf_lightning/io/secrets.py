"""Keeping passwords and keys out of files and messages.

An option named like a secret should hold the *name* of an environment variable. Where it holds the
secret itself, what is saved says so instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

REDACTED = "<redacted>"
"""Stands in saved options for a value that was left out."""

_WORDS = frozenset({"apikey", "credential", "credentials", "passphrase", "passwd", "password"})
_WORDS |= {"pwd", "secret", "secrets"}
_PAIRS = {"key": frozenset({"access", "api", "auth", "encryption", "private", "signing"})}
# most tokens of this field are words of a language
_PAIRS["token"] = frozenset({"access", "api", "auth", "bearer", "hf", "hub", "login", "refresh"})
_PAIRS["token"] |= {"github", "openai", "session", "wandb"}
_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]+@")
_SHORTEST = 8
"""Shorter values of environment variables are no secrets worth the name (``1``, ``true``)."""


def is_secret_name(name: str) -> bool:
    """Whether an option or variable of this name holds a secret.

    >>> [is_secret_name(n) for n in ("api_key", "hfToken", "DB_PASSWORD", "token")]
    [True, True, True, True]
    >>> [is_secret_name(n) for n in ("eos_token", "max_new_tokens", "key", "tokenizer")]
    [False, False, False, False]
    """
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower()
    parts = re.split(r"[^a-z0-9]+", words)
    if parts == ["token"] or _WORDS & set(parts):
        return True
    pairs = pairwise(parts)
    return any(first in _PAIRS.get(second, ()) for first, second in pairs)


def redact_text(text: str) -> str:
    """The text without user names and passwords of URLs, and without secrets of the environment.

    >>> redact_text("https://me:hunter2@example.org/model was not found")
    'https://<redacted>@example.org/model was not found'
    """
    text = _USER_INFO.sub(rf"\g<scheme>{REDACTED}@", text)
    for name, value in os.environ.items():
        if name == "PWD":  # the working folder
            continue
        if len(value) >= _SHORTEST and value in text and is_secret_name(name):
            text = text.replace(value, f"${name}")
    return text


def redact(value: Any, name: str = "") -> Any:
    """Options fit to be saved: the same, without secrets.

    Args:
        value: mappings, lists and plain values.
        name: the option's own name.

    Returns:
        A copy in which the text of an option that is named like a secret is ``<redacted>``, unless
        it is the name of an environment variable; other text as of :func:`redact_text`.
    """
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([redact(item, name) for item in value])
    if not isinstance(value, str):
        return value
    return REDACTED if _is_secret(name, value) else redact_text(value)


def secret_options(value: Any) -> list[str]:
    """The dotted names of the options that :func:`redact` would leave out."""
    return [path for path, name, text in _texts(value) if _is_secret(name, text)]


def redacted_options(value: Any) -> list[str]:
    """The dotted names of the options whose value was left out when they were saved."""
    return [path for path, _, text in _texts(value) if REDACTED in text]


def _texts(value: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """``(dotted name, own name, text)`` of all text in some options."""
    if isinstance(value, str):
        yield path, name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key), str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _texts(item, f"{path}.{i}", name)


def _is_secret(name: str, value: str) -> bool:
    if not value or not is_secret_name(name) or value in os.environ:
        return False
    return not (_VARIABLE.fullmatch(value) and is_secret_name(value))
