"""Generation in process, from the policy module itself.

Notation in shapes: ``R`` rows (completions in progress), ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_lightning.core.modes import eval_mode
from rlhf_lightning.models.loading import context_length, eos_token_ids
from rlhf_lightning.rollout.engine import RolloutEngine, check_request
from rlhf_lightning.rollout.sampling import draw, uniforms
from rlhf_lightning.types import Completion, ProgressFn, SamplingParams

_ROOM = 16  # spare columns by which a cache layer grows
_COMPACT_BELOW = 0.8  # drop finished rows once no more than this share is still running


class HFEngine(RolloutEngine):
    """A sampling loop over a transformers model, sharing the trained weights.

    Each distinct prompt is read once for all its samples; finished rows leave the batch; the
    log-probability of each sampled token is gathered where it is drawn. A row's tokens depend on its
    seed and the weights only (to the last bit of the model's arithmetic), not on what else is in the
    batch or on how many processes take part.

    Args:
        max_batch_tokens: bound of memory: rows in progress times the longest they may become
            (prompt and completion, padding included). More rows than fit are generated in turns; a
            single row is always generated. One token costs two numbers per layer, key-value head
            and head dimension.
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
            found = ", ".join(sorted(kind.__name__ for kind in unknown)) or "no causal decoder"
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
        vocab_size = model.get_input_embeddings().num_embeddings
        context = context_length(model)
        check_request(prompts, sampling, seeds, vocab_size=vocab_size, context=context)
        rows = [
            _Row(i, sample, list(prompt), seeds[i])
            for i, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        ]
        stops = tuple(sorted({*self._eos, *sampling.stop_token_ids}))
        completions: dict[tuple[int, int], Completion] = {}
        with torch.no_grad(), eval_mode(model):
            for chunk in self._chunks(rows, sampling.max_new_tokens):
                done = len(completions)
                loop = _SamplingLoop(model, chunk, sampling, stops)
                for finished in loop.run():
                    if on_progress is not None:
                        on_progress(done + finished, len(rows))
                for row, completion in zip(chunk, loop.completions(self.version), strict=True):
                    completions[row.prompt_index, row.sample] = completion
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
    prompt: list[int]
    seed: int


class _SamplingLoop:
    """Samples a chunk of rows token by token.

    Rows that finish stay in the batch, unheard, until enough of them have gathered to be worth
    copying the cache of the others; what follows a stop token is cut off at the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[_Row],
        sampling: SamplingParams,
        stops: tuple[int, ...],
    ) -> None:
        self.model = model
        self.rows = rows
        self.sampling = sampling
        self.device = model.get_input_embeddings().weight.device
        self.stops = torch.tensor(stops, dtype=torch.long, device=self.device)
        count, length = len(rows), sampling.max_new_tokens
        # Column r belongs to row r; a step writes one contiguous line.
        self.tokens = torch.zeros(length, count, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(length, count, dtype=torch.float64, device=self.device)
        seeds, samples = [row.seed for row in rows], [row.sample for row in rows]
        self.uniforms = uniforms(seeds, samples, length).T.contiguous().to(self.device)

    def run(self) -> Iterator[int]:
        """Sample to the end; yields how many rows are finished each time that some are."""
        state = _Decoder(self.model, [row.prompt for row in self.rows], self.sampling.max_new_tokens)
        alive = torch.arange(len(self.rows), device=self.device)
        finished = torch.zeros(len(self.rows), dtype=torch.bool, device=self.device)
        gone = 0
        for step in range(self.sampling.max_new_tokens):
            token, logprob = draw(state.logits, self.sampling, self.uniforms[step, alive])
            self.tokens[step, alive] = token
            self.logprobs[step, alive] = logprob.double()
            finished |= torch.isin(token, self.stops)
            running = len(alive) - int(finished.sum())
            if len(self.rows) - running > gone:
                gone = len(self.rows) - running
                yield gone
            if running == 0 or step + 1 == self.sampling.max_new_tokens:
                break
            if running <= _COMPACT_BELOW * len(alive):
                keep = (~finished).nonzero().squeeze(1)
                alive, token = alive[keep], token[keep]
                finished = torch.zeros_like(keep, dtype=torch.bool)
                state.keep(keep)
            state.feed(token)
        if gone < len(self.rows):
            yield len(self.rows)

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
                prompt_ids=row.prompt,
                token_ids=tokens[r][:length],
                logprobs=kept,
                finish_reason="stop" if stopped[r] else "length",
                weight_versions=[(version, 0, length)],
            )
            result.append(completion)
        return result


class _Decoder:
    """The model's state while rows grow by a token a step.

    Distinct prompts are padded on the left and read once; their cache is then repeated for the rows
    that share them. ``logits`` ``[R, V]`` are those of each row's next token.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int
    ) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.cache = DynamicCache(config=model.config)
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.extras: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in parameters:
            self.extras["logits_to_keep"] = 1
        self._read_prompts(prompts, max_new_tokens)

    def _read_prompts(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.width = self.columns = max(map(len, distinct))
        self.limit = self.width + max_new_tokens
        input_ids = torch.zeros(len(distinct), self.width, dtype=torch.long)
        mask = torch.zeros(len(distinct), self.limit, dtype=torch.long)
        for prompt, i in distinct.items():
            input_ids[i, self.width - len(prompt) :] = torch.tensor(prompt)
            mask[i, self.width - len(prompt) :] = 1
        self.mask = mask.to(self.device)
        positions = (self.mask[:, : self.width].cumsum(dim=1) - 1).clamp_min(0)
        self._forward(input_ids.to(self.device), positions, self.mask[:, : self.width])
        self.positions = positions[:, -1:]
        self.roomy = self._make_room()
        owners = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=self.device)
        self.keep(owners)
        self.logits = self.logits[owners]

    def _make_room(self) -> bool:
        """Let the cache grow in place, where all layers and their attention can do with it.

        The mask then takes its final form, additive ``[R, 1, 1, columns]``: it hides spare columns
        as it hides padding, and transformers need not build a mask for every token.
        """
        attention = self.model.config._attn_implementation
        plain = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        if not (plain and attention in ("sdpa", "eager") and self.takes_positions):
            return False
        self.cache.layers = [_RoomyLayer(layer) for layer in self.cache.layers]
        dtype = self.cache.layers[0].keys.dtype
        hidden = self.mask == 0
        hidden[:, self.width :] = True
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
        self.mask = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None, :]
        return True

    def feed(self, token: Tensor) -> None:
        """Append ``token`` ``[R]`` to the rows; ``logits`` are then those of the next one."""
        if self.roomy and self.width == self.columns:
            self.columns = min(self.width + _ROOM, self.limit)
            for layer in self.cache.layers:
                layer.widen(self.columns)
        if self.roomy:
            self.mask[..., self.width] = 0
        self.width += 1
        self.columns = max(self.columns, self.width)
        self.positions = self.positions + 1
        self._forward(token[:, None], self.positions, self.mask[..., : self.columns])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (or with several copies of some)."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _forward(self, input_ids: Tensor, positions: Tensor, mask: Tensor) -> None:
        if self.takes_positions:
            self.extras["position_ids"] = positions
        output = self.model(
            input_ids=input_ids, attention_mask=mask, past_key_values=self.cache, **self.extras
        )
        self.logits = output.logits[:, -1]


class _RoomyLayer(DynamicLayer):
    """A cache layer with spare columns, into which the states of new tokens are written.

    ``DynamicLayer`` copies all it holds for every token. The spare columns are handed to attention
    together with the others, because a CPU attends to a contiguous cache about twice as fast as to
    a slice of one; the attention mask must hide them.

    Args:
        layer: the layer whose contents to take over.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.length = layer.keys.shape[-2]

    def widen(self, columns: int) -> None:
        """Have this many columns, the new ones spare."""
        spare = columns - self.keys.shape[-2]
        self.keys = functional.pad(self.keys, (0, 0, 0, spare))
        self.values = functional.pad(self.values, (0, 0, 0, spare))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens; returns all columns, the spare ones included."""
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length
