"""Weights for the difference between engine and trainer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.functional import importance_weights


def weights_of(ratios: list[list[float]], **options):
    """Weights of tokens with these ratios of probabilities; the first position never counts."""
    old = torch.tensor([[0.0, *map(math.log, row)] for row in ratios], dtype=torch.float64)
    loss_mask = torch.ones(old.shape, dtype=torch.bool)
    loss_mask[:, 0] = False
    return importance_weights(old, torch.zeros_like(old), loss_mask, **options)


@pytest.mark.parametrize(
    ("options", "expected", "out_of_bounds"),
    [
        # Truncated importance sampling, cap 2: only what is above 2 moves.
        ({}, [[0.25, 1.0, 2.0], [0.5, 1.5, 2.0]], [[0, 0, 1], [0, 0, 0]]),
        ({"floor": 0.5}, [[0.5, 1.0, 2.0], [0.5, 1.5, 2.0]], [[1, 0, 1], [0, 0, 0]]),
        # IcePop's mask on both sides: what is outside is 0, what is inside keeps its weight.
        (
            {"mode": "mask", "floor": 0.5, "cap": 3.0},
            [[0.0, 1.0, 0.0], [0.5, 1.5, 2.0]],
            [[1, 0, 1], [0, 0, 0]],
        ),
        # By row: 0.25 * 1 * 4 = 1 and 0.5 * 1.5 * 2 = 1.5.
        ({"level": "sequence"}, [[1.0] * 3, [1.5] * 3], [[0] * 3, [0] * 3]),
        ({"level": "sequence", "cap": 1.2}, [[1.0] * 3, [1.2] * 3], [[0] * 3, [1] * 3]),
        (
            {"level": "sequence", "mode": "mask", "cap": 1.2},
            [[1.0] * 3, [0.0] * 3],
            [[0] * 3, [1] * 3],
        ),
    ],
)
def test_by_hand(options, expected, out_of_bounds):
    found = weights_of([[0.25, 1.0, 4.0], [0.5, 1.5, 2.0]], **options)
    torch.testing.assert_close(found.weight[:, 1:], torch.tensor(expected).double())
    assert found.out_of_bounds[:, 1:].int().tolist() == out_of_bounds
    assert (found.weight[:, 0] == 1).all()
    assert not found.out_of_bounds[:, 0].any()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_where_engine_and_trainer_agree_every_weight_is_exactly_1(mode, level):
    logprobs = -torch.rand(3, 5)
    found = importance_weights(
        logprobs, logprobs, torch.ones(3, 5, dtype=torch.bool), mode=mode, level=level, cap=1.0
    )
    assert (found.weight == 1).all()
    assert not found.out_of_bounds.any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_missing_logprob_has_weight_1_and_is_counted(level):
    """R31: filled with 0 it would have the probability of the token as its weight."""
    old = torch.tensor([[0.0, -3.0, -1.0]])
    rollout = torch.tensor([[0.0, math.nan, -1.5]])
    loss_mask = torch.tensor([[False, True, True]])
    found = importance_weights(old, rollout, loss_mask, level=level)
    expected = math.exp(0.5)
    by_token = [1.0, 1.0, expected]
    by_row = [1.0, expected, expected]
    torch.testing.assert_close(
        found.weight, torch.tensor([by_token if level == "token" else by_row])
    )
    assert found.missing.tolist() == [[False, True, False]]


def test_a_nan_of_the_trainer_is_not_hidden():
    old = torch.tensor([[0.0, math.nan]])
    found = importance_weights(old, torch.zeros(1, 2), torch.tensor([[False, True]]))
    assert found.weight[0, 1].isnan()


@settings(max_examples=40, deadline=None)
@given(
    log_ratios=st.lists(st.floats(-100, 100), min_size=1, max_size=6),
    mode=st.sampled_from(["truncate", "mask"]),
    level=st.sampled_from(["token", "sequence"]),
    cap=st.floats(1, 10),
    floor=st.floats(0, 1),
)
def test_weights_are_within_their_bounds(log_ratios, mode, level, cap, floor):
    """P2-43: also of log-ratios of 100; and what masked positions hold is never read."""
    old = torch.tensor([[math.nan, *log_ratios, -math.inf]], dtype=torch.float64)
    loss_mask = torch.ones(old.shape, dtype=torch.bool)
    loss_mask[:, [0, -1]] = False
    found = importance_weights(
        old.requires_grad_(),
        torch.zeros_like(old),
        loss_mask,
        mode=mode,
        level=level,
        cap=cap,
        floor=floor,
    )
    assert not found.weight.requires_grad
    weight, ratio = found.weight[loss_mask], found.ratio[loss_mask]
    inside = (ratio >= floor) & (ratio <= cap)
    assert torch.equal(~inside, found.out_of_bounds[loss_mask])
    assert torch.equal(weight[inside], ratio[inside])
    if mode == "mask":
        assert (weight[~inside] == 0).all()
    else:
        assert ((weight >= floor) & (weight <= cap)).all()
    assert (found.weight[~loss_mask] == 1).all()
    if level == "sequence":
        assert (weight == weight[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.5}, r"floor is 0\.0 and cap 0\.5"),
        ({"floor": 1.5}, r"floor is 1\.5"),
        ({"floor": -0.1}, r"floor is -0\.1"),
        ({"mode": "clip"}, "mode is 'clip'"),
        ({"level": "row"}, "level is 'row'"),
    ],
)
def test_bad_options_are_refused(options, message):
    zeros, loss_mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        importance_weights(zeros, zeros, loss_mask, **options)
    with pytest.raises(ValueError, match=r"rollout_logprobs must be \[B, T\]"):
        importance_weights(zeros, torch.zeros(1), loss_mask)
