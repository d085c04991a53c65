"""Masked sums and means, loss units and the aggregation of a loss."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lightning.functional import aggregate_loss, loss_units, masked_mean, masked_sum

MASK = torch.tensor([[False, True, True, False], [False, True, True, True]])
LOSS = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 3.0, 5.0, 7.0]])


def test_masked_sum_and_mean_by_hand():
    assert masked_sum(LOSS, MASK).item() == 18.0
    assert masked_sum(LOSS, MASK, dim=1).tolist() == [3.0, 15.0]
    assert masked_sum(LOSS, MASK, dim=0).tolist() == [0.0, 4.0, 7.0, 7.0]
    assert masked_mean(LOSS, MASK).item() == pytest.approx(3.6)
    assert masked_mean(LOSS, MASK, dim=1).tolist() == [1.5, 5.0]


def test_empty_masks_give_zero():
    nothing = torch.zeros_like(MASK)
    assert masked_sum(LOSS, nothing).item() == 0.0
    assert masked_mean(LOSS, nothing).item() == 0.0
    assert masked_mean(LOSS, nothing, dim=1).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_positions_reach_neither_value_nor_gradient(poison):
    values = torch.where(MASK, LOSS, poison).requires_grad_()
    mean = masked_mean(values, MASK)
    mean.backward()
    assert mean.item() == pytest.approx(3.6)
    torch.testing.assert_close(values.grad, MASK / 5)


def test_loss_units_of_each_aggregation():
    mask = torch.cat([MASK, torch.zeros(1, 4, dtype=torch.bool)])
    assert loss_units(mask, "token").tolist() == [2.0, 3.0, 0.0]
    assert loss_units(mask, "sequence").tolist() == [1.0, 1.0, 1.0]
    assert loss_units(mask, "constant", 8).tolist() == [8.0, 8.0, 8.0]
    assert loss_units(mask, "token").dtype == torch.float32


def test_aggregations_by_hand():
    tokens = loss_units(MASK, "token").sum()
    assert aggregate_loss(LOSS, MASK, tokens).item() == pytest.approx(18 / 5)
    rows = loss_units(MASK, "sequence").sum()
    per_sequence = aggregate_loss(LOSS, MASK, rows, per_sequence=True)
    assert per_sequence.item() == pytest.approx((1.5 + 5.0) / 2)
    constant = loss_units(MASK, "constant", 10).sum()
    assert aggregate_loss(LOSS, MASK, constant).item() == pytest.approx(18 / 20)


def test_an_empty_row_counts_as_a_row_and_not_as_tokens():
    empty_row = torch.zeros(1, 4, dtype=torch.bool)
    mask, loss = torch.cat([MASK, empty_row]), torch.cat([LOSS, torch.full((1, 4), math.nan)])
    rows = loss_units(mask, "sequence").sum()
    assert aggregate_loss(loss, mask, rows, per_sequence=True).item() == pytest.approx(6.5 / 3)
    tokens = loss_units(mask, "token").sum()
    assert aggregate_loss(loss, mask, tokens).item() == pytest.approx(18 / 5)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("denominator", [0.0, torch.tensor(0.0)])
def test_a_step_without_a_token_has_loss_zero_and_a_graph(denominator, per_sequence):
    loss = torch.full((2, 4), math.nan, requires_grad=True)
    total = aggregate_loss(loss, torch.zeros_like(MASK), denominator, per_sequence)
    total.backward()
    assert total.item() == 0.0
    assert loss.grad.tolist() == torch.zeros(2, 4).tolist()


def test_a_small_denominator_is_used_as_it_is():
    """A step's units over accumulation and world size may be less than 1."""
    assert aggregate_loss(LOSS, MASK, 0.5).item() == pytest.approx(36.0)
    assert aggregate_loss(LOSS, MASK, torch.tensor(0.5)).item() == pytest.approx(36.0)


@pytest.mark.parametrize(
    ("aggregation", "constant", "message"),
    [
        ("constant", None, "constant is None"),
        ("constant", 0, "constant is 0"),
        ("token", 5, "constant is 5"),
        ("mean", None, "aggregation is 'mean'"),
    ],
)
def test_wrong_units_are_refused(aggregation, constant, message):
    with pytest.raises(ValueError, match=message):
        loss_units(MASK, aggregation, constant)


def test_wrong_masks_and_shapes_are_refused():
    with pytest.raises(TypeError, match=r"loss_mask must be bool .* torch.int64"):
        aggregate_loss(LOSS, MASK.long(), 1.0)
    with pytest.raises(ValueError, match=r"per_token_loss must be \[B, T\], here \[2, 4\]"):
        aggregate_loss(LOSS[:1], MASK, 1.0)
    with pytest.raises(ValueError, match=r"loss_mask must be \[B, T\].*it is \[4\]"):
        loss_units(MASK[0], "token")
