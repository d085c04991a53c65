"""Drawing tokens: truncated distributions and per-row random streams.

Notation in shapes: ``R`` rows, ``V`` vocabulary, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.types import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: Sequence[int], samples: Sequence[int], length: int) -> Tensor:
    """Random numbers that depend on nothing but each row's seed and sample index.

    Row ``r`` is a SplitMix64 stream whose start is hashed from ``(seeds[r], samples[r])``. So the
    tokens of a row are the same whatever else is in the batch, and a longer stream starts with the
    shorter one.

    Args:
        seeds: the prompt's seed of each row, any integer (taken modulo 2**64).
        samples: which sample of its prompt each row is.
        length: numbers in each row.

    Returns:
        ``[R, length]`` float64 in [0, 1), on the CPU.

    >>> u = uniforms([7, 7], [0, 1], 3)
    >>> bool((u[0] == uniforms([7], [0], 3)[0]).all()), bool((u[0] == u[1]).any())
    (True, False)
    """
    seed = np.array([s % 2**64 for s in seeds], dtype=np.uint64)
    sample = np.array(samples, dtype=np.uint64)
    start = _mix(_mix(seed + _GOLDEN) + (sample + np.uint64(1)) * _GOLDEN)
    steps = np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(start[:, None] + steps[None, :])
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def sampling_logprobs(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probabilities of the distribution that tokens are drawn from.

    Temperature first, then top-k, top-p and min-p, each on what the ones before it left: the order
    of transformers. Greedy decoding (temperature 0) leaves the model's own distribution.

    Args:
        logits: ``[R, V]`` of the model.
        sampling: the distribution's parameters.

    Returns:
        ``[R, V]`` in float32 (float64 if the logits are), ``-inf`` on tokens that are cut off.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature == 0:
        return logits.log_softmax(dim=-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        # A token goes when those before it already have the mass; the first one always stays.
        gone = (probs.cumsum(dim=-1) - probs) >= sampling.top_p
        gone[:, 0] = False
        logits = logits.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    logprobs = logits.log_softmax(dim=-1)
    if sampling.min_p > 0:
        least = logprobs.max(dim=-1, keepdim=True).values + float(np.log(sampling.min_p))
        logprobs = logits.masked_fill(logprobs < least, -torch.inf).log_softmax(dim=-1)
    return logprobs


def draw(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution at ``uniform``.

    Args:
        logits: ``[R, V]``.
        sampling: the distribution's parameters.
        uniform: ``[R]`` float64 in [0, 1), unused under greedy decoding.

    Returns:
        Token ids ``[R]`` int64 and their log-probabilities ``[R]``.
    """
    logprobs = sampling_logprobs(logits, sampling)
    if sampling.temperature == 0:
        best, token = logprobs.max(dim=-1)
        return token, best
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).clamp_max_(logits.shape[-1] - 1)
    chosen = logprobs.gather(1, token)
    # Rounding in a parallel cumulative sum could step onto a token of probability 0.
    best, best_token = logprobs.max(dim=-1, keepdim=True)
    possible = chosen > -torch.inf
    return (
        torch.where(possible, token, best_token).squeeze(1),
        torch.where(possible, chosen, best).squeeze(1),
    )
