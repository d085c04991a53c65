"""The weighted sum over reward functions."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lightning.functional import total_rewards


def test_missing_scores_are_left_out_whatever_they_hold() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.inf], [7.0, 8.0, 9.0]])
    valid = torch.tensor([[True, True, True], [True, False, False], [False] * 3])
    total, any_valid = total_rewards(values, valid, [1.0, 0.5, -2.0])
    assert total.tolist() == [-4.0, 4.0, 0.0]  # 1 + 1 - 6; 4; none
    assert any_valid.tolist() == [True, True, False]


def test_shapes_that_do_not_agree_are_refused() -> None:
    values, valid = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="do not agree"):
        total_rewards(values[:, :2], valid, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="1 weights"):
        total_rewards(values, valid, [1.0])
