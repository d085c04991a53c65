"""CISPO's loss: log-probabilities under a clipped weight."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lightning.functional import clipped_policy_loss, clipped_weight_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "weight", "flags"),
    [
        (1.1, 2.0, {}, 1.1, ""),
        (0.01, 2.0, {}, 0.01, ""),  # the paper has no lower bound
        (9.0, 2.0, {}, 5.0, "h"),  # PPO's clipping would have no gradient here
        (9.0, -2.0, {}, 5.0, "h"),
        (9.0, 0.0, {}, 5.0, ""),
        (1.5, 1.0, {"clip_high": 0.2}, 1.2, "h"),
        (0.5, -1.0, {"clip_low": 0.2}, 0.8, "l"),
    ],
)
def test_by_hand(ratio, advantage, options, weight, flags):
    """Loss ``-w A log π`` and gradient ``-w A``: the weight itself has none."""
    logprobs = torch.tensor([[0.0, -1.5]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[0.0, -1.5 - math.log(ratio)]], dtype=torch.float64)
    out = clipped_weight_loss(
        logprobs,
        old,
        torch.full((1, 2), advantage, dtype=torch.float64),
        torch.tensor([[False, True]]),
        **options,
    )
    out.loss.sum().backward()
    assert out.loss.tolist()[0] == pytest.approx([0.0, 1.5 * weight * advantage])
    assert logprobs.grad.tolist()[0] == pytest.approx([0.0, -weight * advantage])
    assert out.clipped_low[0, 1] == ("l" in flags)
    assert out.clipped_high[0, 1] == ("h" in flags)
    assert out.ratio[0].tolist() == pytest.approx([1.0, ratio])


def test_on_policy_its_gradient_is_that_of_every_policy_gradient():
    torch.manual_seed(0)
    logprobs = (-torch.rand(3, 5, dtype=torch.float64)).requires_grad_()
    inputs = (logprobs.detach(), torch.randn(3, 5).double(), torch.rand(3, 5) < 0.7)
    (found,) = torch.autograd.grad(clipped_weight_loss(logprobs, *inputs).loss.sum(), logprobs)
    (expected,) = torch.autograd.grad(clipped_policy_loss(logprobs, *inputs).loss.sum(), logprobs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_masked_positions_and_missing_old_logprobs():
    """R9, R31, P2-43."""
    for junk in (math.nan, -math.inf, 900.0):
        logprobs = torch.tensor([[junk, -2.0, -1.0]], requires_grad=True)
        old = torch.tensor([[junk, math.nan, -101.0]])
        advantages = torch.tensor([[junk, 1.0, -1.0]])
        loss_mask = torch.tensor([[False, True, True]])
        out = clipped_weight_loss(logprobs, old, advantages, loss_mask)
        out.loss.sum().backward()
        assert out.loss.tolist() == [[0.0, 2.0, -5.0]]
        assert logprobs.grad.tolist() == [[0.0, -1.0, 5.0]]
        assert out.missing_old.tolist() == [[False, True, False]]


def test_bad_bounds_are_refused():
    zeros, loss_mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"clip_low is 1\.5"):
        clipped_weight_loss(zeros, zeros, zeros, loss_mask, clip_low=1.5)
    with pytest.raises(ValueError, match=r"clip_high is -0\.5"):
        clipped_weight_loss(zeros, zeros, zeros, loss_mask, clip_high=-0.5)
