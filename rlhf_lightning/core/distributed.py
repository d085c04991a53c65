"""The few collectives that are not Lightning's: they work with and without a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value``, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Element-wise sum over ranks, returned on the CPU.

    Args:
        values: a tensor of the same shape on every rank.
        device: where the process group communicates (the trainer's device).
    """
    if world_size() == 1:
        return values.cpu()
    values = values.to(device)
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values.cpu()
