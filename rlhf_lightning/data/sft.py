"""The data module of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.config import as_config
from rlhf_lightning.core.distributed import rank, world_size
from rlhf_lightning.core.seeding import permutation
from rlhf_lightning.data.batching import check_token_budget, cut_micro_batches
from rlhf_lightning.data.chat import ChatOptions, EncodedSequence
from rlhf_lightning.data.filters import RowReport, dropped
from rlhf_lightning.data.held_out import HeldOutLoader
from rlhf_lightning.data.mixture import (
    check_unweighted,
    members_by_category,
    naming_owners,
    weighted_epoch,
)
from rlhf_lightning.data.prompts import PromptSource, Row, load_rows
from rlhf_lightning.data.resumable import ResumableDataModule
from rlhf_lightning.data.sequences import encode_sequences
from rlhf_lightning.data.sizes import describe_rows
from rlhf_lightning.models.loading import context_length
from rlhf_lightning.types import SequenceBatch, StepPlan


class SFTDataModule(ResumableDataModule):
    """Rows of text, messages, or prompt and completion as micro-batches for ``SFTModule``.

    The rows are TRL's formats, standard or conversational. A prompt is not trained on, and of a
    conversation only the assistant's turns are. An epoch's rows are permuted and cut into optimizer
    steps whose sizes differ by at most one row, so none is left over; a step is shared among
    processes and cut into ``accumulate_grad_batches`` micro-batches of similar padded size. The
    place in the epoch is part of the checkpoint.

    An epoch is all rows once. Of a ``PromptMixture`` with weights it is as many rows, in the shares
    that the weights ask for: small sets are repeated in new orders, large ones go on in the next
    epoch where they stopped.

    Args:
        dataset: where the training rows come from.
        batch_size: rows per optimizer step, over all processes and micro-batches.
        validation: where the held-out rows come from; without it ``fit`` does not validate.
        max_length: the longest row in tokens; by default the model's context.
        too_long: what happens to longer rows: ``"error"``, ``"truncate"`` on the right, or
            ``"drop"``; they are counted and reported.
        duplicates: what happens to a row that has the same tokens as an earlier one: ``"keep"``,
            ``"drop"`` or ``"error"``.
        train_on_prompt: also train on prompts, not only on completions and the assistant's turns.
        chat: how conversations become text.
        max_tokens_per_micro_batch: an upper bound on rows times longest row of a micro-batch.
        validation_batch_size: held-out rows at a time, per process.
        seed: the order of the rows follows from it.
    """

    def __init__(
        self,
        dataset: PromptSource,
        batch_size: int = 16,
        validation: PromptSource | None = None,
        max_length: int | None = None,
        too_long: Literal["error", "truncate", "drop"] = "error",
        duplicates: Literal["keep", "drop", "error"] = "keep",
        train_on_prompt: bool = False,
        chat: ChatOptions | None = None,
        max_tokens_per_micro_batch: int | None = None,
        validation_batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(as_config(ChatOptions, chat, "chat"))
        for name, size in (
            ("batch_size", batch_size),
            ("validation_batch_size", validation_batch_size),
        ):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        for name, value, choices in (
            ("too_long", too_long, ("error", "truncate", "drop")),
            ("duplicates", duplicates, ("keep", "drop", "error")),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; it must be one of {choices}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.validation = validation
        self.max_length = max_length
        self.too_long = too_long
        self.duplicates = duplicates
        self.train_on_prompt = train_on_prompt
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.validation_batch_size = validation_batch_size
        self.seed = seed
        if validation is None:
            self.without_validation()
        else:
            check_unweighted(validation, "validation")
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._encoded: dict[str, list[EncodedSequence]] = {}
        self._members: dict[str, Tensor] = {}
        self._plan: StepPlan = []
        self._denominators: list[float] = []

    def setup(self, stage: str) -> None:
        """Read the rows.

        Raises:
            ValueError: if a source has no rows, or too few for the sizes that were asked for.
        """
        super().setup(stage)
        self._encoded.clear()
        if stage == "fit":
            self.begin_fit()
            self._rows["train"] = load_rows(self.dataset, "dataset")
        if self.validation is not None:
            self._rows["validation"] = load_rows(self.validation, "validation")
        elif stage in ("validate", "test", "predict"):
            raise ValueError("validation: evaluating needs held-out rows, and none are configured")

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, context: int | None
    ) -> tuple[list[EncodedSequence], RowReport]:
        """Rows as token ids and loss masks, by the options of this data module.

        Args:
            rows: the rows.
            tokenizer: the model's.
            context: the longest sequence of the model in tokens.

        Returns:
            The sequences, and what happened to rows (see ``encode_sequences``).
        """
        limits = [limit for limit in (self.max_length, context) if limit is not None]
        return encode_sequences(
            rows,
            tokenizer,
            max_length=min(limits, default=None),
            too_long=self.too_long,
            duplicates=self.duplicates,
            train_on_prompt=self.train_on_prompt,
            chat=self.chat,
        )

    def _sequences(self, kind: str) -> list[EncodedSequence]:
        """The rows as token ids and loss masks. Done once."""
        if kind not in self._encoded:
            rows, context = self._rows[kind], context_length(self._module.language_model)
            source = self.dataset if kind == "train" else self.validation
            assert source is not None
            with naming_owners(source, rows) as owners:
                self._encoded[kind], report = self.encode(rows, self.tokenizer, context)
            self.report_rows(f"{kind} rows", len(rows), report, owners)
            if kind == "train":
                left_out = dropped(report)
                kept = [row for k, row in enumerate(rows) if k not in left_out]
                self._members = members_by_category(self.dataset, kept)
        return self._encoded[kind]

    # Training

    def train_dataloader(self) -> Any:
        """One epoch of it is one pass over the rows, or as many rows in the shares asked for."""
        rows = len(self._sequences("train"))
        if "validation" in self._rows:
            self._sequences("validation")
        parts = self._accumulate * world_size()
        if rows // self._steps() < parts:
            raise ValueError(
                f"batch_size is {self.batch_size} and there are {rows} rows, so an optimizer step"
                f" has {rows // self._steps()} rows: too few for {world_size()} processes x"
                f" accumulate_grad_batches={self._accumulate}. Raise batch_size or lower the latter"
            )
        self.check_limit()
        return super().train_dataloader()

    @property
    def _accumulate(self) -> int:
        assert self.trainer is not None
        return self.trainer.accumulate_grad_batches

    def _steps(self) -> int:
        """Optimizer steps in an epoch: equal ones, as near to ``batch_size`` rows as can be."""
        return max(1, round(len(self._sequences("train")) / self.batch_size))

    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of an epoch, the same on every rank."""
        return self._steps() * self._accumulate

    def sizes(self) -> dict[str, str]:
        """Rows, tokens and updates of an epoch.

        Raises:
            ValueError: if an epoch to come has a micro-batch over ``max_tokens_per_micro_batch``.
        """
        sequences, trainer = self._sequences("train"), self._trainer
        if self.max_tokens_per_micro_batch is not None:
            epochs = trainer.max_epochs or 1
            if epochs < 0:
                epochs = -(-trainer.max_steps // self._steps())
            for epoch in range(epochs):
                self.start_epoch(epoch)
        lengths = [len(sequence.input_ids) for sequence in sequences]
        trained = sum(sum(sequence.loss_mask) for sequence in sequences)
        held_out = len(self._rows.get("validation", ()))
        return describe_rows(
            lengths, trained, self._steps(), self._accumulate, world_size(), held_out
        )

    def start_epoch(self, epoch: int) -> None:
        """Permute the rows and cut them. Every rank knows all lengths, so none has to ask."""
        sequences = self._sequences("train")
        lengths = torch.tensor([len(sequence.input_ids) for sequence in sequences])
        weights: Mapping[str, float] | None = getattr(self.dataset, "weights", None)
        if weights is None:
            order = permutation(len(sequences), self.seed, "rows", epoch)
        else:
            order = weighted_epoch(self._members, weights, self.seed, epoch)
        self._plan, self._denominators = [], []
        for rows in torch.tensor_split(order, self._steps()):
            dealt = rows[torch.argsort(lengths[rows], stable=True)]
            mine = dealt[rank() :: world_size()]
            self._plan.append(cut_micro_batches(mine, lengths, self._accumulate))
            tokens = sum(sum(sequences[i].loss_mask) for i in rows.tolist())
            self._denominators.append(tokens / (self._accumulate * world_size()))
        check_token_budget(self._plan, lengths, self.max_tokens_per_micro_batch)

    def micro_batch(self, index: int) -> SequenceBatch:
        """Micro-batch ``index`` of the epoch."""
        step, part = divmod(index, self._accumulate)
        batch = self._collate("train", self._plan[step][part])
        batch.loss_denominator = self._denominators[step]
        return batch

    def load_epoch_state(self, state: dict[str, Any]) -> None:
        """Nothing was saved: an epoch's plan follows from its number, and is made when needed."""
        self._remake = True

    def _collate(self, kind: str, rows: Tensor) -> SequenceBatch:
        chosen = [self._sequences(kind)[i] for i in rows.tolist()]
        length = max(len(sequence.input_ids) for sequence in chosen)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.full((len(chosen), length), 0 if pad is None else int(pad))
        attention_mask = torch.zeros(len(chosen), length, dtype=torch.long)
        loss_mask = torch.zeros(len(chosen), length, dtype=torch.bool)
        for i, sequence in enumerate(chosen):
            end = len(sequence.input_ids)
            input_ids[i, :end] = torch.tensor(sequence.input_ids)
            attention_mask[i, :end] = 1
            loss_mask[i, :end] = torch.tensor(sequence.loss_mask)
        return SequenceBatch(
            input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask
        )

    # Validation

    def val_dataloader(self) -> Any:
        """Held-out rows in their order, dealt out to the ranks."""
        rows = len(self._sequences("validation"))
        return HeldOutLoader(rows, self.validation_batch_size, self._held_out)

    def _held_out(self, places: Sequence[int], counts: Tensor) -> SequenceBatch:
        batch = self._collate("validation", torch.tensor(places))
        batch.loss_mask &= counts[:, None]
        return batch
