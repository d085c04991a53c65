"""The clipped surrogate losses of PPO, GRPO and their relatives."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_lightning.functional._checks import check_aligned, check_choice
from rlhf_lightning.functional._numerics import exp_ratio
from rlhf_lightning.functional.reductions import masked_mean

RatioLevel = Literal["token", "sequence"]
"""Whether each token has its own importance ratio, or all tokens of a row share one."""


class PolicyLossOutput(NamedTuple):
    """The loss of each token, and what clipping did to it.

    Attributes:
        loss: ``[B, T]``, exactly 0 on masked positions.
        ratio: ``[B, T]``, the importance ratio before clipping; 1 on masked positions.
        clipped_low: ``[B, T]`` bool, clipping at ``1 - clip_low`` changed the token's gradient.
        clipped_high: ``[B, T]`` bool, clipping at ``1 + clip_high`` did.
        clipped_dual: ``[B, T]`` bool, clipping at ``dual_clip`` did.
        missing_old: ``[B, T]`` bool, the old log-probability was ``nan`` and the ratio taken as 1.
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    missing_old: Tensor


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_level: RatioLevel = "token",
    dual_clip: float | None = None,
) -> PolicyLossOutput:
    """Clipped surrogate loss of each token.

    With the ratio ``w = π / π_old``::

        loss = -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A)
        loss = min(loss, -dual_clip A)                              where A < 0, with dual_clip

    * PPO, https://arxiv.org/abs/1707.06347, eq. 7: ``clip_low = clip_high``.
    * Clip-higher (DAPO, https://arxiv.org/abs/2503.14476, section 3.1): ``clip_high=0.28``.
    * Dual clip (Ye et al., https://arxiv.org/abs/1912.09729, eq. 5), known as two-sided clipping or
      ``delta`` in INTELLECT-2 and TRL: bounds the loss of a token with a negative advantage.
    * GSPO (https://arxiv.org/abs/2507.18071), ``ratio_level="sequence"``: every token of a row has
      the ratio ``s = exp(mean_t log w_t)``, with its gradient through its own log-probability
      (GSPO-token, eq. 14). Where the advantages of a row are all equal this is GSPO, eq. 5,
      in value and gradient.

    Args:
        logprobs: ``[B, T]``, of the policy.
        old_logprobs: ``[B, T]``, of the policy that the completions are taken to come from, without
            gradient. ``nan`` says that a token's is not known: its ratio is 1.
        advantages: ``[B, T]``, without gradient.
        loss_mask: ``[B, T]`` bool, True where the token counts. What the other tensors hold on
            masked positions reaches neither the loss nor the gradient.
        clip_low: how far the ratio may fall below 1; in [0, 1].
        clip_high: how far it may rise above 1; 0 or more.
        ratio_level: a ratio for each token or for each row.
        dual_clip: bound of the ratio for negative advantages, greater than ``1 + clip_high``; Ye et
            al. use 3. None has none.

    Returns:
        The loss and what was clipped. Ratios are exactly 1 where ``logprobs == old_logprobs``.
        Above e^20 they follow the tangent of the exponential, so that neither they nor their
        gradients overflow.

    Raises:
        ValueError: if a bound is out of its range or shapes differ.

    Example:
        >>> out = clipped_policy_loss(
        ...     logprobs=torch.tensor([[0.5, 1.5, 1.0]]).log(),
        ...     old_logprobs=torch.zeros(1, 3),
        ...     advantages=torch.tensor([[-1.0, 1.0, 2.0]]),
        ...     loss_mask=torch.ones(1, 3, dtype=torch.bool),
        ... )
        >>> out.loss
        tensor([[ 0.8000, -1.2000, -2.0000]])
        >>> out.clipped_low, out.clipped_high
        (tensor([[ True, False, False]]), tensor([[False,  True, False]]))
    """
    check_aligned(loss_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_choice("ratio_level", ratio_level, get_args(RatioLevel))
    _check_bounds(clip_low, clip_high, dual_clip)

    ratio, missing_old = _importance_ratio(logprobs, old_logprobs, loss_mask, ratio_level)
    advantages = torch.where(loss_mask, advantages, 0)
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    negative = advantages < 0
    clipped_dual = torch.zeros_like(loss_mask)
    if dual_clip is not None:
        objective = torch.where(
            negative, torch.maximum(objective, dual_clip * advantages), objective
        )
        clipped_dual = (ratio > dual_clip) & negative
    return PolicyLossOutput(
        loss=-objective,
        ratio=ratio,
        clipped_low=(ratio < 1 - clip_low) & negative,
        clipped_high=(ratio > 1 + clip_high) & (advantages > 0),
        clipped_dual=clipped_dual,
        missing_old=missing_old,
    )


def clipped_weight_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> PolicyLossOutput:
    """REINFORCE of each token, under a clipped importance weight without gradient: CISPO.

    With the ratio ``w = π / π_old`` (MiniMax-M1, https://arxiv.org/abs/2506.13585, eq. 4 and 5)::

        loss = -stop_gradient(clip(w, 1 - clip_low, 1 + clip_high)) A log π

    Where PPO's clipping takes a token out of the gradient, this one bounds its weight, so that rare
    tokens on which the policy moved far (``However``, ``Wait``) still teach something.

    Args:
        logprobs: ``[B, T]``, of the policy.
        old_logprobs: ``[B, T]``, as in :func:`clipped_policy_loss`; ``nan`` is a ratio of 1.
        advantages: ``[B, T]``, without gradient.
        loss_mask: ``[B, T]`` bool, as in :func:`clipped_policy_loss`.
        clip_low: how far the weight may fall below 1; in [0, 1]. 1, as in the paper, has no bound.
        clip_high: how far it may rise above 1; 0 or more. The paper leaves it open; 4 is a largest
            weight of 5 (ScaleRL, https://arxiv.org/abs/2510.13786, whose ``ε_max`` TRL takes too).

    Returns:
        The loss, and where a bound changed the weight.

    Raises:
        ValueError: if a bound is out of its range or shapes differ.

    Example:
        >>> logprobs = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
        >>> out = clipped_weight_loss(
        ...     logprobs,
        ...     old_logprobs=torch.tensor([[0.25, 0.05]]).log(),
        ...     advantages=torch.ones(1, 2),
        ...     loss_mask=torch.ones(1, 2, dtype=torch.bool),
        ... )
        >>> torch.autograd.grad(out.loss.sum(), logprobs)[0]
        tensor([[-2., -5.]])
    """
    check_aligned(loss_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    _check_bounds(clip_low, clip_high, None)
    ratio, missing_old = _importance_ratio(logprobs.detach(), old_logprobs, loss_mask, "token")
    advantages = torch.where(loss_mask, advantages, 0)
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    useful = advantages != 0
    return PolicyLossOutput(
        loss=-weight * advantages * torch.where(loss_mask, logprobs, 0),
        ratio=ratio,
        clipped_low=(ratio < 1 - clip_low) & useful,
        clipped_high=(ratio > 1 + clip_high) & useful,
        clipped_dual=torch.zeros_like(loss_mask),
        missing_old=missing_old,
    )


def _importance_ratio(
    logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor, level: RatioLevel
) -> tuple[Tensor, Tensor]:
    """``[B, T]`` ``π / π_old``, 1 on masked positions, and where ``π_old`` was not known."""
    missing = loss_mask & old_logprobs.isnan()
    old_logprobs = torch.where(missing, logprobs.detach(), old_logprobs)
    log_ratio = torch.where(loss_mask, logprobs - old_logprobs, 0)
    if level == "sequence":
        mean_log_ratio = masked_mean(log_ratio.detach(), loss_mask, dim=1)
        # The value of the row's ratio, the gradient of the token's log-probability.
        log_ratio = mean_log_ratio[:, None] + (log_ratio - log_ratio.detach())
        log_ratio = torch.where(loss_mask, log_ratio, 0)
    return exp_ratio(log_ratio), missing


def _check_bounds(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low is {clip_low}; it must be in [0, 1]")
    if clip_high < 0:
        raise ValueError(f"clip_high is {clip_high}; it must be 0 or more")
    if dual_clip is not None and dual_clip <= 1 + clip_high:
        raise ValueError(
            f"dual_clip is {dual_clip}; it must be greater than 1 + clip_high = {1 + clip_high}"
        )
