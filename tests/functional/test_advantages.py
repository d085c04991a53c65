"""Group-relative and leave-one-out advantages."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.functional import group_advantages, group_statistics

ONE_GROUP = torch.zeros(4, dtype=torch.long)


def rewards_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_grpo_by_hand():
    """Mean 0.25, sample deviation 0.5."""
    advantages = group_advantages(rewards_of(1, 0, 0, 0), ONE_GROUP)
    expected = rewards_of(0.75, -0.25, -0.25, -0.25) / (0.5 + 1e-4)
    torch.testing.assert_close(advantages, expected)


def test_dr_grpo_does_not_divide():
    advantages = group_advantages(rewards_of(1, 0, 0, 0), ONE_GROUP, scale="none")
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    rewards = rewards_of(1.0, 0.5, 0.0, 3.0)
    advantages = group_advantages(rewards, ONE_GROUP, baseline="leave_one_out", scale="none")
    expected = [1 - 3.5 / 3, 0.5 - 4 / 3, 0 - 4.5 / 3, 3 - 1.5 / 3]
    torch.testing.assert_close(advantages, rewards_of(*expected))


def test_leave_one_out_is_n_over_n_minus_one_times_mean_centred():
    torch.manual_seed(0)
    rewards, group_ids = torch.randn(12, dtype=torch.float64), torch.arange(12) // 3
    leave_one_out = group_advantages(rewards, group_ids, baseline="leave_one_out", scale="none")
    centred = group_advantages(rewards, group_ids, scale="none")
    torch.testing.assert_close(leave_one_out, centred * 3 / 2)


def test_batch_scale_divides_by_the_deviation_of_all_rewards():
    rewards, group_ids = rewards_of(1, 0, 5, 3), torch.tensor([0, 0, 1, 1])
    spread = statistics.stdev([1, 0, 5, 3])
    advantages = group_advantages(rewards, group_ids, scale="batch")
    expected = rewards_of(0.5, -0.5, 1, -1) / (spread + 1e-4)
    torch.testing.assert_close(advantages, expected)
    of_all_ranks = torch.tensor(2.0, dtype=torch.float64)
    advantages = group_advantages(rewards, group_ids, scale="batch", batch_std=of_all_ranks, eps=0)
    assert advantages.tolist() == [0.25, -0.25, 0.5, -0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 11])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.95, -0.3, 1e6 + 0.1])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(baseline, scale, value, size, dtype):
    """P2-28, R10: also for values whose mean rounds; and GRPO on constant rewards is 0."""
    rewards = torch.full((size,), value, dtype=dtype)
    group_ids = torch.zeros(size, dtype=torch.long)
    advantages = group_advantages(rewards, group_ids, baseline=baseline, scale=scale)
    assert advantages.tolist() == [0.0] * size
    assert group_statistics(rewards, group_ids).zero_std.all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_the_odd_one_out_is_bounded(baseline, scale):
    """R10: a deviation over the others would be 0 here, and the advantage -9500."""
    rewards = torch.tensor([0.0] + [0.95] * 7)
    group_ids = torch.zeros(8, dtype=torch.long)
    advantages = group_advantages(rewards, group_ids, baseline=baseline, scale=scale)
    bound = 7 / math.sqrt(8) * (8 / 7 if baseline == "leave_one_out" else 1)
    assert advantages.abs().max().item() <= bound + 1e-6
    assert advantages[0].item() < 0 < advantages[1].item()


def test_rows_without_a_reward_are_left_out():
    valid = torch.tensor([True, True, False, True])
    rewards = rewards_of(1, 0, math.nan, 2)
    advantages = group_advantages(rewards, ONE_GROUP, valid=valid)
    of_three = group_advantages(rewards_of(1, 0, 2), ONE_GROUP[:3])
    torch.testing.assert_close(advantages[valid], of_three)
    assert advantages[2].item() == 0.0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("num_valid", [0, 1])
def test_groups_with_one_reward_or_none_give_zero(num_valid, baseline, scale):
    """P2-28."""
    valid = torch.arange(4) < num_valid
    rewards = torch.where(valid, 0.7, math.nan)
    advantages = group_advantages(rewards, ONE_GROUP, valid=valid, baseline=baseline, scale=scale)
    assert advantages.tolist() == [0.0] * 4


def test_statistics_on_each_row():
    rewards = rewards_of(1, 4, 3, 6, math.inf, 8)
    group_ids = torch.tensor([5, 9, 5, 9, 5, 2])
    valid = torch.tensor([True, True, True, True, False, True])
    groups = group_statistics(rewards, group_ids, valid)
    assert groups.mean.tolist() == [2, 5, 2, 5, 2, 8]
    assert groups.num_valid.tolist() == [2, 2, 2, 2, 2, 1]
    assert groups.deviation.tolist() == [-1, -1, 1, 1, 0, 0]
    torch.testing.assert_close(groups.std, math.sqrt(2) * rewards_of(1, 1, 1, 1, 1, 0))
    assert groups.zero_std.tolist() == [False] * 5 + [True]


@given(
    rows=st.lists(
        st.tuples(st.floats(-1e3, 1e3), st.integers(-3, 3), st.booleans()), min_size=1, max_size=12
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_agrees_with_a_loop_and_does_not_depend_on_the_order_of_rows(rows, seed):
    values, ids, known = zip(*rows, strict=True)
    rewards, group_ids, valid = rewards_of(*values), torch.tensor(ids), torch.tensor(known)
    advantages = group_advantages(rewards, group_ids, valid=valid)
    for i, (value, group, is_known) in enumerate(rows):
        others = [v for v, g, k in rows if g == group and k]
        expected = 0.0
        if is_known and len(others) > 1:
            spread = statistics.stdev(others)
            expected = (value - statistics.fmean(others)) / (spread + 1e-4)
        assert advantages[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-8)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    permuted = group_advantages(rewards[order], group_ids[order], valid=valid[order])
    torch.testing.assert_close(permuted, advantages[order])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "median"}, "baseline is 'median'"),
        ({"scale": "std"}, "scale is 'std'"),
        ({"batch_std": torch.ones(())}, "batch_std is given with scale='group'"),
        (
            {"valid": torch.ones(3, dtype=torch.bool)},
            r"valid must be \[B\], here \[4\]; it is \[3\]",
        ),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(4), ONE_GROUP, **options)
