"""A causal language model's state while completions grow by one token a step.

Notation in shapes: ``R`` rows (completions in progress), ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf_lightning.core.distributed import world_size
from rlhf_lightning.core.interrupt import Stopped, interrupts, uninterrupted
from rlhf_lightning.models.packing import plain_attention

_ROOM = 16  # spare columns by which a cache layer grows


class Decoder:
    """Feeds tokens to a model and keeps their key-value cache.

    Distinct prompts are padded on the left and read once; their cache is then repeated for the rows
    that share them.

    Args:
        model: the model, in evaluation mode.
        prompts: the prompt of each row, in any order and repeated at will.
        max_new_tokens: the most tokens that will be fed.

    Attributes:
        logits: ``[R, V]``, each row's logits of its next token.
    """

    logits: Tensor
    mask: Tensor
    positions: Tensor

    def __init__(
        self, model: Lockstep, prompts: list[tuple[int, ...]], max_new_tokens: int
    ) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.room: list[_RoomyLayer] = []
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self.width = self.columns = max(map(len, distinct))
        self.limit = self.width + max_new_tokens
        self._read_prompts(list(distinct))
        owners = torch.tensor([distinct[prompt] for prompt in prompts], device=model.device)
        self.keep(owners)
        self.logits = self.logits[owners]

    def feed(self, token: Tensor) -> None:
        """Append ``token`` ``[R]`` to the rows; ``logits`` are then those of the next one."""
        if self.room:
            if self.width == self.columns:
                self.columns = min(self.width + _ROOM, self.limit)
                for layer in self.room:
                    layer.widen(self.columns)
            self.mask[..., self.width] = 0
        self.width += 1
        self.columns = max(self.columns, self.width)
        self.positions = self.positions + 1
        self._forward(token[:, None], self.positions, self.mask[..., : self.columns])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (or with several copies of some)."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _read_prompts(self, prompts: list[tuple[int, ...]]) -> None:
        input_ids = torch.zeros(len(prompts), self.width, dtype=torch.long)
        mask = torch.zeros(len(prompts), self.limit, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            input_ids[i, self.width - len(prompt) :] = torch.tensor(prompt)
            mask[i, self.width - len(prompt) :] = 1
        self.mask = mask.to(self.model.device)
        positions = (self.mask[:, : self.width].cumsum(dim=1) - 1).clamp_min(0)
        self._forward(input_ids.to(self.model.device), positions, self.mask[:, : self.width])
        self.positions = positions[:, -1:]
        self._make_room()

    def _make_room(self) -> None:
        """Let the cache grow in place, where all layers and their attention can do with it.

        The mask then takes its final form, additive ``[R, 1, 1, columns]``: it hides spare columns
        as it hides padding, and transformers need not build a mask for every token.
        """
        plain = [layer for layer in self.cache.layers if type(layer) is DynamicLayer]
        attention = plain_attention(self.model.model)
        if len(plain) < len(self.cache.layers) or attention not in ("sdpa", "eager"):
            return
        if not self.model.takes_positions:  # such a model reads positions off a mask of 0 and 1
            return
        self.room = [_RoomyLayer(layer) for layer in plain]
        self.cache.layers = list(self.room)
        hidden = self.mask == 0
        hidden[:, self.width :] = True
        mask = torch.zeros_like(hidden, dtype=self.room[0].keys.dtype)
        self.mask = mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)[:, None, None, :]

    def _forward(self, input_ids: Tensor, positions: Tensor, mask: Tensor) -> None:
        self.logits = self.model(input_ids, positions, mask, self.cache)


class Lockstep:
    """Calls a model for the logits of the next token, equally often on every rank if it must be.

    The parameters of a sharded model (FSDP2) are gathered from all ranks in every call. Ranks
    finish their completions at different times; those that are done go on calling along in
    :meth:`finish` until all are.

    Args:
        model: the model, in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.device = model.device
        self.sharded = world_size() > 1 and any(
            isinstance(parameter, DTensor) for parameter in model.parameters()
        )
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._options: dict[str, Any] = {"use_cache": True}
        self._closed = ExitStack()
        if "logits_to_keep" in parameters:
            self._options["logits_to_keep"] = 1

    def __call__(
        self, input_ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Logits ``[R, V]`` after the last of ``input_ids`` ``[R, T]``; ``cache`` grows."""
        if self.sharded:
            self._anyone_working(True)
        if self.takes_positions:
            self._options["position_ids"] = positions
        output = self.model(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, **self._options
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def finish(self) -> None:
        """This rank is done; returns when all are."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self.sharded and self._anyone_working(False):
            self.model(input_ids=token, use_cache=False)

    def __enter__(self) -> None:
        """A sharded model is interrupted between two calls, in all ranks alike."""
        if self.sharded:
            self._closed.enter_context(uninterrupted())

    def __exit__(self, *error: object) -> None:
        self._closed.close()

    def _anyone_working(self, working: bool) -> bool:
        """Whether any rank is; raises in all of them where one was told to stop."""
        stop = interrupts.reason is not None
        count = torch.tensor([int(working), int(stop)], device=self.device)
        dist.all_reduce(count)
        anyone, stops = count.tolist()
        if stops:
            interrupts.tell(Stopped())
            interrupts.check()
        return bool(anyone)


class _RoomyLayer(DynamicLayer):
    """A cache layer with spare columns, into which the states of new tokens are written.

    ``DynamicLayer`` copies all it holds for every token. The spare columns are handed to attention
    together with the others, because a CPU attends to a contiguous cache about twice as fast as to
    a slice of one; the attention mask must hide them.

    Args:
        layer: the layer whose contents to take over.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.length = self.keys.shape[-2]

    def widen(self, columns: int) -> None:
        """Have this many columns, the new ones spare."""
        self.keys = _widened(self.keys, columns)
        self.values = _widened(self.values, columns)

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


def _widened(states: Tensor, columns: int) -> Tensor:
    """``[R, heads, T, D]`` copied into ``[R, heads, columns, D]``; what is new is 0."""
    rows, heads, length, size = states.shape
    wider = states.new_empty(rows, heads, columns, size)
    wider[:, :, :length] = states
    wider[:, :, length:] = 0
    return wider
