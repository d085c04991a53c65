"""Advantages of completions relative to the others of the same prompt.

Notation: ``B`` completions, ``n`` completions of a group that have a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_lightning.functional._checks import check_choice, check_shape

Baseline = Literal["mean", "leave_one_out"]
"""What a reward is compared with: the mean of its group, or of the others of its group."""

AdvantageScale = Literal["group", "batch", "none"]
"""What the difference is divided by: the deviation of its group, of all rewards, or nothing."""


class GroupStatistics(NamedTuple):
    """What is known of the group of each completion, on each of its rows.

    Attributes:
        deviation: ``[B]``, the reward minus the mean of its group; 0 where it has no reward.
        mean: ``[B]``, over the rewards of the group; 0 where it has none.
        std: ``[B]``, the sample deviation (n - 1); 0 where the group has fewer than two rewards.
        num_valid: ``[B]`` int64, the number of rewards of the group.
        zero_std: ``[B]`` bool, True where the group tells nothing: its rewards are all equal, or
            fewer than two. Its mean is TRL's ``frac_reward_zero_std``.
    """

    deviation: Tensor
    mean: Tensor
    std: Tensor
    num_valid: Tensor
    zero_std: Tensor


def total_rewards(
    rewards: Tensor, valid: Tensor, weights: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the scores that are there, ``Σ_r weight_r · reward_r``.

    Args:
        rewards: ``[B, R]``, of R reward functions.
        valid: ``[B, R]`` bool, False where a function gave no score, whatever ``rewards`` holds.
        weights: ``[R]``.

    Returns:
        ``[B]`` sums, 0 where there is no score at all, and ``[B]`` bool, whether there is one.

    >>> rewards = torch.tensor([[1.0, 0.5], [1.0, float("nan")], [0.0, 0.0]])
    >>> valid = torch.tensor([[True, True], [True, False], [False, False]])
    >>> total_rewards(rewards, valid, [1.0, 2.0])
    (tensor([2., 1., 0.]), tensor([ True,  True, False]))
    """
    if rewards.shape != valid.shape or rewards.shape[-1] != len(weights):
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, valid {tuple(valid.shape)} and {len(weights)} weights"
            " do not agree: expected [B, R], [B, R] and R"
        )
    weight = torch.as_tensor(weights, dtype=rewards.dtype, device=rewards.device)
    return (torch.where(valid, rewards, 0.0) * weight).sum(dim=-1), valid.any(dim=-1)


def group_statistics(
    rewards: Tensor, group_ids: Tensor, valid: Tensor | None = None
) -> GroupStatistics:
    """Mean and sample deviation of the rewards of each group.

    Rewards are taken relative to the smallest of their group, so that equal rewards have a
    deviation of exactly 0, also where their mean would round.

    Args:
        rewards: ``[B]``.
        group_ids: ``[B]`` integers, equal for the completions of one prompt, in any order.
        valid: ``[B]`` bool, False where there is no reward. What ``rewards`` holds there (``nan``
            included) is not read.

    Returns:
        The statistics of each row's group.

    Example:
        >>> rewards = torch.tensor([0.0, 2.0, 5.0, 5.0])
        >>> group_statistics(rewards, torch.tensor([7, 7, 3, 3])).std
        tensor([1.4142, 1.4142, 0.0000, 0.0000])
    """
    check_shape("rewards", rewards, "[B]", None)
    check_shape("group_ids", group_ids, "[B]", *rewards.shape)
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    check_shape("valid", valid, "[B]", *rewards.shape)
    groups, group = group_ids.unique(return_inverse=True)

    def total(values: Tensor) -> Tensor:
        """Sum of the values over the group of each row."""
        return values.new_zeros(len(groups)).scatter_add(0, group, values)[group]

    num_valid = total(valid.long())
    known = torch.where(valid, rewards, torch.inf)
    lowest = known.new_full((len(groups),), torch.inf).scatter_reduce(0, group, known, "amin")
    lowest = lowest[group]
    above = torch.where(valid, rewards - lowest, 0)
    mean_above = total(above) / num_valid.clamp(min=1)
    deviation = torch.where(valid, above - mean_above, 0)
    std = (total(deviation.square()) / (num_valid - 1).clamp(min=1)).sqrt()
    mean = torch.where(num_valid > 0, lowest + mean_above, 0)
    return GroupStatistics(deviation, mean, std, num_valid, zero_std=std == 0)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    valid: Tensor | None = None,
    baseline: Baseline = "mean",
    scale: AdvantageScale = "group",
    eps: float = 1e-4,
    batch_std: Tensor | None = None,
) -> Tensor:
    """Group-relative advantages, ``A_i = (r_i - baseline_i) / (std + eps)``.

    * ``baseline="mean"``, ``scale="group"``: GRPO (https://arxiv.org/abs/2402.03300, 4.1.2).
    * ``baseline="mean"``, ``scale="none"``: Dr. GRPO (https://arxiv.org/abs/2503.20783), which
      found that dividing by the deviation favours prompts that are too easy or too hard.
    * ``baseline="leave_one_out"``, ``scale="none"``: RLOO (https://arxiv.org/abs/2402.14740),
      ``r_i - Σ_{j≠i} r_j / (n - 1)``, which is ``n / (n - 1)`` times the above.
    * ``scale="batch"``: the deviation of all rewards (https://arxiv.org/abs/2508.08221).

    The deviation is always that of the whole group, the row itself included: that of the others
    alone is 0 for the odd one out of ``[0, 0.95, 0.95, ...]``, whose advantage would explode.

    Args:
        rewards: ``[B]``.
        group_ids: ``[B]`` integers, equal for the completions of one prompt, in any order.
        valid: ``[B]`` bool, False where there is no reward: left out of all statistics.
        baseline: what a reward is compared with.
        scale: what the difference is divided by.
        eps: added to the deviation; 1e-4 as in TRL.
        batch_std: scalar, the deviation that ``scale="batch"`` divides by, where the rewards are
            only a rank's part of the batch. By default that of ``rewards``.

    Returns:
        ``[B]``; exactly 0 on rows without a reward, and in groups whose rewards are all equal or
        that have a single one.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 0]))
        tensor([ 0.8659, -0.8659,  0.8659, -0.8659])
        >>> group_advantages(
        ...     torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0]),
        ...     baseline="leave_one_out", scale="none",
        ... )
        tensor([ 1.0000, -0.5000, -0.5000])
    """
    check_choice("baseline", baseline, get_args(Baseline))
    check_choice("scale", scale, get_args(AdvantageScale))
    if batch_std is not None and scale != "batch":
        raise ValueError(f"batch_std is given with scale={scale!r}; it belongs to scale='batch'")
    groups = group_statistics(rewards, group_ids, valid)
    advantages = groups.deviation
    if baseline == "leave_one_out":
        advantages = advantages * groups.num_valid / (groups.num_valid - 1).clamp(min=1)
    if scale == "group":
        return advantages / (groups.std + eps)
    if scale == "batch":
        if batch_std is None:
            batch_std = group_statistics(rewards, torch.zeros_like(group_ids), valid).std
        return advantages / (batch_std + eps)
    return advantages
