"""Cutting rows into optimizer steps and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.types import StepPlan


def balanced_cut(lengths: list[int], parts: int) -> list[int]:
    """Cut a sorted list into consecutive parts so that the largest padded part is smallest.

    The padded size of a part is its rows times its longest row: what a forward pass costs.

    Args:
        lengths: row lengths in ascending order.
        parts: how many parts, each of at least one row.

    Returns:
        The number of rows of each part.

    >>> balanced_cut([1, 1, 1, 1, 4], 2)
    [4, 1]
    """
    rows = len(lengths)
    if not 1 <= parts <= rows:
        raise ValueError(f"{rows} rows cannot be cut into {parts} parts of at least one row")

    def cut(limit: int) -> list[int] | None:
        """Parts filled greedily up to ``limit`` padded tokens, if that takes at most ``parts``."""
        sizes: list[int] = []
        start = 0
        while start < rows:
            left = parts - len(sizes)
            if left == 0:
                return None
            end = start + 1
            # leave at least one row for each part still to come
            while end < rows - (left - 1) and (end + 1 - start) * lengths[end] <= limit:
                end += 1
            if (end - start) * lengths[end - 1] > limit:
                return None
            sizes.append(end - start)
            start = end
        return sizes

    low, high = max(lengths[-1], 1), max(lengths[-1], 1) * rows
    while low < high:
        middle = (low + high) // 2
        if cut(middle) is None:
            low = middle + 1
        else:
            high = middle
    sizes = cut(low)
    assert sizes is not None
    return sizes


def cut_micro_batches(rows: Tensor, lengths: Tensor, parts: int) -> list[Tensor]:
    """Rows of one optimizer step as micro-batches of balanced padded size.

    Args:
        rows: ``[N]`` row indices of the step.
        lengths: ``[all rows]`` their lengths in tokens.
        parts: how many micro-batches.
    """
    order = rows[torch.argsort(lengths[rows], stable=True)]
    sizes = balanced_cut(lengths[order].tolist(), parts)
    return list(torch.split(order, sizes))


def plan_steps(order: Tensor, lengths: Tensor, steps: int, micro_batches: int) -> StepPlan:
    """Permuted rows cut into equal optimizer steps, and each into micro-batches.

    Args:
        order: ``[N]`` a permutation of this rank's rows; ``steps`` divides N.
        lengths: ``[N]`` row lengths in tokens.
        steps: optimizer steps.
        micro_batches: micro-batches in each.
    """
    return [cut_micro_batches(rows, lengths, micro_batches) for rows in order.chunk(steps)]


def check_token_budget(plan: StepPlan, lengths: Tensor, limit: int | None) -> None:
    """Refuse a micro-batch that is larger than the user allows.

    Raises:
        ValueError: naming the ``accumulate_grad_batches`` that would keep within the limit.
    """
    if limit is None:
        return
    for micro_batches in plan:
        worst = max(len(rows) * int(lengths[rows].max()) for rows in micro_batches)
        if worst <= limit:
            continue
        step_lengths = sorted(int(n) for rows in micro_batches for n in lengths[rows])
        if step_lengths[-1] > limit:
            raise ValueError(
                f"max_tokens_per_micro_batch is {limit}, but one row alone has {step_lengths[-1]}"
                " tokens. Raise the limit or shorten prompts and completions"
            )
        parts = next(
            parts
            for parts in range(len(micro_batches) + 1, len(step_lengths) + 1)
            if _largest_part(step_lengths, parts) <= limit
        )
        raise ValueError(
            f"a micro-batch has {worst} padded tokens, more than"
            f" max_tokens_per_micro_batch={limit}. Set the Trainer's"
            f" accumulate_grad_batches to {parts} (it is {len(micro_batches)})"
        )


def _largest_part(lengths: list[int], parts: int) -> int:
    largest, start = 0, 0
    for size in balanced_cut(lengths, parts):
        largest = max(largest, size * lengths[start + size - 1])
        start += size
    return largest
