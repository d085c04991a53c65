"""Group relative policy optimization."""

from __future__ import annotations

import copy
import warnings

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.algorithms._grpo_options import (
    AdvantageConfig,
    ImportanceSamplingConfig,
    KLConfig,
    PolicyLossConfig,
)
from rlhf_lightning.algorithms._policy_gradient import PolicyGradientModule, ReferenceConfig
from rlhf_lightning.core.config import as_config
from rlhf_lightning.core.distributed import gather_objects
from rlhf_lightning.functional import (
    PolicyLossOutput,
    aggregate_loss,
    clipped_policy_loss,
    clipped_weight_loss,
    group_advantages,
    group_statistics,
    importance_weights,
    kl_estimate,
    loss_units,
    masked_sum,
    total_rewards,
)
from rlhf_lightning.models.loading import ModelConfig
from rlhf_lightning.types import RolloutBatch, SamplingParams, StepPlan


class GRPOModule(PolicyGradientModule):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300).

    Each prompt is answered several times; what a completion earned above the mean of its group is
    the advantage of all its tokens, and the policy follows PPO's clipped surrogate. Options give
    its relatives: Dr.GRPO, RLOO's baseline, DAPO, GSPO, CISPO (see ``recipes/grpo``). The defaults
    are the paper's.

    Args:
        model: a hub name, a folder, a ``ModelConfig`` (or a mapping of its fields), or a model.
        tokenizer: the tokenizer of a ``model`` that was given as an object.
        advantage: how a completion is compared with its group.
        policy_loss: the surrogate objective and how it is averaged.
        kl: the penalty for leaving the reference model.
        reference: how the reference model follows the policy; by default it does not.
        importance_sampling: how tokens are weighed where the engine's probabilities differ from the
            trainer's. By default they are not: ``HFEngine`` samples from the very module that is
            trained, with which it agrees up to rounding. Turn it on for an engine of its own, or
            where ``sampling/sampling_logp_difference`` is not small. (Under top-k, top-p or min-p
            sampling there is no such figure: it would be the probability that was cut off.)
        optimizer: called with the named parameter groups.
        lr_scheduler: called with the optimizer, and stepped after every optimizer step.
        packing: lay the rows of a micro-batch end to end, and read a prompt that several rows share
            once, instead of padding; the same log-probabilities up to rounding.

    Example::

        module = GRPOModule("Qwen/Qwen2.5-0.5B-Instruct", kl=KLConfig(coef=0.0))
        Trainer(max_epochs=100).fit(module, RolloutDataModule(prompts, [MathReward()]))
    """

    algorithm = "GRPOModule"
    smallest_group = 2  # alone in its group, a completion has nothing to be compared with
    _engine_is_comparable = True  # its probabilities are over all tokens, as the trainer's are

    def __init__(
        self,
        model: ModelConfig | str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        advantage: AdvantageConfig | None = None,
        policy_loss: PolicyLossConfig | None = None,
        kl: KLConfig | None = None,
        reference: ReferenceConfig | None = None,
        importance_sampling: ImportanceSamplingConfig | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
        packing: bool = True,
    ) -> None:
        super().__init__(model, tokenizer, optimizer, lr_scheduler, packing)
        self.advantage = as_config(AdvantageConfig, advantage, "advantage")
        self.policy_loss = as_config(PolicyLossConfig, policy_loss, "policy_loss")
        self.kl = as_config(KLConfig, kl, "kl")
        self.reference = as_config(ReferenceConfig, reference, "reference")
        self.importance_sampling = (
            None
            if importance_sampling is None
            else as_config(ImportanceSamplingConfig, importance_sampling, "importance_sampling")
        )
        self._check_options()
        self.save_options(
            advantage=self.advantage,
            policy_loss=self.policy_loss,
            kl=self.kl,
            reference=self.reference,
            importance_sampling=self.importance_sampling,
            packing=packing,
        )

    def _check_options(self) -> None:
        """Refuse options of different groups that contradict each other."""
        if self.reference.moves and self.kl.coef == 0:
            raise ValueError(
                f"reference is {self.reference} while kl.coef is 0: without a penalty there is no"
                " reference model to move. Set kl.coef, or leave reference out"
            )
        if self.policy_loss.mask_truncated and self.kl.placement == "reward" and self.kl.coef:
            raise ValueError(
                "policy_loss.mask_truncated is on while kl.placement is 'reward': completions that"
                " are not trained on would pay a penalty. Set kl.placement to 'loss'"
            )

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Refuse groups of one, and probabilities that cannot be compared."""
        super().check_sampling(sampling)
        cut = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        used = [
            f"{k}={getattr(sampling, k)}" for k, off in cut.items() if getattr(sampling, k) != off
        ]
        self._engine_is_comparable = not used
        if self.importance_sampling is not None and used:
            raise ValueError(
                f"importance_sampling is on while sampling has {', '.join(used)}: the engine's"
                " probabilities are then normalised over the tokens that it kept, the trainer's"
                " over all of them, and every weight would contain the difference. Sample without"
                " top_k, top_p and min_p, or leave importance_sampling out"
            )

    def needs_reference(self) -> bool:
        """With a KL penalty."""
        return self.kl.coef > 0

    def make_experience(self, batch: RolloutBatch, plan: StepPlan) -> RolloutBatch:
        """Advantages of the rollouts, and the log-probabilities that the loss compares with."""
        assert self.policy is not None
        self.move_reference(batch.policy_version)
        trained = copy.copy(batch)
        trained.loss_mask = self._trained_tokens(batch)
        if not trained.loss_mask.any():
            warnings.warn(
                "policy_loss.mask_truncated: the length limit ended every completion of a phase, so"
                " it trains nothing. Raise sampling.max_new_tokens, or switch mask_truncated off",
                stacklevel=2,
            )
        penalised = self.kl.coef > 0 and self.kl.placement == "reward"
        if penalised or not self.single_update():
            batch.old_logprobs = self.rollout_logprobs(self.policy, trained, plan)
        if self.needs_reference():
            batch.ref_logprobs = self.rollout_logprobs(self.frozen["reference"], trained, plan)
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

    def _trained_tokens(self, batch: RolloutBatch) -> Tensor:
        """``[B, T]`` the sampled tokens, but for completions that are left out of the loss."""
        if not self.policy_loss.mask_truncated:
            return batch.loss_mask
        return batch.loss_mask & ~batch.truncated[:, None]

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
        units = loss_units(batch.loss_mask, how.aggregation, how.max_completion_length)
        return units.masked_fill(batch.truncated, 0) if how.mask_truncated else units

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        """The surrogate of a micro-batch, plus the KL penalty (eq. 3 of the paper)."""
        assert self.policy is not None
        assert batch.loss_denominator is not None
        batch.loss_mask = self._trained_tokens(batch)
        logprobs, entropy = self.logprobs(self.policy, batch, with_entropy=True)
        assert entropy is not None
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        surrogate = self._surrogate(logprobs, old_logprobs, batch)
        figures = {"entropy": entropy, **self._clipping(surrogate, batch.loss_mask)}
        per_token = surrogate.loss * self._engine_weights(old_logprobs, batch, figures)
        if batch.ref_logprobs is not None:
            figures["kl"] = self._kl(logprobs, batch)
            if self.kl.placement == "loss":
                per_token = per_token + self.kl.coef * figures["kl"]
        loss = self._aggregated(per_token, batch)
        if self.policy_loss.entropy_coef:
            self.phase_metrics.add("train/policy_loss", loss)
            loss = loss - self.policy_loss.entropy_coef * self._aggregated(entropy, batch)
        self.phase_metrics.add("train/loss", loss)
        self.log_token_means(batch.loss_mask, figures)
        return loss

    def _surrogate(
        self, logprobs: Tensor, old_logprobs: Tensor, batch: RolloutBatch
    ) -> PolicyLossOutput:
        how = self.policy_loss
        assert batch.advantages is not None
        assert how.clip_low is not None
        assert how.clip_high is not None
        inputs = (logprobs, old_logprobs, batch.advantages, batch.loss_mask)
        if how.objective == "cispo":
            return clipped_weight_loss(*inputs, clip_low=how.clip_low, clip_high=how.clip_high)
        return clipped_policy_loss(
            *inputs,
            clip_low=how.clip_low,
            clip_high=how.clip_high,
            ratio_level=how.ratio,
            dual_clip=how.dual_clip,
        )

    def _aggregated(self, per_token: Tensor, batch: RolloutBatch) -> Tensor:
        assert batch.loss_denominator is not None
        per_sequence = self.policy_loss.aggregation == "sequence"
        return aggregate_loss(per_token, batch.loss_mask, batch.loss_denominator, per_sequence)

    def _engine_weights(
        self, old_logprobs: Tensor, batch: RolloutBatch, figures: dict[str, Tensor]
    ) -> Tensor | float:
        """``[B, T]`` weights for the difference between engine and trainer.

        How large it is is logged; figures over all loss tokens are left to the caller to log.
        """
        if not self._engine_is_comparable:
            return 1.0
        difference = (old_logprobs - batch.rollout_logprobs).abs()
        missing = batch.rollout_logprobs.isnan()
        known = batch.loss_mask & ~missing
        name = "sampling/sampling_logp_difference"
        self.log_token_means(known, {f"{name}/mean": difference})
        self.log_extreme(f"{name}/max", "max", difference, known)
        figures["sampling/frac_missing_logprobs"] = missing
        how = self.importance_sampling
        if how is None:
            return 1.0
        found = importance_weights(
            old_logprobs,
            batch.rollout_logprobs,
            batch.loss_mask,
            mode=how.mode,
            level=how.level,
            cap=how.cap,
            floor=how.floor,
        )
        name = "sampling/importance_sampling_ratio"
        figures[f"{name}/mean"] = found.ratio
        figures[f"{name}/out_of_bounds"] = found.out_of_bounds
        self.log_extreme(f"{name}/min", "min", found.ratio, batch.loss_mask)
        self.log_extreme(f"{name}/max", "max", found.ratio, batch.loss_mask)
        return found.weight

    def _clipping(self, surrogate: PolicyLossOutput, loss_mask: Tensor) -> dict[str, Tensor]:
        """Which tokens were clipped; log the least (low) and the most (high) of a completion."""
        low, high = surrogate.clipped_low, surrogate.clipped_high
        lengths = loss_mask.sum(dim=1)
        shares = torch.stack([low, high]).sum(dim=2) / lengths.clamp(min=1)
        self.log_extreme("clip_ratio/low_min", "min", shares[0], lengths > 0)
        self.log_extreme("clip_ratio/high_max", "max", shares[1], lengths > 0)
        means = {"low_mean": low, "high_mean": high, "region_mean": low | high}
        return {f"clip_ratio/{name}": clipped for name, clipped in means.items()}
