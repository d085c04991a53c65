"""Figures of scored completions, the same for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_lightning.core.metrics import PhaseMetrics
from rlhf_lightning.functional import total_rewards
from rlhf_lightning.types import RolloutBatch, Verdict

CATEGORY = "category"
"""The column of the rows, and the key of the samples, by which figures are told apart."""


def record_completions(
    batch: RolloutBatch, metrics: PhaseMetrics, categories: Sequence[str | None] | None = None
) -> None:
    """Add rewards, verdicts and lengths of scored completions to the metrics.

    Rows without a score are left out of means, and counted. ``accuracy`` is the share of correct
    verdicts among the rows that some function judged. Where rows have a category, its figures are
    repeated under ``category/<name>/``: the rewards, the accuracy, the mean length and the share of
    completions that the length limit ended.

    Args:
        batch: the completions.
        metrics: what the figures are added to.
        categories: of the rows, None for a row without; by default those of ``batch.samples``.
    """
    keep = torch.ones(len(batch), dtype=torch.bool) if batch.valid is None else batch.valid
    lengths, ended = batch.loss_mask.sum(dim=1), keep & ~batch.truncated
    _record_means(batch, metrics, keep)
    for r, name in enumerate(batch.reward_names):
        for verdict in Verdict:
            number = int(((batch.verdicts[:, r] == verdict.code) & keep).sum())
            if number:
                metrics.count(f"rewards/{name}/verdict/{verdict.value}", number)
    metrics.add("completions/mean_terminated_length", lengths[ended].sum(), ended.sum())
    if keep.any():
        metrics.extreme("completions/min_length", lengths[keep].min(), "min")
        metrics.extreme("completions/max_length", lengths[keep].max(), "max")
    if categories is None:
        categories = [sample.get(CATEGORY) for sample in batch.samples or ()]
    for name in sorted({name for name in categories if name is not None}):
        members = torch.tensor([category == name for category in categories])
        _record_means(batch, metrics, keep & members, f"category/{name}/")


def _record_means(
    batch: RolloutBatch, metrics: PhaseMetrics, keep: Tensor, prefix: str = ""
) -> None:
    """Means over the rows that ``keep`` (``[B]`` bool) marks."""
    total, scored = total_rewards(batch.rewards, batch.reward_valid, batch.reward_weights)
    scored = scored & keep
    metrics.add(f"{prefix}reward", total[scored].sum(), scored.sum())
    metrics.count(f"{prefix}rewards/missing", (keep & ~scored).sum())
    for r, name in enumerate(batch.reward_names):
        valid = batch.reward_valid[:, r] & keep
        metrics.add(f"{prefix}rewards/{name}/mean", batch.rewards[valid, r].sum(), valid.sum())
    judged = batch.reward_valid & (batch.verdicts >= 0) & keep[:, None]
    if judged.any():
        correct = judged & (batch.verdicts == Verdict.CORRECT.code)
        metrics.add(f"{prefix}accuracy", correct.any(dim=1).sum(), judged.any(dim=1).sum())
    lengths = batch.loss_mask.sum(dim=1)
    metrics.add(f"{prefix}completions/mean_length", lengths[keep].sum(), keep.sum())
    metrics.add(f"{prefix}completions/clipped_ratio", batch.truncated[keep].sum(), keep.sum())
