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


def cut_micro_batches(
    rows: Tensor, lengths: Tensor, parts: int, group_ids: Tensor | None = None
) -> list[Tensor]:
    """Rows of one optimizer step as micro-batches of balanced padded size.

    Rows of a group share their prompt, which the model reads once in a micro-batch: groups stay
    whole if they are of one size and there are enough of them.

    Args:
        rows: ``[N]`` row indices of the step.
        lengths: ``[all rows]`` their lengths in tokens.
        parts: how many micro-batches.
        group_ids: ``[all rows]`` the same for rows of a group; None if there are none.
    """
    groups = _equal_groups(rows, group_ids)
    if len(groups) >= parts:
        longest = torch.stack([lengths[group].max() for group in groups])
        order = torch.argsort(longest, stable=True).tolist()
        cut = torch.tensor(order).split(balanced_cut(longest[order].tolist(), parts))
        return [torch.cat([groups[i] for i in part.tolist()]) for part in cut]
    sorted_rows = rows[torch.argsort(lengths[rows], stable=True)]
    return list(sorted_rows.split(balanced_cut(lengths[sorted_rows].tolist(), parts)))


def plan_steps(
    order: Tensor,
    lengths: Tensor,
    steps: int,
    micro_batches: int,
    group_ids: Tensor | None = None,
) -> StepPlan:
    """Permuted rows cut into equal optimizer steps, and each into micro-batches.

    Groups of one size stay whole in a step if the steps divide them evenly.

    Args:
        order: ``[N]`` a permutation of this rank's rows; ``steps`` divides N.
        lengths: ``[N]`` row lengths in tokens.
        steps: optimizer steps.
        micro_batches: micro-batches in each.
        group_ids: ``[N]`` the same for rows of a group; None if there are none.
    """
    groups = _equal_groups(order, group_ids)
    if groups and len(groups) % steps == 0:
        order = torch.cat(groups)
    return [
        cut_micro_batches(rows, lengths, micro_batches, group_ids) for rows in order.chunk(steps)
    ]


def check_token_budget(
    plan: StepPlan, lengths: Tensor, limit: int | None, group_ids: Tensor | None = None
) -> None:
    """Refuse a micro-batch that is larger than the user allows.

    What is counted are rows times longest row: with packing, an upper bound on the tokens.

    Args:
        plan: micro-batches as :func:`plan_steps` cuts them.
        lengths: row lengths in tokens.
        limit: the most padded tokens of a micro-batch; None for no limit.
        group_ids: as the plan was made with.

    Raises:
        ValueError: naming the ``accumulate_grad_batches`` that would keep within the limit.
    """
    if limit is None:
        return
    for micro_batches in plan:
        worst = _largest(micro_batches, lengths)
        if worst <= limit:
            continue
        rows = torch.cat(micro_batches)
        longest = int(lengths[rows].max())
        if longest > limit:
            raise ValueError(
                f"max_tokens_per_micro_batch is {limit}, but one row alone has {longest}"
                " tokens. Raise the limit or shorten prompts and completions"
            )
        parts = next(
            parts
            for parts in range(len(micro_batches) + 1, len(rows) + 1)
            if _largest(cut_micro_batches(rows, lengths, parts, group_ids), lengths) <= limit
        )
        raise ValueError(
            f"a micro-batch has {worst} padded tokens, more than"
            f" max_tokens_per_micro_batch={limit}. Set the Trainer's"
            f" accumulate_grad_batches to {parts} (it is {len(micro_batches)})"
        )


def _largest(micro_batches: list[Tensor], lengths: Tensor) -> int:
    """Padded tokens of the largest micro-batch."""
    return max(len(rows) * int(lengths[rows].max()) for rows in micro_batches)


def _equal_groups(rows: Tensor, group_ids: Tensor | None) -> list[Tensor]:
    """Rows by group, in order of appearance; none if the groups differ in size."""
    if group_ids is None:
        return []
    members: dict[int, list[int]] = {}
    for row, group in zip(rows.tolist(), group_ids[rows].tolist(), strict=True):
        members.setdefault(group, []).append(row)
    groups = [torch.tensor(group) for group in members.values()]
    return groups if len({len(group) for group in groups}) == 1 else []
