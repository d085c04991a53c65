"""What the on-policy algorithms share: log-probabilities of rollouts, and evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.core.completions import record_completions
from rlhf_lightning.core.module import BaseModule
from rlhf_lightning.models.policy import CausalPolicy
from rlhf_lightning.models.reference import frozen_copy
from rlhf_lightning.types import RolloutBatch, StepPlan


class PolicyGradientModule(BaseModule):
    """Thin base of the on-policy algorithms. It knows nothing of credit assignment or losses."""

    shown_in_progress_bar = frozenset(
        {"rollout/reward", "rollout/accuracy", "eval/reward", "eval/accuracy"}
    )

    smallest_group: int = 1
    """The fewest completions of a prompt (``sampling.n``) that it can learn from."""

    def needs_reference(self) -> bool:
        """Whether this run compares the policy with a frozen copy of where it started."""
        return False

    def build_frozen_models(self) -> None:
        """The reference is the policy as it was before training (also when a run resumes)."""
        if self.needs_reference():
            self.frozen["reference"] = CausalPolicy(frozen_copy(self.language_model))

    def logprobs(
        self, policy: nn.Module, batch: RolloutBatch, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T]`` log-probabilities (and entropies) of a micro-batch at its temperature."""
        return policy(
            batch.input_ids,
            batch.attention_mask,
            batch.loss_mask,
            temperature=batch.temperature,
            with_entropy=with_entropy,
        )

    def rollout_logprobs(self, policy: nn.Module, batch: RolloutBatch, plan: StepPlan) -> Tensor:
        """``[B, T]`` log-probabilities of all rollouts, computed micro-batch by micro-batch.

        On the very micro-batches that training will use: kernels round differently for other
        shapes, and the first ratio is to be exactly 1.
        """
        logprobs = torch.zeros(batch.input_ids.shape, dtype=torch.float32)
        for rows in (rows for step in plan for rows in step):
            part = batch.index(rows).to(self.device)
            found, _ = self.logprobs(policy, part)
            logprobs = logprobs.to(found.dtype)
            logprobs[rows, : found.shape[1]] = found.cpu()
        return logprobs

    def single_update(self) -> bool:
        """Whether a phase is one optimizer step, so that the policy trained is the one that wrote.

        Old log-probabilities are then the new ones, and computing them apart would be wasted.
        """
        return bool(self.trainer.num_training_batches == self.trainer.accumulate_grad_batches)

    def log_token_means(self, loss_mask: Tensor, figures: dict[str, Tensor]) -> None:
        """Add figures of ``[B, T]`` to the phase's means over loss tokens, under ``train/``."""
        tokens = loss_mask.sum()
        for name, values in figures.items():
            total = torch.where(loss_mask, values.detach(), 0).sum()
            self.phase_metrics.add(f"train/{name}", total, tokens)

    def evaluation_step(self, batch: RolloutBatch) -> None:
        """Count the rewards of held-out prompts that the data module has answered and scored."""
        record_completions(batch.to("cpu"), self.evaluation_metrics)

    def predict_step(self, batch: RolloutBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The answered prompts themselves: prompt, completion, rewards, verdicts."""
        assert batch.samples is not None
        valid = [True] * len(batch) if batch.valid is None else batch.valid.tolist()
        return [sample for sample, keep in zip(batch.samples, valid, strict=True) if keep]
