"""The part of math-verify's work that may hang. Runs in a worker process, never in the trainer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import nan, zoo  # type: ignore[import-untyped]

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
# math-verify takes the t of sin^2 t and the c of a + b + c for units: the second try keeps them.
_NO_UNITS = dataclasses.replace(
    _LATEX,
    normalization_config=dataclasses.replace(_LATEX.normalization_config, units=False),
)


def prepare() -> None:
    """Keep math-verify from logging whole completions, and have it load what it loads lazily."""
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    judge({"gold": r"\frac{1}{2}", "answers": [r"\sqrt{x}"]})


def _parse(expression: str) -> list[Any]:
    """Sympy's reading of an expression, or nothing; no timeout, for the process has one."""
    boxed = rf"\boxed{{{expression}}}"
    found: list[Any] = []
    for config in (_LATEX, _NO_UNITS):
        found = parse(boxed, extraction_config=(config,), parsing_timeout=None)
        if _is_read(found):
            break
    return [reading for reading in found if not any(reading is bad for bad in (nan, zoo))]


_parse_gold = functools.lru_cache(maxsize=8192)(_parse)


def _is_read(readings: list[Any]) -> bool:
    """Whether there is more than the string that math-verify falls back to."""
    return any(not isinstance(reading, str) for reading in readings)


def judge(item: dict[str, Any]) -> str:
    """Compare an answer with the gold.

    Args:
        item: ``gold``, and ``answers``, which must all equal it (the sides of ``2 + 3 = 5``); none
            of them asks whether the gold itself can be read.

    Returns:
        The value of a :class:`rlhf_lightning.types.Verdict`.
    """
    gold = _parse_gold(item["gold"])
    if not _is_read(gold):
        return "gold_unparseable"
    for expression in item["answers"]:
        answer = _parse(expression)
        if not _is_read(answer):
            return "no_answer"
        if not verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None):
            return "wrong"
    return "correct"
