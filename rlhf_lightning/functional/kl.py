"""Estimators of the divergence from a reference model, from sampled tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_lightning.functional._checks import check_aligned, check_choice, check_shape
from rlhf_lightning.functional._numerics import exp_ratio

KLEstimator = Literal["k1", "k2", "k3"]
"""Schulman's three estimators of a Kullback-Leibler divergence; see :func:`kl_estimate`."""


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: KLEstimator = "k3",
    loss_mask: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of ``KL(π || π_ref)`` from tokens sampled from ``π``.

    With ``log r = ref_logprobs - logprobs`` (http://joschu.net/blog/kl-approx.html)::

        k1 = -log r                 unbiased, of high variance, negative on half of the tokens
        k2 = (log r)² / 2           biased, of low variance
        k3 = (r - 1) - log r        unbiased, of low variance, never negative

    That is said of the values. As a loss, the gradient of ``k1`` has expectation 0 (it belongs into
    the reward), that of ``k2`` is the gradient of the divergence, and that of ``k3``, which GRPO
    uses (https://arxiv.org/abs/2402.03300, eq. 4), is the gradient of ``KL(π_ref || π)``. Times the
    differentiable importance ratio, ``k3`` has the gradient of the divergence too, also off-policy
    (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556; TRL's ``use_bias_correction_kl``, on by
    default there): multiply by the ``ratio`` of :func:`clipped_policy_loss`.

    ``r`` follows its tangent where ``log r > 20``: there the gradient of ``k3`` with respect to
    ``logprobs`` stays ``1 - e^20`` instead of overflowing, or of vanishing as behind a clamp.

    Args:
        logprobs: ``[B, T]``, of the policy.
        ref_logprobs: ``[B, T]``, of the reference model, without gradient.
        estimator: which one.
        loss_mask: ``[B, T]`` bool, True where the token counts. Where given, the estimate and its
            gradient are exactly 0 on masked positions, whatever they hold.

    Returns:
        ``[B, T]``.

    Raises:
        ValueError: if shapes differ or the estimator is unknown.

    Example:
        >>> kl_estimate(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -3.0]]), "k3")
        tensor([[0.0000, 0.3679]])
    """
    check_choice("estimator", estimator, get_args(KLEstimator))
    check_shape("logprobs", logprobs, "[B, T]", None, None)
    check_shape("ref_logprobs", ref_logprobs, "[B, T]", *logprobs.shape)
    log_r = ref_logprobs - logprobs
    if loss_mask is not None:
        check_aligned(loss_mask, logprobs=logprobs)
        log_r = torch.where(loss_mask, log_r, 0)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    return exp_ratio(log_r) - 1 - log_r
