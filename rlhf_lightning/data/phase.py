"""A rollout phase: its size, how its rollouts are cut into updates, and what losses divide by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.core.config import as_config
from rlhf_lightning.core.distributed import rank, sum_over_ranks, world_size
from rlhf_lightning.core.seeding import permutation
from rlhf_lightning.data.batching import check_token_budget, plan_steps
from rlhf_lightning.types import RolloutBatch, StepPlan


@dataclass
class DynamicSampling:
    """Prompts whose completions all earn the same are replaced (https://arxiv.org/abs/2503.14476).

    Such a group has nothing to teach a group-relative method (DAPO, section 3.2). As many new
    prompts are drawn as there are such groups, again and again, until ``phase.prompts`` groups have
    something to teach. If they have not after the last round, the phase is filled up with the first
    of the others: no sample is trained on twice and no phase is short.

    What counts is the weighted sum of the rewards, before any KL penalty in it. A reward for length
    makes groups differ that are all right, or all wrong; where there is one, name the ``reward``
    that counts.

    Figures of rewards and lengths are over all completions that were generated; ``reward_std`` and
    ``frac_reward_zero_std``, which the algorithm logs, over those that are trained on.
    ``rollout/dynamic_sampling/*`` counts groups: ``generated``, of which ``kept`` are trained on
    and ``dropped`` are not, ``unfilled`` of the former with nothing to teach, and the number of
    ``rounds``.

    Args:
        max_rounds: the most rounds of generation in a phase, the first one included.
        reward: the name of the reward function by which groups are told apart, as in the logs
            (``MathReward``); by default the sum of all.
    """

    max_rounds: int = 10
    reward: str | None = None

    def __post_init__(self) -> None:
        if self.max_rounds < 2:
            raise ValueError(
                f"phase.dynamic_sampling.max_rounds is {self.max_rounds}; it must be at least 2"
                " (the first round and one that replaces), or leave dynamic_sampling out"
            )


@dataclass
class PhaseConfig:
    """The size of a rollout phase.

    Args:
        prompts: prompts per phase, over all processes. Each gets ``sampling.n`` completions.
        steps: optimizer steps in one pass over the phase's completions.
        update_epochs: passes over the phase's completions.
        max_tokens_per_micro_batch: an upper bound on rows times longest row of a micro-batch. Their
            number is the Trainer's ``accumulate_grad_batches``; where it is too small for this
            bound, the error says what to set it to.
        dynamic_sampling: replace the groups that have nothing to teach; by default they stay.
    """

    prompts: int = 64
    steps: int = 1
    update_epochs: int = 1
    max_tokens_per_micro_batch: int | None = None
    dynamic_sampling: DynamicSampling | None = None

    def __post_init__(self) -> None:
        if self.dynamic_sampling is not None:
            self.dynamic_sampling = as_config(
                DynamicSampling, self.dynamic_sampling, "phase.dynamic_sampling"
            )
        for name in ("prompts", "steps", "update_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"phase.{name} is {getattr(self, name)}; it must be at least 1")

    def check(self, n: int, ranks: int, accumulate: int, rewards: Sequence[str] = ()) -> None:
        """Refuse sizes that do not divide, and a reward that is not there.

        Args:
            n: completions per prompt.
            ranks: processes.
            accumulate: micro-batches per optimizer step.
            rewards: the names of the reward functions.

        Raises:
            ValueError: naming the option to change.
        """
        if self.dynamic_sampling is not None and n < 2:
            raise ValueError(
                f"phase.dynamic_sampling is set with sampling.n={n}: a single completion never"
                " differs from its group. Raise sampling.n, or leave dynamic_sampling out"
            )
        judge = None if self.dynamic_sampling is None else self.dynamic_sampling.reward
        if judge is not None and judge not in rewards:
            raise ValueError(
                f"phase.dynamic_sampling.reward is {judge!r}, and the reward functions are"
                f" {list(rewards)}. Name one of them, or leave it out for the sum of all"
            )
        if self.prompts % ranks:
            raise ValueError(
                f"phase.prompts is {self.prompts}, which {ranks} processes cannot share equally"
            )
        rows = self.prompts // ranks * n
        if rows % self.steps:
            raise ValueError(
                f"phase.steps is {self.steps}, but a phase has {rows} completions per process"
                f" ({self.prompts // ranks} prompts x n={n}): it must divide them"
            )
        if rows // self.steps < accumulate:
            raise ValueError(
                f"accumulate_grad_batches is {accumulate}, but an optimizer step has only"
                f" {rows // self.steps} completions per process. Lower it"
            )


@dataclass
class Phase:
    """The rollouts of a phase, and how they are cut.

    Attributes:
        batch: this rank's rollouts with everything that the loss needs.
        plans: for each update epoch, the rows of each micro-batch of each step.
        denominators: for each update epoch, the loss denominator of each step.
    """

    batch: RolloutBatch
    plans: list[StepPlan]
    denominators: list[list[float]]

    def micro_batch(self, index: int) -> RolloutBatch:
        """Micro-batch ``index`` of the phase, counted over update epochs and steps."""
        steps, parts = len(self.plans[0]), len(self.plans[0][0])
        step, part = divmod(index, parts)
        update_epoch, step = divmod(step, steps)
        batch = self.batch.index(self.plans[update_epoch][step][part])
        batch.loss_denominator = self.denominators[update_epoch][step]
        return batch

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "batch": self.batch.as_dict(),
            "plans": self.plans,
            "denominators": self.denominators,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Phase:
        """The inverse of :meth:`state`."""
        return cls(RolloutBatch(**state["batch"]), state["plans"], state["denominators"])


def plan_updates(
    config: PhaseConfig, batch: RolloutBatch, accumulate: int, seed: int, phase: int
) -> list[StepPlan]:
    """How a phase is cut: rows permuted into equal steps, steps into balanced micro-batches.

    Completions of the same prompt stay together where the sizes allow it, so that the model reads
    the prompt once (see :class:`rlhf_lightning.models.policy.CausalPolicy`).

    Args:
        config: the sizes.
        batch: this rank's rollouts of the phase.
        accumulate: micro-batches per optimizer step.
        seed: the data module's; the permutation follows from it, the phase and the rank.
        phase: the phase's number.

    Returns:
        A plan for each update epoch.
    """
    lengths, group_ids = batch.attention_mask.sum(dim=1), batch.group_ids
    plans = []
    for update_epoch in range(config.update_epochs):
        order = permutation(len(lengths), seed, "update", phase, update_epoch, rank())
        plan = plan_steps(order, lengths, config.steps, accumulate, group_ids)
        check_token_budget(plan, lengths, config.max_tokens_per_micro_batch, group_ids)
        plans.append(plan)
    return plans


def step_denominators(
    batch: RolloutBatch,
    plans: list[StepPlan],
    loss_units: Callable[[RolloutBatch], Tensor],
    device: torch.device,
) -> list[list[float]]:
    """What the losses of each optimizer step are divided by.

    The units of the step over all ranks, divided by the number of micro-batches and of ranks:
    Lightning divides the loss by the one, and averages gradients over the other.
    """
    units = loss_units(batch).double()
    mine = torch.stack(
        [torch.stack([units[torch.cat(step)].sum() for step in plan]) for plan in plans]
    )
    total = sum_over_ranks(mine, device)
    # a step without a single unit has loss 0, whatever it is divided by
    total = torch.where(total > 0, total, 1.0)
    return (total / (len(plans[0][0]) * world_size())).tolist()
