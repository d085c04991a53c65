"""The clipped surrogate loss."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lightning.functional import clipped_policy_loss, masked_mean


def one_token(ratio: float, advantage: float, **options):
    """Loss, gradient with respect to the log-probability, and what was clipped, of one token."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    out = clipped_policy_loss(
        logprobs,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([[advantage]], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.bool),
        **options,
    )
    out.loss.sum().backward()
    clipped = "".join(
        letter
        for letter, flag in zip(
            "lhd", (out.clipped_low, out.clipped_high, out.clipped_dual), strict=True
        )
        if flag.item()
    )
    return out.loss.item(), logprobs.grad.item(), clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "gradient", "clipped"),
    [
        # Inside the trust region: -w A, whose gradient is -w A.
        (1.1, 2.0, {}, -2.2, -2.2, ""),
        (0.9, -2.0, {}, 1.8, 1.8, ""),
        # Outside of it and rewarded for leaving: constant.
        (1.5, 2.0, {}, -2.4, 0.0, "h"),
        (0.5, -2.0, {}, 1.6, 0.0, "l"),
        # Outside of it and punished for leaving: pulled back.
        (0.5, 2.0, {}, -1.0, -1.0, ""),
        (1.5, -2.0, {}, 3.0, 3.0, ""),
        # Clip-higher moves the upper bound only.
        (1.25, 2.0, {"clip_high": 0.28}, -2.5, -2.5, ""),
        (1.5, 2.0, {"clip_high": 0.28}, -2.56, 0.0, "h"),
        (0.5, -2.0, {"clip_high": 0.28}, 1.6, 0.0, "l"),
        # Dual clip bounds the loss of a negative advantage, and leaves positive ones alone.
        (2.5, -2.0, {"dual_clip": 3.0}, 5.0, 5.0, ""),
        (4.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0, "d"),
        (4.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0, "h"),
        (4.0, 0.0, {"dual_clip": 3.0}, 0.0, 0.0, ""),
    ],
)
def test_by_hand(ratio, advantage, options, loss, gradient, clipped):
    found = one_token(ratio, advantage, **options)
    assert found[0] == pytest.approx(loss)
    assert found[1] == pytest.approx(gradient)
    assert found[2] == clipped


def random_batch(rows: int = 3, tokens: int = 7, spread: float = 0.3):
    torch.manual_seed(0)
    logprobs = (-torch.rand(rows, tokens, dtype=torch.float64) * 4).requires_grad_()
    old_logprobs = logprobs.detach() + spread * torch.randn(rows, tokens, dtype=torch.float64)
    advantages = torch.randn(rows, 1, dtype=torch.float64).expand(rows, tokens)
    loss_mask = torch.rand(rows, tokens) < 0.7
    loss_mask[:, 0] = False
    return logprobs, old_logprobs, advantages, loss_mask


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_ratio_one_is_exact_and_gives_the_gradient_of_reinforce(ratio_level):
    logprobs, _, advantages, loss_mask = random_batch()
    out = clipped_policy_loss(
        logprobs, logprobs.detach(), advantages, loss_mask, ratio_level=ratio_level
    )
    assert (out.ratio == 1).all()
    assert torch.equal(out.loss, -torch.where(loss_mask, advantages, 0))
    (gradient,) = torch.autograd.grad(out.loss.sum(), logprobs)
    reinforce = -(logprobs * advantages)[loss_mask].sum()
    (expected,) = torch.autograd.grad(reinforce, logprobs)
    assert torch.equal(gradient, expected)


def gspo(logprobs, old_logprobs, advantages, loss_mask, clip):
    """GSPO, eq. 5 and 7, summed over rows; as the paper writes it."""
    log_ratio = masked_mean(logprobs - old_logprobs, loss_mask, dim=1)
    ratio, advantages = log_ratio.exp(), advantages[:, 0]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).sum()


@pytest.mark.parametrize("clip", [0.01, 0.2, 1.0])
def test_sequence_ratios_are_gspo_in_value_and_gradient(clip):
    logprobs, old_logprobs, advantages, loss_mask = random_batch()
    out = clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        clip_low=clip,
        clip_high=clip,
        ratio_level="sequence",
    )
    ours = masked_mean(out.loss, loss_mask, dim=1).sum()
    theirs = gspo(logprobs, old_logprobs, advantages, loss_mask, clip)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours, logprobs)
    (expected,) = torch.autograd.grad(theirs, logprobs)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_sequence_ratios_keep_the_credit_of_each_token():
    """GSPO-token, eq. 14: a token's advantage moves that token, by the row's ratio."""
    logprobs = torch.log(torch.tensor([[1.0, 1.0, 1.21]]).double()).requires_grad_()
    advantages = torch.tensor([[0.0, 0.0, 1.0]]).double()
    loss_mask = torch.tensor([[False, True, True]])
    zeros = torch.zeros(1, 3).double()
    out = clipped_policy_loss(logprobs, zeros, advantages, loss_mask, ratio_level="sequence")
    out.loss.sum().backward()
    torch.testing.assert_close(out.ratio[:, 1:], torch.full((1, 2), 1.1).double())
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, -1.1]]).double())


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_masked_positions_reach_neither_loss_nor_gradient(dual_clip, ratio_level):
    """R8, R9, P2-43."""
    logprobs, old_logprobs, advantages, loss_mask = random_batch()
    loss_mask[1] = False
    options = {"dual_clip": dual_clip, "ratio_level": ratio_level}
    clean = clipped_policy_loss(logprobs, old_logprobs, advantages, loss_mask, **options)
    (expected,) = torch.autograd.grad(clean.loss.sum(), logprobs)

    def poison(tensor, value):
        return torch.where(loss_mask, tensor.detach(), value)

    for a, b, c in [(-math.inf, -math.inf, 1.0), (math.nan, 0.0, math.nan), (900.0, 0.0, 1.0)]:
        poisoned = poison(logprobs, a).requires_grad_()
        out = clipped_policy_loss(
            poisoned, poison(old_logprobs, b), poison(advantages, c), loss_mask, **options
        )
        out.loss.sum().backward()
        assert torch.equal(out.loss, clean.loss)
        assert torch.equal(poisoned.grad, expected)
        assert (out.loss[~loss_mask] == 0).all()
        assert (out.ratio[~loss_mask] == 1).all()
        flags = out.clipped_low | out.clipped_high | out.clipped_dual | out.missing_old
        assert not flags[~loss_mask].any()


@pytest.mark.parametrize("log_ratio", [-100.0, -50.0, 50.0, 100.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_huge_log_ratios_stay_finite(ratio_level, advantage, log_ratio):
    """R12, P2-43: and a token that ran away against its advantage is still pulled back."""
    logprobs = torch.tensor([[0.0, log_ratio]], requires_grad=True)
    out = clipped_policy_loss(
        logprobs,
        torch.zeros(1, 2),
        torch.full((1, 2), advantage),
        torch.tensor([[False, True]]),
        ratio_level=ratio_level,
    )
    out.loss.sum().backward()
    assert torch.isfinite(out.loss).all()
    assert torch.isfinite(logprobs.grad).all()
    if log_ratio > 0 > advantage:
        assert logprobs.grad[0, 1].item() == pytest.approx(math.exp(20), rel=1e-5)


def test_a_missing_old_logprob_counts_as_ratio_one_and_is_reported():
    """R31: filled with 0 it would be a ratio of e^logprob."""
    logprobs = torch.tensor([[0.0, -3.0, -2.0]], requires_grad=True)
    old_logprobs = torch.tensor([[0.0, math.nan, -2.0]])
    loss_mask = torch.tensor([[False, True, True]])
    out = clipped_policy_loss(logprobs, old_logprobs, torch.ones(1, 3), loss_mask)
    out.loss.sum().backward()
    assert out.ratio.tolist() == [[1.0, 1.0, 1.0]]
    assert out.missing_old.tolist() == [[False, True, False]]
    assert logprobs.grad.tolist() == [[0.0, -1.0, -1.0]]


def test_a_nan_policy_is_not_hidden():
    logprobs = torch.full((1, 2), math.nan)
    loss_mask = torch.tensor([[False, True]])
    out = clipped_policy_loss(logprobs, torch.full((1, 2), math.nan), torch.ones(1, 2), loss_mask)
    assert out.loss[0, 1].isnan()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_gradcheck(ratio_level):
    logprobs, old_logprobs, advantages, loss_mask = random_batch(spread=0.05)
    if ratio_level == "sequence":  # the numeric derivative sees the row's ratio move, as eq. 5 does

        def loss(x):
            out = clipped_policy_loss(
                x, old_logprobs, advantages, loss_mask, ratio_level="sequence"
            )
            return masked_mean(out.loss, loss_mask, dim=1).sum()

    else:

        def loss(x):
            return clipped_policy_loss(x, old_logprobs, advantages, loss_mask, dual_clip=3.0).loss

    assert torch.autograd.gradcheck(loss, logprobs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"dual_clip": 1.1}, "dual_clip is 1.1; it must be greater than"),
        ({"ratio_level": "row"}, "ratio_level is 'row'"),
    ],
)
def test_bad_options_are_refused(options, message):
    zeros, loss_mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(zeros, zeros, zeros, loss_mask, **options)
    with pytest.raises(
        ValueError, match=r"advantages must be \[B, T\], here \[1, 2\]; it is \[1\]"
    ):
        clipped_policy_loss(zeros, zeros, torch.zeros(1), loss_mask)
