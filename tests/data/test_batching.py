"""Cutting rows into steps and micro-batches: nothing lost, nothing twice, as even as can be."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.core.seeding import derive_seed, permutation
from rlhf_lightning.data.batching import balanced_cut, check_token_budget, plan_steps


def largest(lengths: list[int], sizes: list[int]) -> int:
    worst, start = 0, 0
    for size in sizes:
        worst = max(worst, size * max(lengths[start : start + size]))
        start += size
    return worst


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_the_cut_is_the_best_there_is(lengths: list[int], data: st.DataObject) -> None:
    lengths = sorted(lengths)
    parts = data.draw(st.integers(1, len(lengths)))
    sizes = balanced_cut(lengths, parts)
    assert len(sizes) == parts
    assert sum(sizes) == len(lengths)
    assert min(sizes) >= 1
    best = min(
        largest(lengths, [b - a for a, b in zip((0, *cut), (*cut, len(lengths)), strict=True)])
        for cut in combinations(range(1, len(lengths)), parts - 1)
    )
    assert largest(lengths, sizes) == best


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
def test_a_plan_holds_every_row_once(steps: int, parts: int, rows: int, seed: int) -> None:
    count = steps * parts * rows
    lengths = torch.randint(1, 20, (count,), generator=torch.Generator().manual_seed(seed))
    plan = plan_steps(permutation(count, seed), lengths, steps, parts)
    assert [len(step) for step in plan] == [parts] * steps
    assert {sum(len(part) for part in step) for step in plan} == {parts * rows}
    everything = torch.cat([part for step in plan for part in step])
    assert sorted(everything.tolist()) == list(range(count))


def test_the_budget_error_names_an_accumulation_that_works() -> None:
    lengths = torch.tensor([3, 3, 5, 5, 9, 9])
    plan = plan_steps(torch.arange(6), lengths, 1, 1)
    with pytest.raises(ValueError, match="accumulate_grad_batches to 2") as error:
        check_token_budget(plan, lengths, 20)
    assert "54 padded tokens" in str(error.value)
    check_token_budget(plan_steps(torch.arange(6), lengths, 1, 2), lengths, 20)
    check_token_budget(plan, lengths, None)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99)
)
def test_groups_stay_whole_where_they_can(
    steps: int, parts: int, groups: int, size: int, seed: int
) -> None:
    """``groups`` groups of ``size`` rows a step: whole in a micro-batch if there are enough."""
    count = steps * groups * size
    if groups * size < parts:
        return
    generator = torch.Generator().manual_seed(seed)
    group_ids = torch.randperm(count, generator=generator) % (steps * groups) + 100
    lengths = torch.randint(1, 20, (count,), generator=generator)
    plan = plan_steps(permutation(count, seed), lengths, steps, parts, group_ids)
    assert {sum(len(part) for part in step) for step in plan} == {groups * size}
    everything = torch.cat([part for step in plan for part in step])
    assert sorted(everything.tolist()) == list(range(count))
    pieces = [part for step in plan for part in step] if groups >= parts else map(torch.cat, plan)
    for piece in pieces:
        _, sizes = group_ids[piece].unique(return_counts=True)
        assert set(sizes.tolist()) == {size}


def test_whole_groups_are_cut_by_their_longest_row() -> None:
    group_ids = torch.tensor([0, 0, 1, 1, 2, 2])
    lengths = torch.tensor([1, 9, 2, 2, 3, 3])
    (step,) = plan_steps(torch.tensor([5, 1, 0, 3, 4, 2]), lengths, 1, 2, group_ids)
    assert [sorted(part.tolist()) for part in step] == [[2, 3, 4, 5], [0, 1]]
    # row by row the long one would be alone
    (step,) = plan_steps(torch.arange(6), lengths, 1, 2)
    assert [part.tolist() for part in step] == [[0, 2, 3, 4, 5], [1]]


@pytest.mark.parametrize(("group_ids", "steps"), [([0, 0, 0, 0, 1, 1], 1), ([0, 0, 1, 1, 2, 2], 2)])
def test_groups_that_cannot_stay_whole_are_rows(group_ids: list[int], steps: int) -> None:
    """Of unequal size, or more steps than divide them."""
    lengths = torch.tensor([1, 9, 2, 2, 3, 3])
    order = permutation(6, 4)
    plan = plan_steps(order, lengths, steps, 2, torch.tensor(group_ids))
    expected = plan_steps(order, lengths, steps, 2)
    assert [[p.tolist() for p in s] for s in plan] == [[p.tolist() for p in s] for s in expected]


def test_the_budget_error_counts_whole_groups() -> None:
    """Three groups of two rows of 5: 20 tokens allow two groups, so two micro-batches do."""
    lengths, group_ids = torch.full((6,), 5), torch.arange(6) // 2
    order = torch.arange(6)
    plan = plan_steps(order, lengths, 1, 1, group_ids)
    with pytest.raises(ValueError, match="accumulate_grad_batches to 2"):
        check_token_budget(plan, lengths, 20, group_ids)
    # cut by rows, two parts of three have 15 tokens; a whole group more is 20
    with pytest.raises(ValueError, match="accumulate_grad_batches to 3"):
        check_token_budget(plan, lengths, 19, group_ids)
    check_token_budget(plan_steps(order, lengths, 1, 3, group_ids), lengths, 19, group_ids)


def test_more_parts_than_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows cannot be cut into 3 parts"):
        balanced_cut([1, 2], 3)


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    seeds = {derive_seed(*p) for p in [(0, "a", 1), (1, "a", 0), (0, "b", 1), (0, "a", 11), (0,)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(permutation(9, 3, "x"), permutation(9, 3, "x"))
    assert not torch.equal(permutation(9, 3, "x"), permutation(9, 4, "x"))
    assert torch.equal(torch.get_rng_state(), before)
