"""Weights that correct for an engine whose probabilities are not quite the trainer's."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_lightning.functional._checks import check_aligned, check_choice
from rlhf_lightning.functional._numerics import exp_ratio
from rlhf_lightning.functional.policy_loss import RatioLevel
from rlhf_lightning.functional.reductions import masked_sum

WeightBound = Literal["truncate", "mask"]
"""What happens to a weight out of bounds: it is moved to the bound, or becomes 0."""


class ImportanceWeights(NamedTuple):
    """What each token's loss is multiplied by, and how that came about.

    Attributes:
        weight: ``[B, T]``, without gradient; 1 on masked positions.
        ratio: ``[B, T]``, the weight before its bounds; 1 on masked positions.
        out_of_bounds: ``[B, T]`` bool, the ratio was truncated or masked.
        missing: ``[B, T]`` bool, the rollout log-probability was ``nan`` and its ratio taken as 1.
    """

    weight: Tensor
    ratio: Tensor
    out_of_bounds: Tensor
    missing: Tensor


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    mode: WeightBound = "truncate",
    level: RatioLevel = "token",
    cap: float = 2.0,
    floor: float = 0.0,
) -> ImportanceWeights:
    """Importance weights of the trainer's distribution against the one that was sampled from.

    An inference engine computes other probabilities than the trainer does for the same weights, so
    its completions are slightly off-policy before the first update. With ``w = π_old / π_rollout``
    of a token, or of all tokens of a row together (``w = exp(Σ_t log w_t)``)::

        truncate:  min(max(w, floor), cap)
        mask:      w where floor <= w <= cap, else 0

    * Truncated importance sampling (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl):
      ``"truncate"`` by token, ``cap=2``.
    * Masked importance sampling (Liu et al. 2025, https://richardli.xyz/rl-collapse): ``"mask"`` by
      sequence, ``cap=3``, which are TRL's defaults.
    * IcePop (https://arxiv.org/abs/2510.18855): ``"mask"`` by token, ``floor=0.5``, ``cap=5``.

    Both log-probabilities must be those of the same distribution: of the same temperature, and over
    the whole vocabulary. Those of top-k, top-p or min-p sampling are normalised over the tokens
    that were kept, so the ratio would contain the probability kept, which is no difference between
    the two.

    Args:
        old_logprobs: ``[B, T]``, the trainer's at the time of the rollout.
        rollout_logprobs: ``[B, T]``, the engine's, under the distribution that it sampled from.
            ``nan`` says that a token's is not known: its ratio is 1.
        loss_mask: ``[B, T]`` bool, True where the token counts. Nothing else is read.
        mode: what happens to a weight out of bounds.
        level: a weight for each token or for each row.
        cap: the largest weight.
        floor: the smallest weight.

    Returns:
        The weights and what became of them.

    Raises:
        ValueError: if the bounds do not enclose 1, or shapes differ.

    Example:
        >>> weights = importance_weights(
        ...     torch.tensor([[0.0, 1.0, 3.0]]).log(),
        ...     torch.tensor([[0.0, 2.0, 1.0]]).log(),
        ...     torch.tensor([[False, True, True]]),
        ... )
        >>> weights.weight
        tensor([[1.0000, 0.5000, 2.0000]])
        >>> weights.out_of_bounds
        tensor([[False, False,  True]])
    """
    check_aligned(loss_mask, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    check_choice("mode", mode, get_args(WeightBound))
    check_choice("level", level, get_args(RatioLevel))
    if not 0 <= floor <= 1 <= cap:
        raise ValueError(f"floor is {floor} and cap {cap}; they must enclose 1, with floor >= 0")
    missing = loss_mask & rollout_logprobs.isnan()
    known = loss_mask & ~missing
    log_ratio = torch.where(known, old_logprobs.detach() - rollout_logprobs, 0)
    if level == "sequence":
        of_row = masked_sum(log_ratio, loss_mask, dim=1)[:, None]
        log_ratio = torch.where(loss_mask, of_row, 0)
    ratio = exp_ratio(log_ratio)
    out_of_bounds = (ratio < floor) | (ratio > cap)
    weight = ratio.clamp(floor, cap) if mode == "truncate" else ratio.masked_fill(out_of_bounds, 0)
    return ImportanceWeights(weight, ratio, out_of_bounds, missing)
