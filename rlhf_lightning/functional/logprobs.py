"""Log-probabilities of tokens, and entropies, without holding ``[B, T, V]`` of anything.

Notation: ``B`` rows, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary, ``N`` tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_lightning.functional._checks import check_aligned, check_shape
from rlhf_lightning.functional._chunked_head import (
    ChunkedLogprobs,
    Head,
    Wanted,
    gather_tokens,
    lowest,
    result_dtype,
)

_CHUNK_BYTES = 64 * 2**20


class TokenStatistics(NamedTuple):
    """What a model thinks of given tokens.

    Attributes:
        logprobs: ``[B, T]`` log-probability of each token given the tokens before it.
        entropy: ``[B, T]`` entropy of the distribution that the token was drawn from; None unless
            asked for.
        correct: ``[B, T]`` bool, whether the token is the most likely one; None unless asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenStatistics:
        """The same with every tensor changed."""
        entropy, correct = (None if field is None else change(field) for field in self[1:])
        return TokenStatistics(change(self.logprobs), entropy, correct)


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    input_ids: Tensor,
    loss_mask: Tensor,
    *,
    predictors: Tensor | None = None,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    with_entropy: bool = False,
    with_accuracy: bool = False,
) -> TokenStatistics:
    """Log-probability of each token that counts, from the hidden states before the output head.

    ``logprobs[b, t] = log_softmax(z / temperature)[input_ids[b, t]]`` with
    ``z = softcap · tanh(logit_scale (W hidden[b, t-1] + bias) / softcap)``: hidden state ``t - 1``
    predicts token ``t``.

    Only tokens that count go through the head, ``chunk_size`` at a time; the logits of a chunk are
    dropped and computed again in the backward pass, unless a single chunk holds them all. The
    gradient of a head in half precision is summed over chunks in float32. Under autocast the head
    runs in the precision that ``torch.nn.Linear`` would.

    Args:
        hidden: ``[B, T, H]``, last hidden states of the backbone; with ``predictors`` any
            ``[*, *, H]``.
        head_weight: ``[V, H]``, weight of the output head.
        input_ids: ``[B, T]`` int64.
        loss_mask: ``[B, T]`` bool, True where the token counts; position 0 never does.
        predictors: ``[N]`` for each token that counts, row by row, the position in the flattened
            hidden states that predicts it; by default the one before it.
        head_bias: ``[V]``, bias of the output head.
        temperature: divides the logits; greater than 0.
        logit_scale: multiplies the logits (Cohere, Granite).
        softcap: bounds the logits to ``(-softcap, softcap)`` (Gemma 2,
            https://arxiv.org/abs/2408.00118).
        chunk_size: tokens whose logits are held at once; by default as many as fit into 64 MiB.
        with_entropy: also return the entropy of the distribution that each token was drawn from.
        with_accuracy: also return whether each token is the most likely one.

    Returns:
        Each field ``[B, T]``, and 0 (False) where masked. Log-probabilities and entropies are
        float32, or float64 for float64 hidden states; differentiable once; and connected to the
        graph of ``hidden`` and ``head_weight`` also where no token counts, as DDP needs.

    Raises:
        TypeError: if ``loss_mask`` is not bool.
        ValueError: if shapes do not fit, or an option is out of its range.

    Example:
        >>> hidden, head_weight = torch.zeros(1, 3, 2), torch.zeros(4, 2)
        >>> input_ids, loss_mask = torch.tensor([[1, 2, 3]]), torch.tensor([[False, False, True]])
        >>> token_logprobs(hidden, head_weight, input_ids, loss_mask).logprobs
        tensor([[ 0.0000,  0.0000, -1.3863]])
    """
    check_aligned(loss_mask, input_ids=input_ids)
    tokens = _loss_tokens(loss_mask)
    _check_predicting("hidden", hidden, "H", loss_mask, tokens, predictors)
    check_shape("head_weight", head_weight, "[V, H]", None, hidden.shape[-1])
    if head_bias is not None:
        check_shape("head_bias", head_bias, "[V]", len(head_weight))
    _check_options(temperature, softcap, chunk_size)

    predictors = tokens - 1 if predictors is None else predictors
    selected = hidden.flatten(0, 1).index_select(0, predictors)
    targets = input_ids.flatten().index_select(0, tokens)
    if chunk_size is None:
        row_bytes = len(head_weight) * result_dtype(hidden.dtype).itemsize
        chunk_size = max(1, _CHUNK_BYTES // row_bytes)
    head = Head(logit_scale, softcap, temperature)
    if len(tokens) <= chunk_size:
        logits = head.logits(F.linear(selected, head_weight, head_bias))
        found = _statistics(logits, targets, with_entropy, with_accuracy)
    else:
        wanted = Wanted(_linear_dtype(hidden), chunk_size, with_entropy, with_accuracy)
        found = TokenStatistics(
            *ChunkedLogprobs.apply(selected, head_weight, head_bias, targets, head, wanted)
        )
    return _scatter(found, tokens, loss_mask)


def logprobs_from_logits(
    logits: Tensor,
    input_ids: Tensor,
    loss_mask: Tensor,
    *,
    predictors: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_accuracy: bool = False,
) -> TokenStatistics:
    """Log-probability of each token that counts, from full logits.

    For models whose output head is more than the linear map of :func:`token_logprobs`.

    Args:
        logits: ``[B, T, V]``; position ``t - 1`` predicts token ``t``. With ``predictors`` any
            ``[*, *, V]``.
        input_ids: ``[B, T]`` int64.
        loss_mask: ``[B, T]`` bool, True where the token counts; position 0 never does.
        predictors: as of :func:`token_logprobs`.
        temperature: divides the logits; greater than 0.
        with_entropy: also return the entropy of the distribution that each token was drawn from.
        with_accuracy: also return whether each token is the most likely one.

    Returns:
        As :func:`token_logprobs`.

    Raises:
        TypeError: if ``loss_mask`` is not bool.
        ValueError: if shapes do not fit, or the temperature is not positive.

    Example:
        >>> logits, input_ids = torch.zeros(1, 2, 4), torch.tensor([[1, 2]])
        >>> logprobs_from_logits(logits, input_ids, torch.tensor([[False, True]])).logprobs
        tensor([[ 0.0000, -1.3863]])
    """
    check_aligned(loss_mask, input_ids=input_ids)
    tokens = _loss_tokens(loss_mask)
    _check_predicting("logits", logits, "V", loss_mask, tokens, predictors)
    _check_options(temperature)
    predictors = tokens - 1 if predictors is None else predictors
    found = _statistics(
        Head(temperature=temperature).logits(logits.flatten(0, 1).index_select(0, predictors)),
        input_ids.flatten().index_select(0, tokens),
        with_entropy,
        with_accuracy,
    )
    return _scatter(found, tokens, loss_mask)


def _statistics(
    logits: Tensor, targets: Tensor, with_entropy: bool, with_accuracy: bool
) -> TokenStatistics:
    """Of ``[N, V]`` logits and ``[N]`` tokens; each field ``[N]``."""
    log_p = logits.log_softmax(dim=-1)
    entropy = correct = None
    if with_entropy:
        entropy = -(log_p.exp() * log_p.clamp(min=lowest(log_p))).sum(dim=-1)
    if with_accuracy:
        correct = log_p.argmax(dim=-1) == targets
    return TokenStatistics(gather_tokens(log_p, targets), entropy, correct)


def _linear_dtype(hidden: Tensor) -> torch.dtype:
    """The precision in which ``torch.nn.Linear`` would multiply: autocast leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _loss_tokens(loss_mask: Tensor) -> Tensor:
    """``[N]`` positions, in the flattened batch, of the tokens that count."""
    positions = torch.arange(loss_mask.numel(), device=loss_mask.device).view_as(loss_mask)
    return positions[:, 1:][loss_mask[:, 1:]]


def _scatter(found: TokenStatistics, tokens: Tensor, loss_mask: Tensor) -> TokenStatistics:
    """Each field ``[B, T]``, with 0 where no token counts."""

    def spread(values: Tensor) -> Tensor:
        empty = values.new_zeros(loss_mask.numel())
        return empty.index_copy(0, tokens, values).view_as(loss_mask)

    return found.map(spread)


def _check_predicting(
    name: str,
    states: Tensor,
    last: str,
    loss_mask: Tensor,
    tokens: Tensor,
    predictors: Tensor | None,
) -> None:
    if predictors is None:
        check_shape(name, states, f"[B, T, {last}]", *loss_mask.shape, None)
        return
    check_shape(name, states, f"[*, *, {last}]", None, None, None)
    check_shape("predictors", predictors, "[N]", len(tokens))


def _check_options(
    temperature: float, softcap: float | None = None, chunk_size: int | None = None
) -> None:
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; it must be greater than 0. Log-probabilities of greedy"
            " decoding are those of temperature 1"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be greater than 0, or None for no bound")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None to choose it")
