"""Random state that Lightning leaves out of its checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.core.bookkeeping import in_the_middle_of_a_step
from rlhf_lightning.core.distributed import gather_objects, rank


def capture_random_state() -> dict[str, Any]:
    """The state of every generator, as tensors and primitives (``weights_only`` can load them)."""
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator into a captured state."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class RNGState(Callback):
    """Saves every rank's random state with the checkpoint and restores it when training resumes.

    ``BaseModule`` attaches it by itself.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._step_start: dict[str, Any] | None = None
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know the trainer, and forget an earlier run of it."""
        self._trainer, self._step_start, self._restored = trainer, None, None

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks (only rank 0's dictionary reaches the file).

        In the middle of an optimizer step, which a resumed run does again, those at its start.
        """
        if self._restored is not None:  # not in use yet
            return {"ranks": self._restored}
        state = None
        if self._trainer is not None and in_the_middle_of_a_step(self._trainer):
            state = self._step_start
        return {"ranks": gather_objects(state or capture_random_state())}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the states at the start of an optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._step_start = capture_random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the states; they are set when training starts, after the sanity check."""
        self._restored = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue this rank's streams where the checkpoint left them."""
        if self._restored is not None and rank() < len(self._restored):
            restore_random_state(self._restored[rank()])
        self._restored = None
