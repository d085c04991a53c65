"""Means over a phase that survive a checkpoint and are right under several processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.core.distributed import gather_objects, rank

Number = float | int | Tensor


class PhaseMetrics:
    """Weighted means, minima and maxima, accumulated on the device and read once a phase.

    ``self.log`` costs about 0.3 ms a key and forgets half an epoch when a run resumes in the middle
    of it; this costs a tensor addition and is part of the checkpoint.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}
        self._rows: dict[tuple[str, ...], Tensor] = {}  # [2, K]: totals and counts of K means
        self._counts: dict[str, Any] = {}
        self._extremes: dict[str, tuple[str, Any]] = {}
        self._marked: PhaseMetrics | None = None

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Add ``count`` observations that sum up to ``total`` to the mean called ``name``."""
        total, count = _detached(total), _detached(count)
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total, old_count + count)

    def add_all(self, names: Sequence[str], totals: Tensor, counts: Tensor) -> None:
        """The same for K means that are always added to together, at the cost of one.

        Args:
            names: of the means.
            totals: ``[K]``.
            counts: ``[K]``, or a scalar for all of them.
        """
        key, totals = tuple(names), _detached(totals)
        new = torch.stack([totals, _detached(counts).expand_as(totals)])
        old = self._rows.get(key)
        if old is None:  # what a checkpoint or add() had of them, so that sums go on in order
            held = [self._sums.pop(name, (0.0, 0.0)) for name in key]
            old = new.new_tensor([[float(pair[i]) for pair in held] for i in (0, 1)])
        self._rows[key] = old + new

    def count(self, name: str, number: Number) -> None:
        """Add to a plain count (of timeouts, say), summed over the phase and the ranks."""
        self._counts[name] = self._counts.get(name, 0.0) + _detached(number)

    def merge(self, other: PhaseMetrics, prefix: str = "") -> None:
        """Take in everything that ``other`` has seen, under names with a prefix."""
        for name, (total, count) in other._means().items():
            self.add(prefix + name, total, count)
        for name, number in other._counts.items():
            self.count(prefix + name, number)
        for name, (kind, value) in other._extremes.items():
            self.extreme(prefix + name, value, kind)

    def extreme(self, name: str, value: Number, kind: str) -> None:
        """Keep the smallest (``kind="min"``) or largest (``"max"``) value under ``name``.

        That of nothing is ``inf`` or ``-inf``, and left out of the figures.
        """
        new = torch.as_tensor(_detached(value), dtype=torch.float64)
        old = self._extremes.get(name, (kind, new))[1]
        # a choice on the device: a comparison in Python would wait for it
        keep = torch.minimum if kind == "min" else torch.maximum
        old = torch.as_tensor(old, dtype=torch.float64, device=new.device)
        self._extremes[name] = (kind, keep(old, new))

    def compute(self) -> dict[str, float]:
        """The figures over all ranks. A mean without observations is left out."""
        return _figures(gather_objects(self.state_dict()))

    def local(self) -> dict[str, float]:
        """The figures of this rank alone."""
        return _figures([self.state_dict()])

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._rows.clear()
        self._counts.clear()
        self._extremes.clear()
        self._marked = None

    def state_dict(self) -> dict[str, Any]:
        """This rank's figures, as plain numbers."""
        sums = {name: [float(value) for value in pair] for name, pair in self._means().items()}
        counts = {name: float(number) for name, number in self._counts.items()}
        return {
            "sums": sums,
            "counts": counts,
            "extremes": {k: [kind, float(v)] for k, (kind, v) in self._extremes.items()},
        }

    def mark(self) -> None:
        """Remember the figures as they are now: an optimizer step begins, and may come to nothing.

        No tensor is copied, for none is ever changed in place.
        """
        self._marked = PhaseMetrics()
        self._marked._take(self)

    def rewind(self) -> None:
        """Forget what was added since the last mark (everything, if there is none)."""
        self._take(self._marked or PhaseMetrics())

    def _take(self, other: PhaseMetrics) -> None:
        self._sums, self._rows = dict(other._sums), dict(other._rows)
        self._counts, self._extremes = dict(other._counts), dict(other._extremes)

    def _means(self) -> dict[str, tuple[Any, Any]]:
        """Total and count of every mean by itself."""
        means = dict(self._sums)
        for names, (totals, counts) in self._rows.items():
            for name, *new in zip(names, totals.unbind(), counts.unbind(), strict=True):
                old = means.get(name, (0.0, 0.0))
                means[name] = (old[0] + new[0], old[1] + new[1])
        return means

    def discard(self, prefix: str) -> None:
        """Forget the figures whose names begin with ``prefix``."""
        self._sums, self._rows = self._means(), {}
        for figures in (self._sums, self._counts, self._extremes):
            for name in [name for name in figures if name.startswith(prefix)]:
                del figures[name]

    def gathered_state(self, at_mark: bool = False) -> dict[str, Any]:
        """Every rank's figures, for a checkpoint that rank 0 writes.

        Args:
            at_mark: as they were at the last mark, for a step that a resumed run does again.
        """
        figures = (self._marked or self) if at_mark else self
        return {"ranks": gather_objects(figures.state_dict())}

    def load_gathered_state(self, state: dict[str, Any]) -> None:
        """Take this rank's figures out of a checkpoint (none, if it had fewer ranks)."""
        self.reset()
        if rank() < len(state["ranks"]):
            mine = state["ranks"][rank()]
            self._sums = {name: (total, count) for name, (total, count) in mine["sums"].items()}
            self._counts = dict(mine["counts"])
            self._extremes = {
                name: (kind, value) for name, (kind, value) in mine["extremes"].items()
            }


def _figures(states: list[dict[str, Any]]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for state in states:
        for name, (total, count) in state["sums"].items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += count
        for name, number in state["counts"].items():
            figures[name] = figures.get(name, 0.0) + number
        for name, (kind, value) in state["extremes"].items():
            pick, nothing = (min, math.inf) if kind == "min" else (max, -math.inf)
            if value != nothing:
                figures[name] = pick(value, figures.get(name, value))
    return {name: total / count for name, (total, count) in sums.items() if count} | figures


def _detached(value: Number) -> Any:
    """As float64, like Python's numbers: a figure that is saved and restored stays the same."""
    if not isinstance(value, Tensor):
        return float(value)
    value = value.detach() if value.requires_grad else value
    return (value.cpu() if value.device.type == "mps" else value).to(torch.float64)
