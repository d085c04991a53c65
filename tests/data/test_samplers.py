"""Samplers: every prompt its turn, in the right proportions, from any saved state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.core.seeding import permutation
from rlhf_lightning.data.samplers import (
    CategoryTurns,
    LearnabilitySampler,
    OrderedSampler,
    PromptSampler,
    ShuffledSampler,
)

LEVELS = [3, 1, 2, 1, 5, 4]
ROWS = [{"prompt": f"p{i}", "level": level} for i, level in enumerate(LEVELS)]
MIXED = [{**row, "category": "ab"[i % 2]} for i, row in enumerate(ROWS)]
WEIGHTS = {"a": 0.75, "b": 0.25}

SAMPLERS: dict[str, Callable[[], PromptSampler]] = {
    "shuffled": ShuffledSampler,
    "ordered": lambda: OrderedSampler("level"),
    "learnability": LearnabilitySampler,
}


def ready(sampler: PromptSampler, weights: dict[str, float] | None = None, seed: int = 3) -> Any:
    sampler.setup(ROWS if weights is None else MIXED, seed, weights)
    return sampler


def reward_of(prompt: int) -> list[float | None]:
    """The less certain, the higher the number of the prompt."""
    return [0.0, float(prompt), None]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_what_follows_is_a_function_of_the_saved_state(kind: str, weights: Any) -> None:
    sampler = ready(SAMPLERS[kind](), weights)
    for phase in range(3):
        drawn = sampler.draw(4, phase)
        sampler.update(drawn, [reward_of(prompt) for prompt in drawn])
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in sampler.state_dict().items()}
    after = [sampler.draw(4, phase) for phase in range(3, 12)]
    other = ready(SAMPLERS[kind](), weights)
    other.load_state_dict(state)
    assert [other.draw(4, phase) for phase in range(3, 12)] == after
    again = ready(sampler, weights)
    assert [again.draw(4, phase) for phase in range(3, 12)] != after


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_seeds_give_different_orders(kind: str, weights: Any) -> None:
    orders = [ready(SAMPLERS[kind](), weights, seed).draw(24, 0) for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_the_default_order_is_the_permutation_of_each_lap() -> None:
    sampler = ready(ShuffledSampler())
    laps = [permutation(6, 3, "prompts", lap).tolist() for lap in range(3)]
    assert sampler.draw(4, 0) + sampler.draw(14, 1) == laps[0] + laps[1] + laps[2]


def test_each_category_goes_in_laps_of_its_own() -> None:
    drawn = ready(ShuffledSampler(), WEIGHTS).draw(24, 0)
    first, second = ([i for i in drawn if i % 2 == k] for k in (0, 1))
    assert (len(first), len(second)) == (18, 6)
    for lap in range(6):
        assert sorted(first[3 * lap : 3 * lap + 3]) == [0, 2, 4]
    for lap in range(2):
        assert sorted(second[3 * lap : 3 * lap + 3]) == [1, 3, 5]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12))
def test_categories_are_never_a_whole_turn_away_from_their_share(numbers: list[float]) -> None:
    weights = {str(i): number / sum(numbers) for i, number in enumerate(numbers)}
    turns, bound = CategoryTurns(weights), 1 - 1 / max(2 * len(numbers) - 2, 1)
    seen: Counter[str] = Counter()
    for turn in range(1, 400):
        name, before = turns.take()
        assert before == seen[name]
        seen[name] += 1
        away = max(abs(seen[name] - turn * weight) for name, weight in weights.items())
        assert away <= bound + 1e-9


def test_a_category_without_prompts_cannot_have_a_weight() -> None:
    with pytest.raises(ValueError, match=r"prompts\.weights\.b is 0\.25, but no prompt of that"):
        ShuffledSampler().setup(MIXED[::2], 0, WEIGHTS)


def test_ordered_goes_up_the_column_once_and_is_shuffled_then() -> None:
    drawn = ready(OrderedSampler("level")).draw(12, 0)
    assert drawn[:6] == [1, 3, 2, 0, 5, 4]  # equal ones in the order of the source
    assert sorted(drawn[6:]) == [*range(6)]
    assert drawn[6:] != drawn[:6]


def test_ordered_in_every_lap_downwards_and_by_default_as_the_source() -> None:
    down = ready(OrderedSampler("level", descending=True, laps=None)).draw(12, 0)
    assert down == [4, 5, 0, 2, 1, 3] * 2
    assert ready(OrderedSampler(laps=2)).draw(12, 0) == [*range(6)] * 2


def test_ordered_within_the_categories_of_a_mixture() -> None:
    drawn = ready(OrderedSampler("level"), {"a": 0.5, "b": 0.5}).draw(6, 0)
    assert [LEVELS[i] for i in drawn if i % 2 == 0] == [2, 3, 5]
    assert [LEVELS[i] for i in drawn if i % 2 == 1] == [1, 1, 4]


@pytest.mark.parametrize("bad", [None, "hard", float("nan")])
def test_ordered_names_the_prompt_that_cannot_be_sorted(bad: Any) -> None:
    rows = [*ROWS, {"prompt": "odd one", "level": bad}]
    with pytest.raises(ValueError, match=r"sampler\.column is 'level', and prompt 'odd one' has"):
        OrderedSampler("level").setup(rows, 0, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OrderedSampler(laps=0), r"sampler\.laps is 0"),
        (lambda: LearnabilitySampler(smoothing=0), r"sampler\.smoothing is 0"),
        (lambda: LearnabilitySampler(smoothing=1.5), r"sampler\.smoothing is 1\.5"),
        (lambda: LearnabilitySampler(floor=-0.1), r"sampler\.floor is -0\.1"),
    ],
)
def test_bad_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_learnability_by_hand() -> None:
    sampler = ready(LearnabilitySampler(smoothing=0.5, floor=0.1))
    assert sampler.preference().tolist() == [1.0] * 6
    # variances 1/3 (of 0, 0, 0, 1: 1/4), 0, and unknown where fewer than two have a reward
    sampler.update([0, 1, 2], [[0, 0, 0, 1], [1, 1, 1], [1, None, None]])
    assert sampler.preference().tolist() == pytest.approx([1, 0.1, 1, 1, 1, 1])
    sampler.update([1, 0], [[0, 1], [2, 2]])  # 0 -> 0.25 and 0.25 -> 0.125
    assert sampler.preference().tolist() == pytest.approx([0.1 + 0.9 / 2, 1, 1, 1, 1, 1])


def test_learnability_weighs_a_success_rate_by_p_times_one_minus_p() -> None:
    sampler = LearnabilitySampler(smoothing=0.02, floor=0.0)
    sampler.setup([{"prompt": "p"}] * 3, 0, None)
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.1, 0.5, 0.8])
    for _ in range(1500):
        rewards = [(torch.rand(8, generator=generator) < rate).float().tolist() for rate in rates]
        sampler.update([0, 1, 2], rewards)
    expected = rates * (1 - rates) / 0.25
    assert sampler.preference().tolist() == pytest.approx(expected.tolist(), abs=0.15)


def test_learnability_draws_in_proportion_and_never_twice_at_once() -> None:
    sampler = ready(LearnabilitySampler(smoothing=1.0, floor=0.0))
    sampler.update(range(6), [[0, 0], [0, 0], [0, 0], [0, 0], [0, 1], [0, 3**0.5]])
    single = Counter(prompt for _ in range(2000) for prompt in sampler.draw(1, 0))
    assert set(single) == {4, 5}
    assert single[5] / 2000 == pytest.approx(0.75, abs=0.04)
    uniform = ready(LearnabilitySampler(floor=1.0))
    for _ in range(20):
        assert len(set(uniform.draw(6, 0))) == 6


def test_learnability_repeats_only_what_it_must() -> None:
    sampler = ready(LearnabilitySampler())
    assert sorted(Counter(sampler.draw(15, 0)).values()) == [2, 2, 2, 3, 3, 3]
    nothing = ready(LearnabilitySampler(floor=0.0))
    nothing.update(range(6), [[1, 1]] * 6)
    assert sorted(nothing.draw(6, 0)) == [*range(6)]


def test_learnability_goes_on_where_one_category_has_nothing_to_teach() -> None:
    sampler = ready(LearnabilitySampler(floor=0.0), {"a": 0.5, "b": 0.5})
    sampler.update(range(6), [[0, i % 2] for i in range(6)])
    for _ in range(5):
        assert sorted(sampler.draw(6, 0)) == [*range(6)]


def test_learnability_keeps_the_proportions_of_a_mixture() -> None:
    sampler = ready(LearnabilitySampler(), WEIGHTS)
    sampler.update([1, 3, 5], [[0, 1]] * 3)
    drawn = sampler.draw(8, 0)
    assert sum(prompt % 2 == 0 for prompt in drawn) == 6
