"""The stream of prompts: every prompt once a lap, whatever the phases and processes."""

from __future__ import annotations

import pytest

from rlhf_lightning.data import stream
from rlhf_lightning.data.stream import PromptStream


def test_a_lap_holds_every_prompt_once_and_laps_differ() -> None:
    prompts = PromptStream(10, 4, seed=3)
    seen = [prompts[place] for phase in range(5) for place in prompts.positions(phase)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    again = PromptStream(10, 4, seed=3)
    assert [again[place] for place in reversed(range(20))] == seen[::-1]


def test_ranks_share_the_prompts_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(PromptStream(10, 4, seed=0).positions(2))
    monkeypatch.setattr(stream, "world_size", lambda: 2)
    shared = []
    for rank in (0, 1):
        monkeypatch.setattr(stream, "rank", lambda rank=rank: rank)
        shared += list(PromptStream(10, 4, seed=0).positions(2))
    assert shared == alone == [8, 9, 10, 11]
