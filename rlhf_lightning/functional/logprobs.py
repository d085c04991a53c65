"""Log-probabilities of tokens, and entropies, without holding ``[B, T, V]`` of anything.

Notation: ``B`` rows, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary, ``N`` tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlhf_lightning.functional._checks import check_aligned, check_shape

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
        row_bytes = len(head_weight) * _result_dtype(hidden.dtype).itemsize
        chunk_size = max(1, _CHUNK_BYTES // row_bytes)
    head = _Head(logit_scale, softcap, temperature)
    if len(tokens) <= chunk_size:
        logits = head.logits(F.linear(selected, head_weight, head_bias))
        found = _statistics(logits, targets, with_entropy, with_accuracy)
    else:
        wanted = _Wanted(_linear_dtype(hidden), chunk_size, with_entropy, with_accuracy)
        found = TokenStatistics(
            *_ChunkedLogprobs.apply(selected, head_weight, head_bias, targets, head, wanted)
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
        _Head(temperature=temperature).logits(logits.flatten(0, 1).index_select(0, predictors)),
        input_ids.flatten().index_select(0, tokens),
        with_entropy,
        with_accuracy,
    )
    return _scatter(found, tokens, loss_mask)


class _Head(NamedTuple):
    """What an output head does after its linear map, and the temperature of sampling."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, linear: Tensor) -> Tensor:
        """Logits in the precision of the result; overwrites ``linear`` where autograd lets it."""
        logits = linear.to(_result_dtype(linear.dtype))
        if self.logit_scale != 1:
            logits *= self.logit_scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        if self.temperature != 1:
            logits /= self.temperature
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to the linear map's output."""
        slope = self.logit_scale / self.temperature
        if self.softcap is None:
            return slope
        capped = logits * (self.temperature / self.softcap)
        return capped.square_().neg_().add_(1).mul_(slope)


class _Wanted(NamedTuple):
    """What is computed chunk by chunk, and how."""

    dtype: torch.dtype
    chunk_size: int
    entropy: bool
    accuracy: bool


def _statistics(
    logits: Tensor, targets: Tensor, with_entropy: bool, with_accuracy: bool
) -> TokenStatistics:
    """Of ``[N, V]`` logits and ``[N]`` tokens; each field ``[N]``."""
    log_p = logits.log_softmax(dim=-1)
    entropy = correct = None
    if with_entropy:
        entropy = -(log_p.exp() * log_p.clamp(min=_lowest(log_p))).sum(dim=-1)
    if with_accuracy:
        correct = log_p.argmax(dim=-1) == targets
    return TokenStatistics(_gather(log_p, targets), entropy, correct)


class _ChunkedLogprobs(torch.autograd.Function):
    """``[N, H]`` hidden states to the fields of ``TokenStatistics``, ``[N]`` each, chunk by chunk.

    Between the passes it holds ``[N]`` numbers and its inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: _Head,
        wanted: _Wanted,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.head, ctx.dtype, ctx.chunk_size = head, wanted.dtype, wanted.chunk_size
        logprobs = hidden.new_empty(len(hidden), dtype=_result_dtype(wanted.dtype))
        log_partition = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if wanted.entropy else None
        correct = torch.empty_like(targets, dtype=torch.bool) if wanted.accuracy else None
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = _linear_chunks(hidden, weight, bias, wanted.dtype, wanted.chunk_size)
            for rows, _, linear in chunks:
                logits = head.logits(linear)
                if correct is not None:
                    correct[rows] = logits.argmax(dim=-1) == targets[rows]
                highest = logits.amax(dim=-1, keepdim=True)
                logits -= highest
                picked = _gather(logits, targets[rows])
                p = logits.exp_() if entropy is None else logits.exp()
                total = p.sum(dim=-1)
                logprobs[rows] = picked - total.log()
                log_partition[rows] = highest.squeeze(-1) + total.log()
                if entropy is not None:
                    average = p.mul_(logits.clamp_(min=_lowest(logits))).sum(dim=-1) / total
                    entropy[rows] = total.log() - average
        ctx.save_for_backward(hidden, weight, bias, targets, log_partition, entropy)
        if correct is not None:
            ctx.mark_non_differentiable(correct)
        return logprobs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_partition, entropy = ctx.saved_tensors
        if grad_logprobs is None:  # only the entropy is used
            grad_logprobs = torch.zeros_like(log_partition)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Summed in half precision, the gradient would lose what the later chunks add to it.
        total_dtype = _result_dtype(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total_dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=total_dtype) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            cast_weight = weight.to(ctx.dtype)
            chunks = _linear_chunks(hidden, cast_weight, bias, ctx.dtype, ctx.chunk_size)
            for rows, inputs, linear in chunks:
                logits = ctx.head.logits(linear)
                slope = ctx.head.slope(logits)
                grad = _grad_logits(
                    logits.sub_(log_partition[rows, None]).exp_(),
                    targets[rows],
                    grad_logprobs[rows],
                    None if grad_entropy is None else (grad_entropy[rows], entropy[rows]),
                )
                grad = grad.mul_(slope).to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad @ cast_weight).to(hidden.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.t(), inputs)
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _linear_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunk_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their hidden states and the head's linear map of them, a chunk at a time.

    All chunks share one piece of memory: taking it anew for each costs a CPU 15 % of its time.
    """
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    memory = weight.new_empty(min(len(hidden), chunk_size), len(weight))
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        inputs = hidden[rows].to(dtype)
        out = memory[: len(inputs)]
        if bias is None:
            torch.mm(inputs, weight.t(), out=out)
        else:
            torch.addmm(bias, inputs, weight.t(), out=out)
        yield rows, inputs, out


def _grad_logits(
    p: Tensor, targets: Tensor, grad_logprobs: Tensor, grad_entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """``[C, V]`` gradient with respect to the logits, in the memory of ``p``.

    ``d log p_y / dz = 1_y - p`` and ``dH / dz = -p (log p + H)``.
    """
    if grad_entropy is None:
        grad = p.mul_(-grad_logprobs[:, None])
    else:
        upstream, entropy = grad_entropy
        factor = p.log().clamp_(min=_lowest(p)).add_(entropy[:, None])
        grad = p.mul_(factor.mul_(-upstream[:, None]).sub_(grad_logprobs[:, None]))
    return grad.scatter_add_(1, targets[:, None], grad_logprobs[:, None])


def _lowest(logits: Tensor) -> float:
    """What stands in for ``-inf``, because ``0 log 0`` counts as 0 in an entropy."""
    return torch.finfo(logits.dtype).min


def _gather(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(-1, targets[:, None]).squeeze(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is good enough for a matrix product, not for a log-probability."""
    return torch.promote_types(dtype, torch.float32)


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
