"""The output head of a language model, a chunk of tokens at a time, with its own backward pass.

Notation: ``H`` hidden size, ``V`` vocabulary, ``N`` tokens, ``C`` tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Head(NamedTuple):
    """What an output head does after its linear map, and the temperature of sampling."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, linear: Tensor) -> Tensor:
        """Logits in the precision of the result; overwrites ``linear`` where autograd lets it."""
        logits = linear.to(result_dtype(linear.dtype))
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


class Wanted(NamedTuple):
    """What is computed chunk by chunk, and how."""

    dtype: torch.dtype
    chunk_size: int
    entropy: bool
    accuracy: bool


class ChunkedLogprobs(torch.autograd.Function):
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
        head: Head,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.head, ctx.dtype, ctx.chunk_size = head, wanted.dtype, wanted.chunk_size
        logprobs = hidden.new_empty(len(hidden), dtype=result_dtype(wanted.dtype))
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
                picked = gather_tokens(logits, targets[rows])
                p = logits.exp_() if entropy is None else logits.exp()
                total = p.sum(dim=-1)
                logprobs[rows] = picked - total.log()
                log_partition[rows] = highest.squeeze(-1) + total.log()
                if entropy is not None:
                    average = p.mul_(logits.clamp_(min=lowest(logits))).sum(dim=-1) / total
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
        total_dtype = result_dtype(ctx.dtype)
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
        factor = p.log().clamp_(min=lowest(p)).add_(entropy[:, None])
        grad = p.mul_(factor.mul_(-upstream[:, None]).sub_(grad_logprobs[:, None]))
    return grad.scatter_add_(1, targets[:, None], grad_logprobs[:, None])


def lowest(logits: Tensor) -> float:
    """What stands in for ``-inf``, because ``0 log 0`` counts as 0 in an entropy."""
    return torch.finfo(logits.dtype).min


def gather_tokens(values: Tensor, targets: Tensor) -> Tensor:
    """``[N]`` of ``[N, V]``: the value of each row's token."""
    return values.gather(-1, targets[:, None]).squeeze(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is good enough for a matrix product, not for a log-probability."""
    return torch.promote_types(dtype, torch.float32)
