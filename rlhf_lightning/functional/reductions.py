"""From per-token numbers to one: masked sums and means, and what a loss is divided by.

Notation: ``B`` rows, ``T`` tokens. A mask is True where a value counts. What a masked position
holds, ``nan`` and ``inf`` included, reaches neither the value nor the gradient.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_lightning.functional._checks import check_aligned, check_choice

Aggregation = Literal["token", "sequence", "constant"]
"""How a loss weighs its tokens.

``"token"``: every token of the step equally (DAPO, https://arxiv.org/abs/2503.14476, eq. 12).
``"sequence"``: every row equally, its tokens by their mean (GRPO, https://arxiv.org/abs/2402.03300,
eq. 3). ``"constant"``: the sum of the tokens over a constant a row, so that a token weighs the same
in a short row and in a long one (Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2).
"""


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the values that count, ``Σ mask · values``.

    Args:
        values: any shape.
        mask: bool, the same shape.
        dim: the dimension to sum over; all of them by default.

    Returns:
        A scalar, or ``values`` without ``dim``; 0 where nothing counts.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    kept = torch.where(mask, values, 0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values that count, ``Σ mask · values / Σ mask``.

    Args:
        values: any shape.
        mask: bool, the same shape.
        dim: the dimension to average over; all of them by default.

    Returns:
        A scalar, or ``values`` without ``dim``; 0 where nothing counts.

    Example:
        >>> mask = torch.tensor([[True, True], [False, False]])
        >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), mask, dim=1)
        tensor([2., 0.])
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def loss_units(loss_mask: Tensor, aggregation: Aggregation, constant: int | None = None) -> Tensor:
    """What each row adds to the denominator of its optimizer step's loss.

    Summed over all rows of the step, on every rank, this is the ``denominator`` of
    :func:`aggregate_loss`: however the rows are cut into micro-batches, the gradients add up to the
    same. A row without a loss token still counts as a row under ``"sequence"`` and ``"constant"``,
    as in TRL's ``grpo`` and ``dr_grpo``.

    Args:
        loss_mask: ``[B, T]`` bool, True where the token counts.
        aggregation: how tokens are weighed, see :data:`Aggregation`.
        constant: the units of a row under ``"constant"``: the longest completion in tokens.

    Returns:
        ``[B]`` float32: the row's tokens, 1, or ``constant``.

    Raises:
        ValueError: if ``constant`` is missing or superfluous.

    Example:
        >>> loss_units(torch.tensor([[True, True], [False, True]]), "token")
        tensor([2., 1.])
    """
    check_aligned(loss_mask)
    check_choice("aggregation", aggregation, get_args(Aggregation))
    if (aggregation == "constant") != (constant is not None) or (
        constant is not None and constant < 1
    ):
        raise ValueError(
            f"constant is {constant!r} with aggregation={aggregation!r}; give the longest"
            " completion in tokens with 'constant', and None with the others"
        )
    if aggregation == "token":
        return loss_mask.sum(dim=1).float()
    return torch.full_like(
        loss_mask[:, 0], 1.0 if constant is None else constant, dtype=torch.float
    )


def aggregate_loss(
    per_token_loss: Tensor,
    loss_mask: Tensor,
    denominator: float | Tensor,
    per_sequence: bool = False,
) -> Tensor:
    """One micro-batch's share of the loss of an optimizer step.

    ``Σ_b Σ_t loss[b, t] / denominator``, or with ``per_sequence`` ``Σ_b mean_t loss[b, t] /
    denominator``. The denominator is that of the whole step (see :func:`loss_units`), never of the
    micro-batch: a mean of means would weigh tokens by the micro-batch that they happen to be in.

    Args:
        per_token_loss: ``[B, T]``.
        loss_mask: ``[B, T]`` bool, True where the token counts.
        denominator: the units of the step; with 0 of them (no token anywhere) the loss is 0.
        per_sequence: average each row over its tokens first (``"sequence"`` aggregation).

    Returns:
        A scalar, connected to the graph also where no token counts.

    Example:
        >>> loss = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> loss_mask = torch.tensor([[True, True], [True, False]])
        >>> aggregate_loss(loss, loss_mask, denominator=3.0)
        tensor(2.)
        >>> aggregate_loss(loss, loss_mask, denominator=2.0, per_sequence=True)
        tensor(2.2500)
    """
    check_aligned(loss_mask, per_token_loss=per_token_loss)
    if per_sequence:
        total = masked_mean(per_token_loss, loss_mask, dim=1).sum()
    else:
        total = masked_sum(per_token_loss, loss_mask)
    if isinstance(denominator, Tensor):
        return total / torch.where(denominator == 0, 1, denominator)
    return total / (denominator or 1.0)
