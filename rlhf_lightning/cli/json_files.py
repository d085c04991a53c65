"""JSON files that are there complete or not at all, and that every JSON reader can read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """The same data in what JSON has: NaN and infinities become None, other objects their text.

    Example:
        >>> plain({"loss": float("nan"), "steps": (1, 2.5), "folder": Path("out")})
        {'loss': None, 'steps': [1, 2.5], 'folder': 'out'}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def write_json(path: Path, content: Any) -> None:
    """Replace a file in one move."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(plain(content), indent=2, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
