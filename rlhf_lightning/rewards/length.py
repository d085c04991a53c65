"""Rewards that look at how long a completion is, and at nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class OverlongPenalty:
    """A penalty that sets in before the length limit does: DAPO's soft overlong punishment.

    A completion that the limit cuts off is usually wrong for no other reason, which is noise. This
    says so gradually (Yu et al. 2025, arXiv 2503.14476, eq. 13), for ``L`` tokens::

        0                                                L <= max_completion_length - buffer
        (max_completion_length - buffer - L) / buffer    up to max_completion_length
        -1                                               beyond

    It is meant to be added to a reward for the answer: list both, each of weight 1. TRL calls it
    ``get_soft_overlong_punishment``.

    Args:
        max_completion_length: the longest completion in tokens, EOS included: what the data module
            has as ``sampling.max_new_tokens``.
        buffer: over how many of the last tokens the penalty grows (a fifth of the limit in the
            paper: 4,096 of 20,480).

    Example:
        >>> penalty = OverlongPenalty(max_completion_length=100, buffer=20)
        >>> penalty(completion_ids=[[1] * 80, [1] * 90, [1] * 100])
        [0.0, -0.5, -1.0]
    """

    def __init__(self, max_completion_length: int, buffer: int) -> None:
        if not 1 <= buffer <= max_completion_length:
            raise ValueError(
                f"buffer is {buffer} with max_completion_length={max_completion_length}; it must be"
                " at least 1 token and at most all of them"
            )
        self.max_completion_length = max_completion_length
        self.buffer = buffer

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Score completions by their lengths.

        Args:
            completion_ids: token ids of each completion, EOS included.
            columns: not used.
        """
        free = self.max_completion_length - self.buffer
        return [-min(max(len(ids) - free, 0) / self.buffer, 1.0) + 0.0 for ids in completion_ids]
