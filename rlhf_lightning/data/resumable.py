"""Data modules whose place in the epoch is part of the checkpoint."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule

from rlhf_lightning.core.distributed import gather_objects, rank, world_size
from rlhf_lightning.types import Batch


class _EpochLoader:
    """What Lightning iterates over: sized, lazy and stateful, which is what makes resuming exact.

    Sized, or Lightning would fetch one batch ahead and the last one would be off-policy. Lazy,
    because Lightning calls ``iter()`` more often than it starts epochs. Stateful, so that Lightning
    trusts it on a resume; the state itself lives in the data module, where Lightning keeps it.
    """

    def __init__(self, data: ResumableDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.micro_batches_per_epoch()

    def __iter__(self) -> Iterator[Batch]:
        return self.data.iterate_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: the data module's own state says it all."""


class ResumableDataModule(LightningDataModule):
    """Serves an epoch of micro-batches one by one and can go on from any of them.

    A subclass says how many there are, what happens when an epoch starts, and what each one is; the
    epoch's own data (rollouts, say) go into ``epoch_state``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0
        """How many epochs have been started: the number of the running one is ``epoch - 1``."""
        self._cursor = 0
        self._live = False
        self._resume_here = False
        self._remake = False

    def without_validation(self) -> None:
        """Make ``fit`` skip validation, as Lightning does where there is no such hook."""
        self.val_dataloader = None  # type: ignore[assignment]

    @abstractmethod
    def micro_batches_per_epoch(self) -> int:
        """How many micro-batches this rank trains on in an epoch."""

    @abstractmethod
    def start_epoch(self, epoch: int) -> None:
        """Make epoch ``epoch`` ready (collect rollouts, permute rows)."""

    @abstractmethod
    def micro_batch(self, index: int) -> Batch:
        """Micro-batch ``index`` of the running epoch."""

    def epoch_state(self) -> dict[str, Any]:
        """What the running epoch needs beside its number, as tensors and plain values."""
        return {}

    def load_epoch_state(self, state: dict[str, Any]) -> None:
        """Restore what ``epoch_state`` returned."""

    def train_dataloader(self) -> _EpochLoader:
        """The loader of the running epoch (always the same object's view of this data module)."""
        return _EpochLoader(self)

    def reset_position(self) -> None:
        """Start over, as a new ``fit`` does; a resume sets the position afterwards."""
        self.epoch, self._cursor = 0, 0
        self._live = self._resume_here = self._remake = False

    def iterate_epoch(self) -> Iterator[Batch]:
        """The micro-batches of an epoch: the rest of a restored one, else of a new one."""
        total = self.micro_batches_per_epoch()
        if self._resume_here:
            self._resume_here = False
        else:
            self._live = False
        if not self._live or self._cursor >= total:
            self.start_epoch(self.epoch)
            self.epoch += 1
            self._cursor, self._live = 0, True
        elif self._remake:
            self.start_epoch(self.epoch - 1)
        self._remake = False
        while self._cursor < total:
            batch = self.micro_batch(self._cursor)
            # before the yield: Lightning does not come back after the last one
            self._cursor += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where every rank stands. Runs on all ranks; rank 0's dictionary reaches the file."""
        cursor = self._cursor
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            # an exception between fetching a micro-batch and training on it: it is still to be done
            cursor -= int(progress.ready != progress.processed)
        mine = {"cursor": cursor, "state": self.epoch_state() if self._live else None}
        return {"epoch": self.epoch, "ranks": gather_objects(mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there. With another number of ranks the running epoch's data are made anew."""
        self.epoch = state_dict["epoch"]
        ranks = state_dict["ranks"]
        mine = ranks[min(rank(), len(ranks) - 1)]
        self._cursor, self._live = mine["cursor"], False
        if mine["state"] is None:
            return
        if len(ranks) == world_size():
            self.load_epoch_state(mine["state"])
        else:
            warnings.warn(
                f"the checkpoint was written by {len(ranks)} processes and is resumed by"
                f" {world_size()}: the data of its unfinished epoch are made anew, so this resume"
                " is correct but not bit for bit",
                stacklevel=2,
            )
            self._remake = True
        self._live = self._resume_here = True
