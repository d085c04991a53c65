"""Figures of scored completions, the same for training and evaluation."""

from __future__ import annotations

import torch

from rlhf_lightning.core.metrics import PhaseMetrics
from rlhf_lightning.functional import total_rewards
from rlhf_lightning.types import RolloutBatch, Verdict


def record_completions(batch: RolloutBatch, metrics: PhaseMetrics) -> None:
    """Add rewards, verdicts and lengths of scored completions to the metrics.

    Rows without a score are left out of means, and counted. ``accuracy`` is the share of correct
    verdicts among the rows that some function judged.
    """
    keep = torch.ones(len(batch), dtype=torch.bool) if batch.valid is None else batch.valid
    total, scored = total_rewards(batch.rewards, batch.reward_valid, batch.reward_weights)
    scored = scored & keep
    metrics.add("reward", total[scored].sum(), scored.sum())
    metrics.count("rewards/missing", (keep & ~scored).sum())
    for r, name in enumerate(batch.reward_names):
        valid = batch.reward_valid[:, r] & keep
        metrics.add(f"rewards/{name}/mean", batch.rewards[valid, r].sum(), valid.sum())
        for verdict in Verdict:
            number = int(((batch.verdicts[:, r] == verdict.code) & keep).sum())
            if number:
                metrics.count(f"rewards/{name}/verdict/{verdict.value}", number)
    judged = batch.reward_valid & (batch.verdicts >= 0) & keep[:, None]
    if judged.any():
        correct = judged & (batch.verdicts == Verdict.CORRECT.code)
        metrics.add("accuracy", correct.any(dim=1).sum(), judged.any(dim=1).sum())
    lengths, ended = batch.loss_mask.sum(dim=1), keep & ~batch.truncated
    metrics.add("completions/mean_length", lengths[keep].sum(), keep.sum())
    metrics.add("completions/mean_terminated_length", lengths[ended].sum(), ended.sum())
    metrics.add("completions/clipped_ratio", batch.truncated[keep].sum(), keep.sum())
    if keep.any():
        metrics.extreme("completions/min_length", lengths[keep].min(), "min")
        metrics.extreme("completions/max_length", lengths[keep].max(), "max")
