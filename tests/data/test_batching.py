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
