"""A causal language model as a policy: log-probabilities of given tokens."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlhf_lightning.functional.logprobs import logprobs_from_logits, token_logprobs

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

    How the model turns hidden states into logits is found out on the first call, on a few tokens,
    by comparing with the model's own logits. A head that is not a linear map with the scale and the
    softcap that its configuration names is served by the model's full forward, with a warning.

    Args:
        model: the language model, kept as ``.model``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._probed = False
        self._head: LinearHead | None = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each token given the tokens before it.

        Args:
            input_ids: ``[B, T]``, padded on the right (or on the left).
            attention_mask: ``[B, T]``, 1 on tokens and 0 on padding.
            loss_mask: ``[B, T]`` bool, the tokens that are asked about.
            temperature: divides the logits, as it did when the tokens were sampled.
            with_entropy: also return the entropy of each token's distribution.

        Returns:
            Log-probabilities ``[B, T]`` and entropies ``[B, T]`` or None, 0 off the loss mask.
        """
        inputs = self._model_inputs(input_ids, attention_mask)
        if not self._probed:
            self._head = self._find_head(inputs)
            self._probed = True
        head = self._head
        if head is None:
            logits = self.model(**inputs).logits
            return logprobs_from_logits(
                logits, input_ids, loss_mask, temperature=temperature, with_entropy=with_entropy
            )
        return token_logprobs(
            self.model.base_model(**inputs)[0],
            head.module.weight,
            input_ids,
            loss_mask,
            head_bias=head.module.bias,
            temperature=temperature,
            logit_scale=head.scale,
            softcap=head.softcap,
            with_entropy=with_entropy,
        )

    def _model_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """What the model is called with, so that padding on either side changes nothing.

        Causal attention never looks right, so padding on the right needs no mask at all (which lets
        attention run its fastest kernel); positions then simply count up.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        else:
            inputs["attention_mask"] = attention_mask
            positions = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        if self._takes_positions:
            inputs["position_ids"] = positions
        return inputs

    @torch.no_grad()
    def _find_head(self, inputs: dict[str, Any]) -> LinearHead | None:
        """The linear head that reproduces the model's own logits, None if there is none."""
        columns = {
            name: value[:1, -_PROBE_TOKENS:] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear) and self.model.base_model is not self.model:
            hidden, logits = _hidden_and_logits(self.model, columns)
            tolerance = 1e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2
            for scale, softcap in _candidates(self.model.config):
                candidate = LinearHead(head, scale, softcap)
                gap = (candidate.logits(hidden) - logits).abs().max()
                if bool(gap <= tolerance * logits.abs().max().clamp_min(1e-30)):
                    return candidate
        warnings.warn(
            f"{type(self.model).__name__} has an output head that is not a plain linear map;"
            " log-probabilities come from full [B, T, V] logits, which takes more memory",
            stacklevel=3,
        )
        return None


def _hidden_and_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Last hidden states and logits of one and the same forward pass.

    The global generators are left as they were, whatever noise the model has.
    """
    kept: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, __, output: kept.append(output[0]))
    device = inputs["input_ids"].device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            logits = model(**inputs).logits
    finally:
        hook.remove()
    return kept[0], logits


def _candidates(config: Any) -> Iterator[tuple[float, float | None]]:
    """(scale, softcap) pairs that a configuration suggests, the most specific first."""
    config = config.get_text_config(decoder=True)
    values = [getattr(config, name, None) for name in _SCALE_FIELDS]
    scales = [s for value in values if value for s in (float(value), 1.0 / float(value))]
    softcap = getattr(config, "final_logit_softcapping", None)
    for cap in [softcap, None] if softcap else [None]:
        for scale in [*scales, 1.0]:
            yield scale, cap
