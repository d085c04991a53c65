"""Figures of scored completions: means over what has a score, counts of what has none."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.core.completions import record_completions
from rlhf_lightning.core.metrics import PhaseMetrics
from rlhf_lightning.types import RolloutBatch, Verdict


def scored_batch(valid_rows: list[bool] | None = None) -> RolloutBatch:
    correct, wrong, crash = (v.code for v in (Verdict.CORRECT, Verdict.WRONG, Verdict.CRASH))
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]).bool()
    return RolloutBatch(
        input_ids=torch.zeros(4, 4, dtype=torch.long),
        attention_mask=torch.ones(4, 4, dtype=torch.long),
        loss_mask=mask,
        rewards=torch.tensor([[1.0, 2.0], [0.0, 4.0], [0.0, 0.0], [0.0, 0.0]]),
        reward_valid=torch.tensor([[True, True], [True, True], [False, False], [True, False]]),
        verdicts=torch.tensor([[correct, -1], [wrong, -1], [crash, -1], [wrong, -1]]),
        truncated=torch.tensor([True, False, False, False]),
        valid=None if valid_rows is None else torch.tensor(valid_rows),
        reward_names=("math", "length"),
        reward_weights=(1.0, 0.5),
    )


def test_means_counts_and_lengths() -> None:
    metrics = PhaseMetrics()
    record_completions(scored_batch(), metrics)
    assert metrics.compute() == pytest.approx(
        {
            "reward": (2.0 + 2.0 + 0.0) / 3,
            "rewards/missing": 1.0,
            "rewards/math/mean": 1 / 3,
            "rewards/math/verdict/correct": 1.0,
            "rewards/math/verdict/wrong": 2.0,
            "rewards/math/verdict/crash": 1.0,
            "rewards/length/mean": 3.0,
            "accuracy": 1 / 3,
            "completions/mean_length": 8 / 4,
            "completions/mean_terminated_length": 5 / 3,
            "completions/clipped_ratio": 0.25,
            "completions/min_length": 1.0,
            "completions/max_length": 3.0,
        }
    )


def test_categories_have_figures_of_their_own() -> None:
    alone, told = PhaseMetrics(), PhaseMetrics()
    record_completions(scored_batch([True, True, True, False]), alone)
    record_completions(scored_batch([True, True, True, False]), told, ["a", "b", "a", "c"])
    found = told.compute()
    own = {name: value for name, value in found.items() if not name.startswith("category/")}
    assert own == alone.compute()
    assert {name: value for name, value in found.items() if name not in own} == pytest.approx(
        {
            "category/a/reward": 2.0,
            "category/a/rewards/missing": 1.0,
            "category/a/rewards/math/mean": 1.0,
            "category/a/rewards/length/mean": 2.0,
            "category/a/accuracy": 1.0,
            "category/a/completions/mean_length": 2.5,
            "category/a/completions/clipped_ratio": 0.5,
            "category/b/reward": 2.0,
            "category/b/rewards/missing": 0.0,
            "category/b/rewards/math/mean": 0.0,
            "category/b/rewards/length/mean": 4.0,
            "category/b/accuracy": 0.0,
            "category/b/completions/mean_length": 1.0,
            "category/b/completions/clipped_ratio": 0.0,
            "category/c/rewards/missing": 0.0,  # its one row only keeps ranks in step
        }
    )


def test_rows_that_only_keep_step_are_not_counted() -> None:
    metrics = PhaseMetrics()
    record_completions(scored_batch([True, False, False, True]), metrics)
    found = metrics.compute()
    assert found["accuracy"] == 0.5
    assert found["reward"] == 1.0
    assert found["completions/mean_length"] == 2.5
    assert "rewards/math/verdict/crash" not in found


def test_figures_survive_a_checkpoint_and_merge() -> None:
    first, second = PhaseMetrics(), PhaseMetrics()
    first.add("loss", torch.tensor(1.5), 2)
    first.count("timeouts", 3)
    first.extreme("longest", 7, "max")
    first.add_all(["a", "b"], torch.tensor([1.0, 0.1]), torch.tensor(4))
    second.load_gathered_state(first.gathered_state())
    for metrics in (first, second):
        metrics.add("loss", 0.5, 2)
        metrics.count("timeouts", 1)
        metrics.extreme("longest", 5, "max")
        metrics.mark()
        metrics.add_all(["a", "b"], torch.tensor([9.0, 9.0]), torch.tensor(9))
        metrics.rewind()
        metrics.add_all(["a", "b"], torch.tensor([2.0, 0.2]), torch.tensor([2, 8]))
        metrics.add("a", 3.0, 2)
    assert first.compute() == second.compute()
    assert first.compute() == pytest.approx(
        {"loss": 0.5, "timeouts": 4.0, "longest": 7.0, "a": 0.75, "b": 0.025}
    )
    first.add_all(["a", "b"], torch.tensor([0.0, 0.0]), torch.tensor(0))
    second.discard("b")
    assert "b" in first.compute()
    assert second.compute() == {k: v for k, v in first.compute().items() if k != "b"}
    first.merge(second, prefix="rollout/")
    assert first.local()["rollout/timeouts"] == 4.0
    first.reset()
    assert first.compute() == {}
    first.add("nothing", 0.0, 0)
    assert first.compute() == {}
