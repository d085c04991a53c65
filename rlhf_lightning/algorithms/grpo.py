"""Group relative policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.algorithms._policy_gradient import PolicyGradientModule
from rlhf_lightning.core.config import as_config, check_choices
from rlhf_lightning.core.distributed import gather_objects
from rlhf_lightning.functional import (
    aggregate_loss,
    clipped_policy_loss,
    group_advantages,
    group_statistics,
    kl_estimate,
    loss_units,
    masked_sum,
    total_rewards,
)
from rlhf_lightning.models.loading import ModelConfig
from rlhf_lightning.types import RolloutBatch, StepPlan


@dataclass
class AdvantageConfig:
    """How a completion is compared with the others of its prompt.

    Args:
        baseline: ``"mean"`` of the group (GRPO), or ``"leave_one_out"``: the mean of the others
            (RLOO, arXiv 2402.14740).
        scale: divide by the deviation of the ``"group"`` (GRPO) or of the whole ``"batch"``, or by
            nothing (``"none"``; Dr.GRPO, arXiv 2503.20783).
    """

    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["group", "batch", "none"] = "group"

    def __post_init__(self) -> None:
        check_choices(self, "advantage")


@dataclass
class PolicyLossConfig:
    """The surrogate objective and how it is averaged.

    Args:
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: and above at ``1 + clip_high`` (larger than ``clip_low`` is DAPO's clip-higher,
            arXiv 2503.14476).
        ratio: ``"token"``, or ``"sequence"`` for the geometric mean over the completion (GSPO,
            arXiv 2507.18071).
        dual_clip: bound on the ratio where the advantage is negative (arXiv 1912.09729); off by
            default.
        aggregation: ``"sequence"`` averages tokens within a completion, then completions (GRPO);
            ``"token"`` averages over all tokens of the step (DAPO); ``"constant"`` divides by
            ``max_completion_length`` times the number of completions (Dr.GRPO).
        max_completion_length: that constant, in tokens.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Literal["token", "sequence"] = "token"
    dual_clip: float | None = None
    aggregation: Literal["token", "sequence", "constant"] = "sequence"
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        check_choices(self, "policy_loss")
        if (self.aggregation == "constant") != (self.max_completion_length is not None):
            raise ValueError(
                f"policy_loss.max_completion_length is {self.max_completion_length} with"
                f" aggregation {self.aggregation!r}: 'constant' divides by it (set it to the data"
                " module's sampling.max_new_tokens), and the others have no use for it"
            )
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"policy_loss.clip_low is {self.clip_low} and clip_high {self.clip_high}; clip_low"
                " must be in [0, 1] and clip_high at least 0"
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"policy_loss.dual_clip is {self.dual_clip}; it must be more than 1 + clip_high"
            )


@dataclass
class KLConfig:
    """The penalty for leaving the reference model.

    Args:
        coef: its weight (beta); 0 needs no reference model.
        placement: ``"loss"`` adds it to the loss of each token (GRPO), ``"reward"`` takes it off
            the completion's reward before groups are compared (PPO's way).
        estimator: ``"k1"``, ``"k2"`` or ``"k3"`` (joschu.net/blog/kl-approx.html); by default k3 in
            the loss and k1 in the reward.
    """

    coef: float = 0.04
    placement: Literal["loss", "reward"] = "loss"
    estimator: Literal["k1", "k2", "k3"] | None = None

    def __post_init__(self) -> None:
        check_choices(self, "kl")
        if self.coef < 0:
            raise ValueError(f"kl.coef is {self.coef}; it must not be negative")
        if self.estimator is None:
            self.estimator = "k3" if self.placement == "loss" else "k1"


class GRPOModule(PolicyGradientModule):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300).

    Each prompt is answered several times; what a completion earned above the mean of its group is
    the advantage of all its tokens, and the policy follows PPO's clipped surrogate. Options give
    Dr.GRPO, leave-one-out baselines, clip-higher and sequence-level ratios. The defaults are the
    paper's.

    Args:
        model: a hub name, a folder, a ``ModelConfig`` (or a mapping of its fields), or a model.
        tokenizer: the tokenizer of a ``model`` that was given as an object.
        advantage: how a completion is compared with its group.
        policy_loss: the surrogate objective and how it is averaged.
        kl: the penalty for leaving the reference model.
        optimizer: called with the named parameter groups.
        lr_scheduler: called with the optimizer, and stepped after every optimizer step.

    Example::

        module = GRPOModule("Qwen/Qwen2.5-0.5B-Instruct", kl=KLConfig(coef=0.0))
        Trainer(max_epochs=100).fit(module, RolloutDataModule(prompts, [MathReward()]))
    """

    algorithm = "GRPOModule"
    smallest_group = 2  # alone in its group, a completion has nothing to be compared with

    def __init__(
        self,
        model: ModelConfig | str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        advantage: AdvantageConfig | None = None,
        policy_loss: PolicyLossConfig | None = None,
        kl: KLConfig | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(model, tokenizer, optimizer, lr_scheduler)
        self.advantage = as_config(AdvantageConfig, advantage, "advantage")
        self.policy_loss = as_config(PolicyLossConfig, policy_loss, "policy_loss")
        self.kl = as_config(KLConfig, kl, "kl")
        self.save_options(advantage=self.advantage, policy_loss=self.policy_loss, kl=self.kl)

    def needs_reference(self) -> bool:
        """With a KL penalty."""
        return self.kl.coef > 0

    def make_experience(self, batch: RolloutBatch, plan: StepPlan) -> RolloutBatch:
        """Advantages of the rollouts, and the log-probabilities that the loss compares with."""
        assert self.policy is not None
        penalised = self.kl.coef > 0 and self.kl.placement == "reward"
        if penalised or not self.single_update():
            batch.old_logprobs = self.rollout_logprobs(self.policy, batch, plan)
        if self.needs_reference():
            batch.ref_logprobs = self.rollout_logprobs(self.frozen["reference"], batch, plan)
        rewards, valid = total_rewards(batch.rewards, batch.reward_valid, batch.reward_weights)
        if penalised:
            kl = self._kl(batch.old_logprobs, batch)
            rewards = rewards - self.kl.coef * masked_sum(kl, batch.loss_mask, dim=1)
        self._log_groups(rewards, batch.group_ids, valid)
        advantages = group_advantages(
            rewards,
            batch.group_ids,
            valid=valid,
            baseline=self.advantage.baseline,
            scale=self.advantage.scale,
            batch_std=self._batch_std(rewards, valid),
        )
        batch.advantages = advantages[:, None] * batch.loss_mask
        return batch

    def _kl(self, logprobs: Tensor | None, batch: RolloutBatch) -> Tensor:
        assert logprobs is not None
        assert batch.ref_logprobs is not None
        assert self.kl.estimator is not None
        return kl_estimate(logprobs, batch.ref_logprobs, self.kl.estimator, batch.loss_mask)

    def _batch_std(self, rewards: Tensor, valid: Tensor) -> Tensor | None:
        """The deviation of all scored rewards of the phase, over all ranks."""
        if self.advantage.scale != "batch":
            return None
        scored = torch.cat(gather_objects(rewards[valid]))
        return scored.std() if len(scored) > 1 else scored.new_zeros(())

    def _log_groups(self, rewards: Tensor, group_ids: Tensor, valid: Tensor) -> None:
        """The mean deviation within groups, and the share of groups that have nothing to teach."""
        groups = group_statistics(rewards, group_ids, valid=valid)
        metrics = self.phase_metrics
        metrics.add("rollout/reward_std", groups.std[valid].sum(), valid.sum())
        metrics.add("rollout/frac_reward_zero_std", groups.zero_std.sum(), len(rewards))

    def loss_units(self, batch: RolloutBatch) -> Tensor:
        """``[B]`` what each completion adds to the loss denominator."""
        how = self.policy_loss
        return loss_units(batch.loss_mask, how.aggregation, how.max_completion_length)

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        """The clipped surrogate of a micro-batch, plus the KL penalty (eq. 3 of the paper)."""
        assert self.policy is not None
        assert batch.advantages is not None
        assert batch.loss_denominator is not None
        how = self.policy_loss
        logprobs, entropy = self.logprobs(self.policy, batch, with_entropy=True)
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        surrogate = clipped_policy_loss(
            logprobs,
            old_logprobs,
            batch.advantages,
            batch.loss_mask,
            clip_low=how.clip_low,
            clip_high=how.clip_high,
            ratio_level=how.ratio,
            dual_clip=how.dual_clip,
        )
        assert entropy is not None
        figures = {
            "entropy": entropy,
            "clip_ratio/low_mean": surrogate.clipped_low,
            "clip_ratio/high_mean": surrogate.clipped_high,
            "clip_ratio/region_mean": surrogate.clipped_low | surrogate.clipped_high,
            "sampling/sampling_logp_difference/mean": (old_logprobs - batch.rollout_logprobs).abs(),
        }
        per_token = surrogate.loss
        if batch.ref_logprobs is not None:
            kl = self._kl(logprobs, batch)
            figures["kl"] = kl
            if self.kl.placement == "loss":
                per_token = per_token + self.kl.coef * kl
        self.log_token_means(batch.loss_mask, figures)
        loss = aggregate_loss(
            per_token, batch.loss_mask, batch.loss_denominator, how.aggregation == "sequence"
        )
        self.phase_metrics.add("train/loss", loss)
        return loss
