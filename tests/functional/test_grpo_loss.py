"""A whole GRPO loss composed of the functions: what must not change it, and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from rlhf_lightning.functional import (
    aggregate_loss,
    clipped_policy_loss,
    group_advantages,
    kl_estimate,
    loss_units,
    token_logprobs,
)

VOCABULARY, HIDDEN, LENGTHS = 13, 6, (7, 3, 5, 2, 8, 4, 1, 6)
AGGREGATIONS = [("token", None), ("sequence", None), ("constant", 9)]
SETTINGS = [(how, level) for how in AGGREGATIONS for level in ("token", "sequence")]


class Model(torch.nn.Module):
    """A causal model: a token sees the mean of the embeddings up to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.float64)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64)

    def forward(self, input_ids, loss_mask):
        embedded = self.embedding(input_ids).cumsum(1)
        count = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return token_logprobs(
            (embedded / count).tanh(), self.head.weight, input_ids, loss_mask,
            head_bias=self.head.bias, chunk_size=5,
        )[0]  # fmt: skip


def make_batch(extra_padding: int = 0):
    """Two groups of four completions of uneven lengths, after a prompt of two tokens."""
    generator = torch.Generator().manual_seed(1)
    width = 2 + max(LENGTHS) + extra_padding
    positions, ends = torch.arange(width), 2 + torch.tensor(LENGTHS)[:, None]
    shape = len(LENGTHS), 2 + max(LENGTHS)

    def randn():
        return F.pad(torch.randn(shape, generator=generator).double(), (0, extra_padding))

    ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    rewards = torch.rand(len(LENGTHS), generator=generator).double()
    advantages = group_advantages(rewards, torch.arange(len(LENGTHS)) // 4)
    return {
        "input_ids": F.pad(ids, (0, extra_padding)),
        "loss_mask": (positions >= 2) & (positions < ends),
        "old_logprobs": randn() * 0.5 - 2.5,
        "ref_logprobs": randn() * 0.5 - 2.5,
        "advantages": advantages[:, None].expand(-1, width),
    }


def grpo_loss(model, batch, denominator, setting, beta=0.1):
    (aggregation, _), ratio_level = setting
    loss_mask = batch["loss_mask"]
    logprobs = model(batch["input_ids"], loss_mask)
    policy = clipped_policy_loss(
        logprobs, batch["old_logprobs"], batch["advantages"], loss_mask, ratio_level=ratio_level
    )
    per_token = policy.loss
    if beta:
        kl = kl_estimate(logprobs, batch["ref_logprobs"], "k3", loss_mask)
        per_token = per_token + beta * kl
    return aggregate_loss(per_token, loss_mask, denominator, aggregation == "sequence")


def loss_and_gradients(micro_batches, setting, beta=0.1):
    """One optimizer step, its micro-batches one after the other."""
    model = Model()
    denominator = sum(loss_units(b["loss_mask"], *setting[0]).sum() for b in micro_batches)
    total = 0.0
    for batch in micro_batches:
        loss = grpo_loss(model, batch, denominator, setting, beta)
        loss.backward()
        total += loss.item()
    return total, [parameter.grad for parameter in model.parameters()]


def rows(batch, index):
    """Those rows, without columns that are padding in all of them."""
    picked = {name: value[index] for name, value in batch.items()}
    width = int(picked["loss_mask"].nonzero()[:, 1].max()) + 1
    return {name: value[:, :width] for name, value in picked.items()}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_splits_into_micro_batches_give_the_same_gradients(pieces, setting):
    """R6: rows of uneven lengths, micro-batches of uneven widths and token counts."""
    batch = make_batch()
    expected = loss_and_gradients([batch], setting)
    micro_batches = [rows(batch, index) for index in torch.arange(len(LENGTHS)).chunk(pieces)]
    found = loss_and_gradients(micro_batches, setting)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_padding_and_the_order_of_rows_do_not_matter(setting):
    batch = make_batch()
    expected = loss_and_gradients([batch], setting)
    padded = loss_and_gradients([make_batch(extra_padding=5)], setting)
    torch.testing.assert_close(padded, expected, rtol=1e-12, atol=1e-14)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0))
    permuted = {name: value[order] for name, value in batch.items()}
    found = loss_and_gradients([permuted], setting)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_masked_positions_are_inert(setting):
    """R8, R13, P2-43: padding, prompts and tool output, whatever they hold."""
    batch = make_batch()
    batch["loss_mask"] = batch["loss_mask"] & (torch.arange(10) != 4)  # a tool span
    expected = loss_and_gradients([batch], setting)
    ends = 2 + torch.tensor(LENGTHS)[:, None]
    padding = torch.arange(10) >= ends
    for value in (math.nan, -math.inf, 1e4):
        poisoned = {
            name: torch.where(batch["loss_mask"], tensor, value)
            for name, tensor in batch.items()
            if tensor.is_floating_point()
        }
        ids = torch.where(padding, (batch["input_ids"] + 1) % VOCABULARY, batch["input_ids"])
        found = loss_and_gradients([{**batch, **poisoned, "input_ids": ids}], setting)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_batch_without_a_loss_token_gives_zero_gradients_for_every_parameter(setting):
    """R9, P2-29: also as one micro-batch among others."""
    batch = make_batch()
    nothing = {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}
    loss, gradients = loss_and_gradients([nothing], setting)
    assert loss == 0.0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))
    if setting[0][0] == "token":  # where an empty row is nothing rather than a row
        together = loss_and_gradients([batch, nothing], setting)
        torch.testing.assert_close(together, loss_and_gradients([batch], setting))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("group_size", [1, 8])
def test_constant_rewards_teach_nothing(group_size, setting):
    """P2-28: a group of one, and equal rewards, give a gradient of exactly 0 without KL."""
    batch = make_batch()
    rewards = torch.full((len(LENGTHS),), 0.1)
    advantages = group_advantages(rewards, torch.arange(len(LENGTHS)) // group_size)
    batch["advantages"] = advantages[:, None].double().expand_as(batch["old_logprobs"])
    loss, gradients = loss_and_gradients([batch], setting, beta=0.0)
    assert loss == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_the_first_step_is_reinforce_with_a_baseline():
    """At ratio 1 the gradient is that of the mean of -A log π over the tokens of the step."""
    model, batch = Model(), make_batch()
    with torch.no_grad():
        batch["old_logprobs"] = model(batch["input_ids"], batch["loss_mask"])
    loss, gradients = loss_and_gradients([batch], (("token", None), "token"), beta=0.0)
    logprobs = model(batch["input_ids"], batch["loss_mask"])
    count = batch["loss_mask"].sum()
    (-(logprobs * batch["advantages"]).sum() / count).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)
    masked_advantages = batch["advantages"][batch["loss_mask"]]
    assert loss == pytest.approx(-masked_advantages.mean().item())
