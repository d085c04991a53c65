"""Text for a terminal: what a model wrote must not control it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WIDTH = 48


def printable(text: str, width: int = _WIDTH) -> str:
    r"""Text of a model on one line of a terminal: control characters as escapes, cut to a width.

    Example:
        >>> printable("a\x1b[31mb\n")
        'a\\x1b[31mb\\n'
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:width])
    return shown if len(shown) <= width and len(text) <= width else shown[: width - 1] + "…"


def visible(text: str, indent: str = "") -> str:
    r"""Text of a model as it is, over several lines, with other control characters as escapes.

    Args:
        text: what to show.
        indent: begins every line, so that none can pass for one of ours.

    Example:
        >>> print(visible("a\x1b[2Jb\nc", indent="  "))
          a\x1b[2Jb
          c
    """
    lines = text.split("\n")
    return "\n".join(
        indent + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def many(number: int, what: str) -> str:
    """A number of things.

    Example:
        >>> many(1, "row"), many(2000, "row")
        ('1 row', '2,000 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def short_path(place: Any) -> str:
    """A path as it is said from the working directory, if it lies below that."""
    path = Path(str(place))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
