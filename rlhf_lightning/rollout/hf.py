"""Generation in process, from the policy module itself.

Notation in shapes: ``R`` rows (completions in progress).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_lightning.models.loading import context_length, embedding_rows, eos_token_ids
from rlhf_lightning.models.modes import eval_mode
from rlhf_lightning.rollout.decoder import Decoder, Lockstep
from rlhf_lightning.rollout.engine import RolloutEngine, check_request
from rlhf_lightning.rollout.sampling import draw, uniforms
from rlhf_lightning.types import Completion, ProgressFn, SamplingParams

_REPORT_EVERY = 0.25  # seconds; also where no row has finished, as a sign of life
_COMPACT_BELOW = 0.8  # drop finished rows once no more than this share is still running


class HFEngine(RolloutEngine):
    """A sampling loop over a transformers model, sharing the trained weights.

    Each distinct prompt is read once for all its samples; finished rows leave the batch; the
    log-probability of each token is gathered where the token is drawn. A row's tokens depend on its
    seed and the weights alone (up to rounding in the model's arithmetic), not on what else is in
    the batch or on how many processes take part.

    The model is put into evaluation mode meanwhile (in training mode, gradient checkpointing would
    silently drop the cache) and each submodule back into its own mode afterwards.

    Args:
        max_batch_tokens: bound of memory: rows in progress times the longest they may become
            (prompt and completion, padding included). More rows than fit are generated in turns; a
            single row is always generated. A token takes two numbers per layer, key-value head and
            head dimension.
    """

    shares_weights: ClassVar[bool] = True

    def __init__(self, max_batch_tokens: int = 131_072) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1")
        self.max_batch_tokens = max_batch_tokens
        self.version = 0
        self._model: PreTrainedModel | None = None
        self._eos: tuple[int, ...] = ()

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Sample from this very module from now on.

        Raises:
            ValueError: if the model keeps another state than a key-value cache, or is no decoder.
        """
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        unknown = kinds - {DynamicLayer, DynamicSlidingWindowLayer}
        if unknown or model.config.is_encoder_decoder or not model.can_generate():
            found = sorted(kind.__name__ for kind in unknown) or "no causal decoder"
            raise ValueError(
                f"HFEngine cannot sample from a {type(model).__name__}: it needs a decoder whose"
                f" layers keep plain or sliding-window key-value caches, and this one has {found}."
                " Use another engine for it"
            )
        self._model = model
        self._eos = eos_token_ids(model, tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        seeds: Sequence[int],
        on_progress: ProgressFn | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`RolloutEngine.generate`.

        Raises:
            ValueError: on a request that the model cannot serve; nothing has been generated then.
            FloatingPointError: if the model's logits are not numbers.
        """
        model = self._bound()
        check_request(
            prompts,
            sampling,
            seeds,
            vocab_size=embedding_rows(model),
            context=context_length(model),
        )
        rows = [
            _Row(i, sample, tuple(prompt), seeds[i])
            for i, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        ]
        stops = tuple(sorted({*self._eos, *sampling.stop_token_ids}))
        lockstep = Lockstep(model)
        completions: dict[tuple[int, int], Completion] = {}
        with torch.no_grad(), eval_mode(model), lockstep:
            for chunk in self._chunks(rows, sampling.max_new_tokens):
                done = len(completions)
                loop = _SamplingLoop(lockstep, chunk, sampling, stops)
                for finished in loop.run():
                    if on_progress is not None:
                        on_progress(done + finished, len(rows))
                for row, completion in zip(chunk, loop.completions(self.version), strict=True):
                    completions[row.prompt_index, row.sample] = completion
            lockstep.finish()
        return [
            [completions[i, sample] for sample in range(sampling.n)] for i in range(len(prompts))
        ]

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note the version; tensors that are not the module's own are copied into it.

        Raises:
            KeyError: on a name that the module does not have.
        """
        own = dict(self._bound().named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in named_parameters:
                if name not in own:
                    raise KeyError(f"update_weights got {name!r}, which the bound model has not")
                if tensor is not own[name]:
                    own[name].copy_(tensor)
        self.version = version

    def close(self) -> None:
        """Let go of the module."""
        self._model = None

    def _bound(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("HFEngine has no model. Call bind(model, tokenizer) first")
        return self._model

    def _chunks(self, rows: list[_Row], max_new_tokens: int) -> Iterator[list[_Row]]:
        """Rows in turns that respect the memory bound, prompts of similar length together."""
        chunk: list[_Row] = []
        for row in sorted(rows, key=lambda row: len(row.prompt)):
            # Sorted by length, so this row is the longest of its chunk.
            width = len(row.prompt) + max_new_tokens
            if chunk and (len(chunk) + 1) * width > self.max_batch_tokens:
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk


@dataclass(frozen=True)
class _Row:
    """One completion to be sampled."""

    prompt_index: int
    sample: int
    prompt: tuple[int, ...]
    seed: int


class _SamplingLoop:
    """Samples a chunk of rows token by token.

    Rows that finish stay in the batch, unheard, until enough of them have gathered to be worth
    copying the cache of the others; what follows a stop token is cut off at the end.
    """

    def __init__(
        self, model: Lockstep, rows: list[_Row], sampling: SamplingParams, stops: tuple[int, ...]
    ) -> None:
        self.model = model
        self.rows = rows
        self.sampling = sampling
        self.stops = torch.tensor(stops, dtype=torch.long, device=model.device)
        count, length = len(rows), sampling.max_new_tokens
        # Column r belongs to row r, so that a step writes one contiguous line.
        self.tokens = torch.zeros(length, count, dtype=torch.long, device=model.device)
        self.logprobs = torch.zeros(length, count, dtype=torch.float64, device=model.device)
        seeds, samples = [row.seed for row in rows], [row.sample for row in rows]
        self.uniforms = uniforms(seeds, samples, length).T.contiguous().to(model.device)

    def run(self) -> Iterator[int]:
        """Sample to the end; yields how many rows are finished: when more are, and now and then."""
        limit = self.sampling.max_new_tokens
        state = Decoder(self.model, [row.prompt for row in self.rows], limit)
        alive = torch.arange(len(self.rows), device=self.model.device)
        finished = torch.zeros_like(alive, dtype=torch.bool)
        reported, next_report = 0, time.monotonic() + _REPORT_EVERY
        for step in range(limit):
            token, logprob = draw(state.logits, self.sampling, self.uniforms[step, alive])
            self.tokens[step, alive] = token
            self.logprobs[step, alive] = logprob.double()
            finished |= torch.isin(token, self.stops)
            running = 0 if step + 1 == limit else len(alive) - int(finished.sum())
            done = len(self.rows) - running
            if done > reported or time.monotonic() >= next_report:
                reported = done
                yield done
                next_report = time.monotonic() + _REPORT_EVERY
            if running == 0:
                return
            if running <= _COMPACT_BELOW * len(alive):
                keep = (~finished).nonzero().squeeze(1)
                alive, token, finished = alive[keep], token[keep], finished[keep]
                state.keep(keep)
            state.feed(token)

    def completions(self, version: int) -> list[Completion]:
        """What was sampled, row by row, up to and with the first stop token."""
        is_stop = torch.isin(self.tokens, self.stops)
        stopped = is_stop.any(dim=0).tolist()
        first_stop = is_stop.int().argmax(dim=0).tolist()
        tokens, logprobs = self.tokens.T.tolist(), self.logprobs.T.tolist()
        result = []
        for r, row in enumerate(self.rows):
            length = first_stop[r] + 1 if stopped[r] else self.sampling.max_new_tokens
            kept = logprobs[r][:length]
            if any(value != value for value in kept):
                raise FloatingPointError(
                    f"the model's logits for prompt {row.prompt_index} are not numbers. The policy"
                    " has diverged (lower the learning rate or clip gradients), or its weights were"
                    " never loaded"
                )
            completion = Completion(
                prompt_ids=list(row.prompt),
                token_ids=tokens[r][:length],
                logprobs=kept,
                finish_reason="stop" if stopped[r] else "length",
                weight_versions=[(version, 0, length)],
            )
            result.append(completion)
        return result
