"""Faults of rewards and prompts in a whole run: a clear error, or counted and survived."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import Sums, grpo, quiet_trainer, rollouts, tiny_model

from rlhf_lightning.algorithms import GRPOModule, KLConfig
from rlhf_lightning.data import PromptFilters, PromptSource, ValidationConfig
from rlhf_lightning.rewards import NonFiniteReward, RewardError, RewardPolicy
from rlhf_lightning.types import RewardResult, Verdict


def share(text: str) -> float:
    return sum(c.isdigit() for c in text) / 4


def fragile(completions: list[str], **kwargs: Any) -> list[float]:
    if any("1" in text for text in completions):
        raise KeyError("no such thing")
    return [share(text) for text in completions]


def short(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0]


def not_a_number(completions: list[str], **kwargs: Any) -> list[float]:
    return [math.nan if "1" in text else share(text) for text in completions]


def text(completions: list[str], **kwargs: Any) -> list[str]:
    return ["good"] * len(completions)


def sleepy(completions: list[str], **kwargs: Any) -> list[float]:
    if any("1" in c for c in completions):
        time.sleep(3600)
    return [share(c) for c in completions]


def broken_machine(completions: list[str], **kwargs: Any) -> list[RewardResult]:
    return [
        RewardResult(None, Verdict.ENDPOINT_ERROR) if "1" in c else RewardResult(share(c))
        for c in completions
    ]


class Seen(Callback):
    """What reached training."""

    def __init__(self) -> None:
        self.missing = self.rows = 0
        self.phases = 0

    def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
        self.phases += 1
        self.rows += len(samples)
        self.missing += int((~batch.reward_valid).sum())
        for row, sample in enumerate(samples):
            at_fault = "1" in sample["completion"]
            # a function that sleeps uses up the time of the samples behind it as well
            late = "Late" in str(sample["details"])
            assert (sample["reward"] is None) == (at_fault or late)
            if sample["reward"] is None:
                assert (batch.advantages[row] == 0).all()
        assert torch.isfinite(batch.advantages).all()


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (fragile, RewardError, "'fragile' raised KeyError on sample"),
        (short, RewardError, "'short'.* 16"),
        (not_a_number, NonFiniteReward, "'not_a_number', sample .*nan"),
        (text, RewardError, "'text'"),
        (broken_machine, RewardError, "'broken_machine' failed on"),
    ],
)
def test_a_faulty_reward_stops_the_run_by_name(
    reward: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        quiet_trainer(tmp_path, max_epochs=3).fit(grpo(), rollouts(rewards=[reward]))


@pytest.mark.parametrize("reward", [fragile, not_a_number, broken_machine, sleepy])
def test_under_mask_the_run_goes_on_with_the_other_rows(reward: Any, tmp_path: Path) -> None:
    policy = RewardPolicy(
        on_error="mask", on_nonfinite="mask", timeout=0.3, max_masked_fraction=0.9
    )
    seen = Seen()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[seen])
    module = grpo(kl=KLConfig(coef=0.0))
    started = time.perf_counter()
    trainer.fit(module, rollouts(rewards=[reward], reward_policy=policy))
    assert time.perf_counter() - started < 60
    assert seen.phases == 2
    assert 0 < seen.missing < seen.rows
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Rows(PromptSource):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def load(self) -> list[dict[str, Any]]:
        return self.rows


def needs_gold(completions: list[str], gold: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": Rows([])}, "prompts: the source has no rows"),
        ({"prompts": Rows([{"question": "1+1="}])}, "needs the column 'prompt'"),
        ({"prompts": Rows([{"prompt": ""}])}, "row 1"),
        ({"prompts": Rows([{"prompt": 3}])}, "row 1"),
        ({"prompts": Rows([{"prompt": "1+" * 40}])}, "longer than 60 tokens"),
        ({"prompts": Rows([{"prompt": [{"role": "user", "content": "1+1="}]}])}, "chat template"),
        ({"rewards": [needs_gold]}, "reward function 'needs_gold' needs .*gold"),
        ({"rewards": ["no.such.function"]}, "no.such.function"),
        ({"rewards": []}, "list of reward functions"),
        ({"reward_weights": [1.0, 2.0]}, "weights has 2 values for 1 reward functions"),
    ],
)
def test_bad_rows_and_settings_are_refused_before_a_token_is_sampled(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    class NoRollout(Callback):
        def on_rollout_start(self, *args: Any) -> None:
            pytest.fail("rollouts began")

    with pytest.raises((ValueError, TypeError, ImportError), match=message):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[NoRollout()]).fit(
            grpo(), rollouts(**options)
        )


def test_long_prompts_can_be_dropped_with_a_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*Sums(4).load(), {"prompt": "1+" * 40, "completion": "", "answer": ""}]
    data = rollouts(prompts=Rows(rows), filters=PromptFilters(too_long="drop"))
    quiet_trainer(tmp_path, max_epochs=1).fit(grpo(), data)
    assert "train prompts: 1 of 5 dropped: too long (row 5)" in capsys.readouterr().out


def test_bad_validation_prompts_are_found_before_training(tmp_path: Path) -> None:
    data = rollouts(validation=ValidationConfig(Rows([{"prompt": "1+" * 40}])))
    with pytest.raises(ValueError, match="longer than 60 tokens"):
        quiet_trainer(tmp_path, max_epochs=1).fit(grpo(), data)


def test_a_diverged_policy_is_named(tmp_path: Path) -> None:
    module = GRPOModule(tiny_model(), optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    with pytest.raises(FloatingPointError, match="not numbers"):
        quiet_trainer(tmp_path, max_epochs=5).fit(module, rollouts())
