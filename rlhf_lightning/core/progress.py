"""Rollouts on the Trainer's progress bar."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from rlhf_lightning.events import RolloutCallback
from rlhf_lightning.types import RolloutBatch


class RolloutProgress(RolloutCallback):
    """Lends the training bar to the rollouts while they are collected.

    Works with Lightning's two progress bars; with another one, or with none, it does nothing.
    ``BaseModule`` attaches it by itself.
    """

    def __init__(self) -> None:
        self._phase = 0
        self._before: tuple[Any, Any, Any] | None = None
        self._next_refresh = 0.0

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule, phase: int) -> None:
        """Remember what the bar shows."""
        self._phase, self._before = phase, None
        bar = trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
            shown = bar.train_progress_bar
            self._before = (shown.desc, shown.total, shown.n)
        elif isinstance(bar, RichProgressBar) and bar.train_progress_bar_id is not None:
            task = bar.train_progress_bar
            self._before = (task.description, task.total, task.completed)

    def on_rollout_progress(
        self, trainer: Trainer, pl_module: LightningModule, done: int, total: int
    ) -> None:
        """Move it; drawing it takes longer than a token, so that is done ten times a second."""
        refresh = done == total or time.monotonic() >= self._next_refresh
        self._show(trainer, f"Phase {self._phase} rollouts", total, done, refresh)
        if refresh:
            self._next_refresh = time.monotonic() + 0.1

    def on_rollout_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: RolloutBatch,
        samples: list[dict[str, Any]],
        metrics: dict[str, float],
    ) -> None:
        """Give the bar back."""
        if self._before is not None:
            self._show(trainer, *self._before)
        self._before = None

    def _show(
        self, trainer: Trainer, description: str, total: Any, done: Any, refresh: bool = True
    ) -> None:
        bar = trainer.progress_bar_callback
        if self._before is None:
            return
        if isinstance(bar, TQDMProgressBar):
            shown = bar.train_progress_bar
            shown.desc, shown.total, shown.n = description, total, done
            if refresh:
                shown.refresh()
        elif isinstance(bar, RichProgressBar):
            task = bar.train_progress_bar
            task.description, task.total, task.completed = description, total, done
            if refresh:
                bar.refresh()
