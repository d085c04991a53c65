"""A causal language model as a policy: log-probabilities of given tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlhf_lightning.functional.logprobs import (
    TokenStatistics,
    logprobs_from_logits,
    token_logprobs,
)
from rlhf_lightning.models.layout import Layout, packed_layout, padded_layout
from rlhf_lightning.models.packing import enable_packing, longest_row

# Fields by which configurations scale the logits; some models multiply by them, some divide.
_SCALE_FIELDS = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
)
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class LinearHead:
    """How a model makes logits of hidden states: ``softcap * tanh(scale * linear(h) / softcap)``.

    Attributes:
        module: the linear output layer.
        scale: factor on its output.
        softcap: bound of the logits (Gemma 2), None for none.
    """

    module: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., V]`` of ``[..., H]``."""
        logits = F.linear(hidden, self.module.weight, self.module.bias) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class CausalPolicy(nn.Module):
    """Wraps a causal language model so that its forward gives per-token log-probabilities.

    The backbone runs once; only tokens that count in the loss go through the output head, in
    chunks, so that ``[B, T, V]`` logits never exist. All of it happens in :meth:`forward`, so that
    sharded parameters (FSDP2) are gathered when the head needs them.

    Rows of different lengths are packed: laid end to end, without padding, and with a prompt that
    several rows share read once (:mod:`rlhf_lightning.models.layout`). No row sees another, results
    are those of padded rows up to rounding, and a micro-batch in which too little would be saved is
    padded. With dropout, packed and padded rows draw different masks. Rows beyond the window of a
    model's local attention are padded.

    How the model turns hidden states into logits, and whether its attention can be packed, is found
    out on the first call, on a few tokens, by comparing with the model's own logits. A head that is
    not a linear map with the scale and the softcap that its configuration names is served by the
    model's full forward, a model that cannot be packed by padding; with a warning each.

    Args:
        model: the language model, kept as ``.model``.
        packing: pack rows where the model allows it.
    """

    def __init__(self, model: PreTrainedModel, packing: bool = True) -> None:
        super().__init__()
        self.model = model
        self.packing = packing
        self._probed = False
        self._head: LinearHead | None = None
        self._longest_row: int | None = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_accuracy: bool = False,
    ) -> TokenStatistics:
        """Log-probability of each token given the tokens before it.

        Args:
            input_ids: ``[B, T]``, padded on the right or on the left.
            attention_mask: ``[B, T]``, 1 on tokens and 0 on padding.
            loss_mask: ``[B, T]`` bool, the tokens that are asked about.
            temperature: divides the logits, as it did when the tokens were sampled.
            with_entropy: also return the entropy of each token's distribution.
            with_accuracy: also return whether each token is the most likely one.

        Returns:
            Each field ``[B, T]``, 0 (False) off the loss mask, on padding and on the first token of
            a row, which nothing predicts.

        Raises:
            ValueError: if the three tensors differ in shape.
        """
        if not input_ids.shape == attention_mask.shape == loss_mask.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)}, attention_mask {tuple(attention_mask.shape)}"
                f" and loss_mask {tuple(loss_mask.shape)} must have the same shape [B, T]"
            )
        if not self._probed:
            self._probe(input_ids)
        loss_mask = loss_mask & (attention_mask > 0) & (attention_mask.cumsum(dim=1) > 1)
        layout = self._layout(input_ids, attention_mask, loss_mask)
        head = self._head
        if head is None:
            return logprobs_from_logits(
                self.model(**layout.inputs).logits,
                input_ids,
                loss_mask,
                predictors=layout.predictors,
                temperature=temperature,
                with_entropy=with_entropy,
                with_accuracy=with_accuracy,
            )
        return token_logprobs(
            self.model.base_model(**layout.inputs)[0],
            head.module.weight,
            input_ids,
            loss_mask,
            predictors=layout.predictors,
            head_bias=head.module.bias,
            temperature=temperature,
            logit_scale=head.scale,
            softcap=head.softcap,
            with_entropy=with_entropy,
            with_accuracy=with_accuracy,
        )

    def _layout(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Layout:
        """Packed where that is possible and pays, else padded."""
        fits = self._longest_row is None or input_ids.shape[1] <= self._longest_row
        packed = None
        if self.packing and fits:
            packed = packed_layout(input_ids, attention_mask, loss_mask)
        return packed or padded_layout(input_ids, attention_mask, loss_mask)

    def _probe(self, input_ids: Tensor) -> None:
        self._head = self._find_head(input_ids[:1, :_PROBE_TOKENS])
        if self.packing:
            self._longest_row = longest_row(self.model)
            reason = enable_packing(self.model)
            if reason is not None:
                self.packing = False
                warnings.warn(
                    f"rows of {type(self.model).__name__} are padded, because {reason}. Set"
                    " packing to false to have it so without this warning",
                    stacklevel=3,
                )
        self._probed = True

    @torch.no_grad()
    def _find_head(self, input_ids: Tensor) -> LinearHead | None:
        """The linear head that reproduces the model's own logits, None if there is none."""
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear) and self.model.base_model is not self.model:
            hidden, logits = _hidden_and_logits(self.model, input_ids)
            for scale, softcap in _candidates(self.model.config):
                candidate = LinearHead(head, scale, softcap)
                if _same(candidate.logits(hidden), logits):
                    return candidate
        warnings.warn(
            f"{type(self.model).__name__} has an output head that is not a plain linear map;"
            " log-probabilities come from full [B, T, V] logits, which takes more memory",
            stacklevel=3,
        )
        return None


def _unpadded(input_ids: Tensor) -> dict[str, Any]:
    ones = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": ones, "use_cache": False}


def _hidden_and_logits(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of one and the same forward pass.

    The global generators are left as they were, whatever noise the model has.
    """
    kept: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, __, output: kept.append(output[0]))
    device = input_ids.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            logits = model(**_unpadded(input_ids)).logits
    finally:
        hook.remove()
    return kept[0], logits


def _same(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal up to rounding in the coarser of the two dtypes."""
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(expected.dtype).eps)
    gap = (logits - expected).abs().max()
    return bool(gap <= max(8 * eps, 1e-6) * expected.abs().max())


def _candidates(config: Any) -> Iterator[tuple[float, float | None]]:
    """(scale, softcap) pairs that a configuration suggests, the most specific first."""
    config = config.get_text_config(decoder=True)
    values = [getattr(config, name, None) for name in _SCALE_FIELDS]
    scales = [s for value in values if value for s in (float(value), 1.0 / float(value))]
    softcap = getattr(config, "final_logit_softcapping", None)
    for cap in [softcap, None] if softcap else [None]:
        for scale in [*scales, 1.0]:
            yield scale, cap
