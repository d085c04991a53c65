"""Supervised fine-tuning."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.core.module import BaseModule
from rlhf_lightning.functional import aggregate_loss, masked_sum
from rlhf_lightning.models.loading import ModelConfig
from rlhf_lightning.types import SequenceBatch


class SFTModule(BaseModule):
    """Next-token cross-entropy on the tokens that the data module marks.

    The loss of an optimizer step is the mean over all its marked tokens, however they are spread
    over micro-batches and processes.

    Args:
        model: a hub name, a folder, a ``ModelConfig`` (or a mapping of its fields), or a model.
        tokenizer: the tokenizer of a ``model`` that was given as an object.
        optimizer: called with the named parameter groups. The default learning rate is TRL's.
        lr_scheduler: called with the optimizer, and stepped after every optimizer step.

    Example::

        Trainer(max_epochs=3).fit(SFTModule("./my-model"), SFTDataModule(PromptFile("train.jsonl")))
    """

    algorithm = "SFTModule"
    shown_in_progress_bar = frozenset({"train/loss_epoch", "eval/loss"})

    def __init__(
        self,
        model: ModelConfig | str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(model, tokenizer, optimizer, lr_scheduler)
        self.save_options()
        self._step_loss = torch.zeros(())

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of a micro-batch over the token count of its whole optimizer step."""
        assert batch.loss_denominator is not None
        loss = aggregate_loss(-self._logprobs(batch), batch.loss_mask, batch.loss_denominator)
        self.phase_metrics.add("train/loss_epoch", loss)
        self._step_loss = self._step_loss.to(loss.device) + loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log ``train/loss``: the mean over all marked tokens of the step, on all ranks."""
        loss = self._step_loss / self.trainer.accumulate_grad_batches
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self._step_loss = torch.zeros((), device=self.device)

    def _logprobs(self, batch: SequenceBatch) -> Tensor:
        assert self.policy is not None
        logprobs, _ = self.policy(batch.input_ids, batch.attention_mask, batch.loss_mask)
        return logprobs

    def evaluation_step(self, batch: SequenceBatch) -> None:
        """Count the cross-entropy of held-out tokens: ``loss`` is the mean over all of them."""
        nll = masked_sum(-self._logprobs(batch), batch.loss_mask)
        self.evaluation_metrics.add("loss", nll, batch.loss_mask.sum())

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """``[B, T]`` log-probabilities of the marked tokens, 0 elsewhere."""
        return self._logprobs(batch)
