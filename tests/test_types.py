"""Batches, verdicts and sampling parameters."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from rlhf_lightning.types import (
    Completion,
    RolloutBatch,
    SamplingParams,
    SequenceBatch,
    Verdict,
)


def batch() -> RolloutBatch:
    return RolloutBatch(
        input_ids=torch.arange(12).reshape(3, 4),
        attention_mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]),
        loss_mask=torch.zeros(3, 4, dtype=torch.bool),
        rewards=torch.tensor([[1.0], [2.0], [3.0]]),
        temperature=0.7,
        reward_names=("a",),
    )


def test_index_takes_rows_and_cuts_common_padding() -> None:
    part = batch().index(torch.tensor([2, 0]))
    assert part.input_ids.tolist() == [[8, 9, 10], [0, 1, 2]]
    assert part.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert part.rewards.tolist() == [[3.0], [1.0]]
    assert part.temperature == 0.7
    assert part.ref_logprobs is None
    assert len(part) == 2
    assert len(batch().index(torch.tensor([], dtype=torch.long))) == 0


def test_to_moves_tensors_and_the_second_stream() -> None:
    whole = batch()
    whole.auxiliary = SequenceBatch(input_ids=torch.zeros(1, 2), loss_denominator=4.0)
    moved = whole.to("meta")
    assert moved.input_ids.device.type == moved.rewards.device.type == "meta"
    assert moved.auxiliary is not None
    assert moved.auxiliary.input_ids.device.type == "meta"
    assert moved.auxiliary.loss_denominator == 4.0
    assert whole.input_ids.device.type == "cpu"


def test_as_dict_round_trips_without_what_is_missing() -> None:
    fields = batch().as_dict()
    assert set(fields) == {
        "input_ids",
        "attention_mask",
        "loss_mask",
        "rewards",
        "temperature",
        "reward_names",
    }
    again = RolloutBatch(**fields)
    assert torch.equal(again.input_ids, batch().input_ids)
    assert again.advantages is None


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(TypeError, match=r"no field \['advantage'\]"):
        RolloutBatch(advantage=torch.zeros(1))


def test_lightning_does_not_cast_a_batch() -> None:
    precision = HalfPrecision("bf16-true")
    assert precision.convert_input(batch()).rewards.dtype == torch.float32


def test_verdicts_of_the_machinery_carry_no_score() -> None:
    scored = {verdict for verdict in Verdict if verdict.is_scored}
    assert scored == {
        Verdict.CORRECT,
        Verdict.WRONG,
        Verdict.NO_ANSWER,
        Verdict.TOO_LONG,
        Verdict.TIMEOUT,
        Verdict.OUT_OF_MEMORY,
    }
    assert [verdict.code for verdict in Verdict] == list(range(len(Verdict)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "sampling.n is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 0.0, "n": 4}, "would be the same"),
    ],
)
def test_sampling_parameters_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_plain_data() -> None:
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)  # type: ignore[arg-type]
    assert Completion([1], [2], [-0.1], "stop").weight_versions == []
