"""DAPO's soft overlong punishment."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.rewards import OverlongPenalty, RewardCombiner


def test_by_hand():
    """Eq. 13: nothing up to 15, then a fifth a token, -1 from the limit of 20 on."""
    penalty = OverlongPenalty(20, 5)
    found = penalty(completion_ids=[[7] * n for n in (0, 1, 15, 16, 18, 20, 21, 50)])
    assert found == pytest.approx([0, 0, 0, -0.2, -0.6, -1, -1, -1])
    assert str(found[0]) == "0.0"


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(1, 60), data=st.data())
def test_it_is_trls(limit, data):
    rewards = pytest.importorskip("trl.rewards")
    buffer = data.draw(st.integers(1, limit))
    completions = [[1] * n for n in range(limit + 5)]
    expected = rewards.get_soft_overlong_punishment(limit, buffer)(completions)
    assert OverlongPenalty(limit, buffer)(completion_ids=completions) == pytest.approx(expected)


def test_it_adds_to_another_reward():
    def right(completions, **columns):
        return [1.0] * len(completions)

    combiner = RewardCombiner([right, OverlongPenalty(4, 2)])
    scored = combiner.score(["p", "p"], ["a", "b"], [[1, 2], [1, 2, 3]], {})
    assert scored.names == ["right", "OverlongPenalty"]
    assert scored.values.tolist() == [[1.0, 0.0], [1.0, -0.5]]
    combiner.close()


@pytest.mark.parametrize("buffer", [0, -1, 21])
def test_bad_buffers_are_refused(buffer):
    with pytest.raises(ValueError, match=f"buffer is {buffer} with max_completion_length=20"):
        OverlongPenalty(20, buffer)
