"""The one exponential that ratios of probabilities go through."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Where :func:`exp_ratio` turns into its tangent: e^20 is 4.9e8, far outside any trust region."""


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """``exp`` that goes on as its tangent above :data:`MAX_LOG_RATIO`, so that it never overflows.

    ``exp(x)`` up to 20 and ``e^20 (1 + x - 20)`` above. The gradient of ``exp(clamp(x))`` is 0
    beyond the bound; this one stays ``e^20``, so that a token that has run away is pulled back.

    Args:
        log_ratio: any shape.

    Returns:
        The same shape; exactly 1 where ``log_ratio`` is 0.
    """
    excess = (log_ratio - MAX_LOG_RATIO).relu()
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() * (1 + excess)
