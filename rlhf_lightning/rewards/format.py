"""Does the completion have the asked-for form: reasoning and answer in tags, or a pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_lightning.rewards.text import completion_text
from rlhf_lightning.rewards.workers import Outcome, WorkerPool, WorkerResult
from rlhf_lightning.types import RewardResult, Verdict

MAX_CHARS = 100_000
"""The longest completion that a pattern is run on."""


class FormatReward:
    """1 where the completion has the asked-for form, else 0.

    Without a pattern the form is that of DeepSeek-R1-Zero (Guo et al. 2025, table 1): each of
    ``tags`` opened and closed exactly once, in order, with nothing but white space between and
    around the blocks, as in ``<think>...</think> <answer>...</answer>``. It is checked in linear
    time. With ``("think",)`` an answer may follow the block, as in TRL's ``think_format_reward``.

    A pattern runs in a worker process that is killed at ``timeout``, because a regular expression
    with nested repetitions may take longer than the universe has; a timeout scores 0 with verdict
    ``timeout``, and a completion of more than 100,000 characters 0 with ``too_long``.

    Args:
        pattern: a regular expression, ``.`` matching newlines; None for the tags.
        match: whether it must match the whole completion or somewhere in it.
        tags: names of the blocks, where there is no pattern.
        timeout: seconds for one completion, with a pattern.
    """

    def __init__(
        self,
        pattern: str | None = None,
        match: Literal["fullmatch", "search"] = "fullmatch",
        tags: Sequence[str] = ("think", "answer"),
        timeout: float = 1.0,
    ) -> None:
        if match not in ("fullmatch", "search"):
            raise ValueError(f"match is {match!r}; it must be 'fullmatch' or 'search'")
        if pattern is None and (isinstance(tags, str) or not tags or len(set(tags)) < len(tags)):
            raise ValueError(f"tags is {tags!r}; it must be a list of different names")
        self.pattern = pattern
        self.match = match
        self.tags = tuple(tags)
        self.pool: WorkerPool | None = None
        if pattern is not None:
            try:
                re.compile(pattern, re.DOTALL)
            except re.error as error:
                raise ValueError(
                    f"pattern {pattern!r} is no regular expression: {error}"
                ) from error
            task = "rlhf_lightning.rewards._format_task"
            self.pool = WorkerPool(
                f"{task}:matches", f"{task}:use", (pattern, match), workers=1, timeout=timeout
            )

    def __call__(
        self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any
    ) -> list[RewardResult]:
        """Judge completions.

        Args:
            prompts: not used.
            completions: strings or message lists.
            columns: not used.
        """
        texts = [completion_text(completion) for completion in completions]
        if self.pool is None:
            return [_as_result(has_blocks(text, self.tags)) for text in texts]
        results: list[RewardResult] = [RewardResult(0.0, Verdict.TOO_LONG)] * len(texts)
        rows = [row for row, text in enumerate(texts) if len(text) <= MAX_CHARS]
        for row, result in zip(rows, self.pool.map([texts[row] for row in rows]), strict=True):
            results[row] = _from_worker(result)
        return results

    def close(self) -> None:
        """End the worker process, where there is one."""
        if self.pool is not None:
            self.pool.close()


def has_blocks(text: str, tags: Sequence[str]) -> bool:
    """Whether a text is exactly the blocks of these tags, in order, each once.

    >>> has_blocks("<think>2+2</think> <answer>4</answer>", ("think", "answer"))
    True
    >>> has_blocks("<think>2+2</think>4", ("think", "answer"))
    False
    """
    if any(text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1 for tag in tags):
        return False
    rest = text
    for tag in tags:
        before, _, rest = rest.partition(f"<{tag}>")
        _, closed, rest = rest.partition(f"</{tag}>")
        if before.strip() or not closed:
            return False
    return len(tags) == 1 or not rest.strip()


def _as_result(good: bool) -> RewardResult:
    return RewardResult(float(good), Verdict.CORRECT if good else Verdict.WRONG)


def _from_worker(result: WorkerResult) -> RewardResult:
    if result.outcome is Outcome.DONE:
        return _as_result(bool(result.value))
    details = {"error": result.error}
    if result.outcome is Outcome.TIMEOUT:
        return RewardResult(0.0, Verdict.TIMEOUT, details)
    if result.outcome is Outcome.OUT_OF_MEMORY:
        return RewardResult(0.0, Verdict.OUT_OF_MEMORY, details)
    return RewardResult(None, Verdict.CRASH, details)
