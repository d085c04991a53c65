"""The stream of prompts: numbered draws, taken back when a phase is abandoned."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning.data.samplers import LearnabilitySampler, PromptSampler, ShuffledSampler
from rlhf_lightning.data.stream import Draw, PromptStream, check_plain

ROWS = [{"prompt": str(i)} for i in range(10)]


class Counting(PromptSampler):
    """Every third prompt, as many of them as it has been told of rewards."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"place": 0, "heard": []}

    def setup(self, rows: Sequence[Any], seed: int, weights: Mapping[str, float] | None) -> None:
        self.rows = len(rows)
        self.state = {"place": 0, "heard": []}

    def draw(self, count: int, phase: int) -> list[int]:
        first = self.state["place"] + len(self.state["heard"])
        self.state["place"] += 3 * count
        return [(first + 3 * i) % self.rows for i in range(count)]

    def update(self, prompts: Sequence[int], rewards: Sequence[Any]) -> None:
        self.state["heard"].append([*zip(prompts, rewards, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.clear()
        self.state.update(state)


def stream(sampler: PromptSampler | None = None, rows: Any = ROWS) -> PromptStream:
    made = PromptStream(sampler or Counting(), seed=0)
    made.start(rows, None)
    return made


def collect(made: PromptStream, phase: int, rounds: int = 2) -> list[Draw]:
    drawn = []
    with made.phase(phase):
        for _ in range(rounds):
            some = made.draw(4)
            made.update(some, [[1.0, 0.0]] * 4)
            drawn += some
    return drawn


def test_positions_count_on_over_rounds_and_phases() -> None:
    made = stream()
    drawn = [*collect(made, 0), *collect(made, 1, rounds=1)]
    assert [draw.position for draw in drawn] == [*range(12)]
    assert [draw.prompt for draw in drawn[:4]] == [0, 3, 6, 9]


@pytest.mark.parametrize("sampler", [Counting, ShuffledSampler, LearnabilitySampler])
def test_an_abandoned_phase_is_drawn_again(sampler: Any) -> None:
    calm = stream(sampler())
    expected = [collect(calm, phase) for phase in range(3)]
    made = stream(sampler())
    assert collect(made, 0) == expected[0]
    saved = repr(made.state_dict())

    def crash() -> None:
        with made.phase(1):
            made.update(made.draw(4), [[0.0, 5.0]] * 4)
            made.draw(2)
            raise KeyError("stopped by the test")

    with pytest.raises(KeyError):
        crash()
    assert repr(made.state_dict()) == saved
    assert [collect(made, 1), collect(made, 2)] == expected[1:]


@pytest.mark.parametrize("sampler", [Counting, ShuffledSampler, LearnabilitySampler])
def test_a_checkpoint_has_the_start_of_the_last_phase_and_its_end(sampler: Any) -> None:
    made = stream(sampler())
    expected = [collect(made, phase) for phase in range(2)]
    saved = made.state_dict()
    expected.append(collect(made, 2))
    for first in (1, 2):  # collected anew for another number of processes, or gone on with
        other = PromptStream(sampler(), seed=0)
        other.load_state_dict(saved)
        other.start(ROWS, None)
        assert [collect(other, phase) for phase in range(first, 3)] == expected[first:]


def test_a_state_that_is_changed_later_does_not_change_what_was_saved() -> None:
    made = stream()
    collect(made, 0)
    saved = made.state_dict()["at_start_of"][1]
    before = repr(saved)
    collect(made, 1)
    assert repr(saved) == before


def test_another_fit_of_the_same_stream_begins_at_the_beginning() -> None:
    made = stream()
    expected = [collect(made, phase) for phase in range(3)]
    made.start(ROWS, None)
    assert [collect(made, phase) for phase in range(3)] == expected


def test_other_data_begin_the_order_anew_and_say_so() -> None:
    made = stream(ShuffledSampler())
    collect(made, 0)
    other = PromptStream(ShuffledSampler(), seed=0)
    other.load_state_dict(made.state_dict())
    with pytest.warns(UserWarning, match=r"begins anew.*prompts 10 -> 7"):
        other.start(ROWS[:7], None)
    drawn = collect(other, 1)
    assert [draw.position for draw in drawn] == [*range(8, 16)]
    fresh = collect(stream(ShuffledSampler(), ROWS[:7]), 0)
    assert [draw.prompt for draw in drawn] == [draw.prompt for draw in fresh]
    other.sampler = Counting()
    with pytest.warns(UserWarning, match=r"begins anew.*ShuffledSampler -> .*Counting"):
        other.start(ROWS[:7], None)


@pytest.mark.parametrize("wrong", [[0, 1], [0, 1, 2, 10], [0, 1, 2, -1], [0, 1, 2, 0.5]])
def test_what_a_sampler_draws_is_checked(wrong: list[Any]) -> None:
    made = stream()
    made.sampler.draw = lambda count, phase: wrong  # type: ignore[method-assign]
    with made.phase(0), pytest.raises(ValueError, match=r"Counting\.draw\(4, 0\) returned"):
        made.draw(4)


def test_numpy_integers_are_places_too() -> None:
    made = stream()
    made.sampler.draw = lambda count, phase: np.arange(count)  # type: ignore[method-assign]
    with made.phase(0):
        assert made.draw(2) == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [np.float64(1)]}, r"state\['a'\]\[0\] is a numpy.float64"),
        ({np.int64(1): 1}, "its key .*1.* is a numpy.int64"),
        ({"a": {1, 2}}, r"state\['a'\] is a builtins.set"),
        (enum.IntEnum("Kind", ["A"]).A, "state is a .*Kind"),
    ],
)
def test_a_state_that_a_checkpoint_cannot_give_back_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_plain(value, "state")


def test_plain_states_pass() -> None:
    check_plain({"a": [1, (2.0, "x", None)], 3: torch.zeros(2)}, "state")


def test_a_sampler_that_saves_something_else_is_refused_in_its_first_phase() -> None:
    made = stream()

    def one_phase() -> None:
        with made.phase(0):
            made.sampler.state["place"] = np.int64(4)  # type: ignore[attr-defined]

    with pytest.raises(TypeError, match=r"Counting\.state_dict\(\)\['place'\] is a numpy.int64"):
        one_phase()
