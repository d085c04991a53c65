"""What every run of this package needs of Lightning's loop, outside hooks that users override."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.core.metrics import PhaseMetrics

if TYPE_CHECKING:
    from rlhf_lightning.core.module import BaseModule


class Bookkeeper(Callback):
    """Logs a phase's figures once, and makes a resumed run do what the checkpoint still owes.

    Lightning goes on with the next epoch when a checkpoint was written after the last step of one,
    and with the next step when it was written before a validation. What lies between (the figures
    of the phase, the validation) would be missing from the resumed run. ``BaseModule`` attaches
    this callback by itself.
    """

    def __init__(self) -> None:
        self._module: BaseModule | None = None
        self._trainer: Trainer | None = None
        self._restored: dict[str, Any] | None = None
        self._step_start: PhaseMetrics | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new ``fit`` counts from zero."""
        self._module, self._trainer = pl_module, trainer  # type: ignore[assignment]
        self._restored = self._step_start = None
        if stage == "fit":
            self._module.phase_metrics.reset()  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """Every rank's figures of the running phase, as they were before an unfinished step."""
        if self._restored is not None:  # not in use yet
            return {"phase_metrics": self._restored}
        assert self._module is not None
        assert self._trainer is not None
        figures = self._module.phase_metrics
        if self._step_start is not None and unfinished_micro_batches(self._trainer):
            figures = self._step_start
        return {"phase_metrics": figures.gathered_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the figures until training starts (validation has no use for them)."""
        self._restored = state_dict["phase_metrics"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the frozen models to the device and the precision of the trained one."""
        assert self._module is not None
        self._module.frozen.place(pl_module.device, trainer.precision_plugin.convert_module)
        if not trainer.ckpt_path:
            _warn_of_another_runs_last(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what the checkpoint owes, and start the next epoch where Lightning would not."""
        assert self._module is not None
        if self._restored is not None:
            self._module.phase_metrics.load_gathered_state(self._restored)
            self._restored = None
        fit_loop = trainer.fit_loop
        done = fit_loop.epoch_loop.batch_progress.current.ready
        ended = 0 < done >= trainer.num_training_batches
        if fit_loop.epoch_loop.restarted_on_train_batch_end:
            if _validation_is_due(trainer, done, ended):
                _validate(trainer, ended)
            if ended:
                self._log_directly(trainer)
        elif ended and not fit_loop.restarted_mid_epoch:
            # With max_steps, Lightning takes a finished epoch for one to be continued: it would
            # train a single batch of the next phase and drop the rest.
            if fit_loop.restarted_on_epoch_end:
                fit_loop.epoch_progress.increment_completed()
                fit_loop.reset_restart_stage()
            fit_loop.epoch_loop.restarting = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the figures at the start of a step: a crash in the middle repeats all of it."""
        assert self._module is not None
        accumulate = trainer.accumulate_grad_batches
        if accumulate > 1 and batch_idx % accumulate == 0:
            self._step_start = self._module.phase_metrics.snapshot()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the phase's figures, once."""
        assert self._module is not None
        self._module.log_means(self._module.phase_metrics)
        self._module.phase_metrics.reset()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """After a crash in the middle of an accumulated step, go back to its start.

        Gradients are in no checkpoint, so a run resumed in the middle would step on half of them.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        excess = unfinished_micro_batches(trainer)
        if excess:
            counts = progress["current"]
            for name in ("ready", "started", "processed", "completed"):
                progress["total"][name] -= counts[name] - (counts["processed"] - excess)
            at = counts["processed"] - excess
            counts.update(ready=at, started=at, processed=at, completed=at)

    def _log_directly(self, trainer: Trainer) -> None:
        assert self._module is not None
        figures = self._module.phase_metrics.compute()
        # Lightning logs in single precision, and counts the finished epoch already
        rounded = torch.tensor([*figures.values()], dtype=torch.float32).tolist()
        row = dict(zip(figures, rounded, strict=True), epoch=trainer.current_epoch - 1)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step - 1)
        self._module.phase_metrics.reset()


def unfinished_micro_batches(trainer: Trainer) -> int:
    """Micro-batches of the running optimizer step whose gradients are computed but not used."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.processed % trainer.accumulate_grad_batches)


def _warn_of_another_runs_last(trainer: Trainer) -> None:
    """Say so if ``ckpt_path="last"`` would not continue the run that is starting."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.dirpath:
            last = Path(callback.dirpath, callback.CHECKPOINT_NAME_LAST + callback.FILE_EXTENSION)
            if last.exists():
                rank_zero_warn(
                    f"{last} is of an earlier run. Until this one saves for the first time,"
                    " ckpt_path='last' would continue that one. Move it away, or change dirpath"
                )


def _validation_is_due(trainer: Trainer, done: int, ended: bool) -> bool:
    """Whether the uninterrupted run validated right after the step of the checkpoint."""
    if not trainer.enable_validation or trainer.limit_val_batches == 0:
        return False
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
    epoch = trainer.current_epoch - int(ended)  # a finished epoch is counted already
    if every is not None and (epoch + 1) % every:
        return False
    if interval is None or interval == float("inf"):
        return ended
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1 if every is None else done
    return batches % interval == 0


def _validate(trainer: Trainer, ended: bool) -> None:
    """Run validation as the training loop does between two steps."""
    loop: Any = trainer.fit_loop.epoch_loop
    epochs = trainer.fit_loop.epoch_progress.current
    epochs.completed -= int(ended)  # the epoch that it belongs to, not the next one
    connector: Any = trainer._logger_connector
    first = connector._first_loop_iter
    loop.val_loop.restarting = False
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    epochs.completed += int(ended)
    connector._first_loop_iter = first
