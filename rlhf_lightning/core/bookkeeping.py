"""What every run of this package needs of Lightning's loop, outside hooks that users override."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.core.continuing import check_optimizers
from rlhf_lightning.core.reading import saved_step
from rlhf_lightning.io.disk import free_bytes, is_full_disk

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
        self._saved_optimizers: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new ``fit`` counts from zero."""
        self._module, self._trainer = pl_module, trainer  # type: ignore[assignment]
        self._restored, self._saved_optimizers = None, []
        if stage == "fit":
            self._module.phase_metrics.reset()  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """Every rank's figures of the running phase, as they were before an unfinished step."""
        if self._restored is not None:  # not in use yet
            return {"phase_metrics": self._restored}
        assert self._module is not None
        assert self._trainer is not None
        unfinished = in_the_middle_of_a_step(self._trainer)
        return {"phase_metrics": self._module.phase_metrics.gathered_state(at_mark=unfinished)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the figures until training starts (validation has no use for them)."""
        self._restored = state_dict["phase_metrics"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the optimizers until this run has its own to compare them with."""
        self._saved_optimizers = checkpoint.get("optimizer_states", [])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the optimizers; bring the frozen models to where the trained one is."""
        assert self._module is not None
        self._module.frozen.place(pl_module.device, trainer.precision_plugin.convert_module)
        check_optimizers(self._saved_optimizers, trainer.optimizers)
        self._saved_optimizers = []
        if not trainer.ckpt_path:
            _warn_of_another_runs_last(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what the checkpoint owes, and start the next epoch where Lightning would not."""
        assert self._module is not None
        if self._restored is not None:
            self._module.phase_metrics.load_gathered_state(self._restored)
            self._restored = None
        if trainer.ckpt_path and trainer.is_global_zero:
            _warn_of_a_last_that_is_behind(trainer, Path(str(trainer.ckpt_path)))
        fit_loop = trainer.fit_loop
        done = fit_loop.epoch_loop.batch_progress.current.ready
        ended = 0 < done >= trainer.num_training_batches
        if fit_loop.epoch_loop.restarted_on_train_batch_end:
            if _validation_is_due(trainer, done, ended):
                _validate(trainer, ended)
            if ended:
                self._log_directly(trainer, trainer.current_epoch - 1)  # it is counted already
                # Lightning counts the epoch as done, and takes the next one for its remainder: that
                # would start without its hook, and be counted wrong in this run's own checkpoints.
                fit_loop.reset_restart_stage()
                fit_loop.epoch_loop._batches_that_stepped += 1
                fit_loop.epoch_loop.restarting = False
        elif ended and not fit_loop.restarted_mid_epoch:
            # With max_steps, Lightning takes a finished epoch for one to be continued: it would
            # train a single batch of the next phase and drop the rest.
            if fit_loop.restarted_on_epoch_end:
                fit_loop.epoch_progress.increment_completed()
                fit_loop.reset_restart_stage()
            fit_loop.epoch_loop.restarting = False
        elif done == 0:
            # Stopped before the first batch. Lightning would think that a validation was due just
            # then, and count a step for skipping it.
            fit_loop.epoch_loop.restarting = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the figures at the start of a step: a crash in the middle repeats all of it."""
        assert self._module is not None
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._module.phase_metrics.mark()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the phase's figures, once."""
        assert self._module is not None
        self._module.log_means(self._module.phase_metrics)
        self._module.phase_metrics.reset()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures also where a resumed run finds that there is nothing left to train."""
        if self._restored is not None:
            assert self._module is not None
            self._module.phase_metrics.load_gathered_state(self._restored)
            self._restored = None
            if self._module.phase_metrics.compute():
                self._log_directly(trainer, trainer.current_epoch)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say where a disk is full: Lightning's TensorBoard logger blames the value it logs."""
        if is_full_disk(exception):
            folders = {str(folder): free_bytes(Path(folder)) for folder in _output_folders(trainer)}
            room = ", ".join(f"{folder}: {free:,} bytes" for folder, free in folders.items())
            rank_zero_warn(f"a disk is full. Free in the folders of this run: {room}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """After a crash in the middle of an optimizer step, go back to its start.

        Gradients are in no checkpoint, so a run resumed in the middle would step on half of them;
        and Lightning counts a micro-batch that was begun as one that stepped.
        """
        if in_the_middle_of_a_step(trainer):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            counts = progress["current"]
            at = counts["processed"] - unfinished_micro_batches(trainer)
            for name in ("ready", "started", "processed", "completed"):
                progress["total"][name] -= counts[name] - at
                counts[name] = at

    def _log_directly(self, trainer: Trainer, epoch: int) -> None:
        assert self._module is not None
        figures = self._module.phase_metrics.compute()
        # in single precision, as Lightning logs
        rounded = torch.tensor([*figures.values()], dtype=torch.float32).tolist()
        row = dict(zip(figures, rounded, strict=True), epoch=epoch)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step - 1)
        self._module.phase_metrics.reset()


def _output_folders(trainer: Trainer) -> list[str]:
    found: list[Any] = [trainer.default_root_dir]
    found += [logger.log_dir or logger.save_dir for logger in trainer.loggers]
    found += [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [str(folder) for folder in dict.fromkeys(found) if folder]


def unfinished_micro_batches(trainer: Trainer) -> int:
    """Micro-batches of the running optimizer step whose gradients are computed but not used."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.processed % trainer.accumulate_grad_batches)


def in_the_middle_of_a_step(trainer: Trainer) -> bool:
    """Whether a checkpoint written now is resumed at the start of the running optimizer step."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.ready != progress.processed or unfinished_micro_batches(trainer))


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


def _warn_of_a_last_that_is_behind(trainer: Trainer, path: Path) -> None:
    """Say so if a run goes on from a ``last.ckpt`` that is not the latest in its folder.

    A run that is stopped leaves one, which the continued run does not replace without save_last.
    """
    if path.stem != ModelCheckpoint.CHECKPOINT_NAME_LAST or not path.is_file():
        return
    ages = {p: p.stat().st_mtime for p in path.parent.glob(f"*{path.suffix}") if p.is_file()}
    latest = max(ages, key=lambda p: ages[p])
    step = saved_step(latest) if ages[latest] > ages[path] else None
    if step is not None and step > trainer.global_step:
        rank_zero_warn(
            f"{path} is of step {trainer.global_step}, and beside it there is {latest} of step"
            f" {step}, which is newer. To go on from that one, give it as ckpt_path; with"
            " ModelCheckpoint(save_last=True), last.ckpt is always the newest"
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
    counted = loop.val_loop.batch_progress.state_dict()
    trainer.validating = True
    loop.val_loop.run()
    if not ended:  # in the middle of an epoch, Lightning takes it for run and counts it itself
        loop.val_loop.batch_progress.load_state_dict(counted)
    trainer.training = True
    epochs.completed += int(ended)
    connector._first_loop_iter = first
