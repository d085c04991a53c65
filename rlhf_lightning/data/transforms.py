"""Row transforms of well-known data sets, for ``PromptFile(transforms=[...])``.

A transform takes a row and returns the row that replaces it.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def gsm8k_gold(row: Row) -> Row:
    r"""GSM8K (Cobbe et al., 2021): ``answer`` becomes the number behind ``####``.

    Thousands separators and dollar signs are taken out. The worked solution with its number stays
    as ``solution``.

    Raises:
        ValueError: ``answer`` is missing, or has no number behind ``####``.

    Example:
        >>> gsm8k_gold({"answer": "500 + 650 = 1,150\n#### $1,150"})["answer"]
        '1150'
    """
    solution = _column(row, "answer")
    _, marker, gold = str(solution).rpartition("####")
    gold = gold.strip().replace(",", "").replace("$", "")
    if not marker or not gold:
        raise ValueError(f"no answer behind '####' in {_shown(solution)}")
    return {**row, "answer": gold, "solution": solution}


def number_as_text(row: Row) -> Row:
    """A numeric ``answer`` becomes text, whole numbers without a point (AMC, SVAMP: ``27.0``).

    Raises:
        ValueError: ``answer`` is missing, or neither a number nor text.

    Example:
        >>> number_as_text({"answer": 27.0})["answer"]
        '27'
    """
    answer = _column(row, "answer")
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        raise ValueError(f"answer is {_shown(answer)}; expected a number or text")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return {**row, "answer": str(answer)}


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"no column {name!r}; the row has {sorted(row)}")
    return row[name]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def without_category(row: Row) -> Row:
    """Take out the column ``category``, which in a mixture names the source.

    >>> without_category({"prompt": "a", "category": "b"})
    {'prompt': 'a'}
    """
    return {name: value for name, value in row.items() if name != "category"}
