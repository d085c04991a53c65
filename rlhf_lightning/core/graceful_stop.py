"""SIGTERM and Ctrl-C: stop soon, and leave a checkpoint that the same run goes on from exactly."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from copy import deepcopy
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lightning.core.distributed import rank, sum_over_ranks, world_size
from rlhf_lightning.core.interrupt import PeerLost, Stopped, interrupts
from rlhf_lightning.core.rng import capture_random_state, restore_random_state
from rlhf_lightning.core.watchdog import Watchdog
from rlhf_lightning.events import RolloutCallback
from rlhf_lightning.types import RolloutBatch

_SAME_REQUEST = 1.0  # seconds: launchers forward a signal that the whole group got anyway


class GracefulStop(RolloutCallback):
    """Turns SIGTERM and Ctrl-C into a checkpoint and a distinct exit status.

    A rollout is abandoned at once, and the checkpoint is the one from before its phase. Elsewhere
    the running micro-batch is finished first. All processes stop at the same point, whichever got
    the signal. The checkpoint is ``last.ckpt`` in the folder of the first ``ModelCheckpoint`` that
    has one of its own, else in ``checkpoints/`` under the Trainer's ``default_root_dir``. A second
    signal ends the process at once. ``BaseModule`` attaches it by itself.
    """

    def __init__(self) -> None:
        self._users_handler: Any = None
        self._folder = ""
        self._woken = False
        self._signalled: float | None = None
        self._progressed = False
        self._random_state: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what Lightning is about to replace or to fill in."""
        interrupts.reset()
        self._users_handler = signal.getsignal(signal.SIGTERM)
        self._signalled, self._progressed = None, False
        self._random_state = self._before_validation = None
        self._folder = given_folder(trainer) or default_folder(trainer)

    # Signals

    def _begin(self, trainer: Trainer) -> None:
        """Take SIGTERM and Ctrl-C over; Lightning gives them back when it ends."""
        if threading.current_thread() is not threading.main_thread() or interrupts.wake is not None:
            return
        if trainer.received_sigterm:  # while data were made ready
            interrupts.tell(Stopped())
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_signal)
        interrupts.wake = self._wake

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._woken:
            self._woken = False
        elif self._signalled is None:
            # Lightning's handler is left out: it broadcasts in the middle of whatever is going on.
            self._signalled = time.monotonic()
            interrupts.tell(Stopped(signum))
            _say(f"{_name(signum)}: stopping; a second one ends this process at once")
            if signum == signal.SIGTERM and callable(self._users_handler):
                self._users_handler(signum, frame)
        elif time.monotonic() - self._signalled > _SAME_REQUEST:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        interrupts.strike()

    def _wake(self) -> None:
        """Run the handler in the main thread, so that it looks at what another thread has said."""
        if signal.getsignal(signal.SIGTERM) != self._on_signal:  # given back already
            return
        self._woken = True
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin. From here on there is more to save than the checkpoint that was resumed from."""
        self._begin(trainer)
        self._progressed = True

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin(trainer)

    # Points at which the run may stop

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if any process was told to. This callback is the last, so the step is whole.

        Raises:
            Stopped: in all processes alike.
        """
        if isinstance(interrupts.reason, PeerLost):
            raise interrupts.reason
        asked = interrupts.reason is not None
        if world_size() > 1:
            asked = bool(sum_over_ranks(torch.tensor(float(asked)), pl_module.device))
        if asked:
            # the row of this step, which a resumed run takes for logged
            connector: Any = trainer._logger_connector
            connector.on_batch_end()
            connector.update_train_step_metrics()
            interrupts.tell(Stopped())
            interrupts.check()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop here; several processes do so at the end, where they meet."""
        if world_size() == 1:
            interrupts.check()

    # What is undone when a rollout or a validation is abandoned

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule, phase: int) -> None:
        """Remember the random state: reward functions may draw from it."""
        self._random_state = capture_random_state()

    def on_rollout_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: RolloutBatch,
        samples: list[dict[str, Any]],
        metrics: dict[str, float],
    ) -> None:
        """The rollouts count."""
        self._random_state = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, and remember where the validation started: a stopped one is done once more."""
        self._begin(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._random_state = capture_random_state()
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            self._before_validation = deepcopy(progress.state_dict())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation counts."""
        self._random_state = self._before_validation = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Where a validation was abandoned, save that it is still to be done."""
        if isinstance(interrupts.reason, Stopped) and self._before_validation is not None:
            loops = checkpoint["loops"]["fit_loop"]
            loops["epoch_loop.val_loop.batch_progress"] = self._before_validation
            for counts in ("current", "total"):  # as if saved right after the step
                loops["epoch_loop.batch_progress"][counts]["completed"] -= 1

    # The checkpoint

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save, if this is a stop."""
        if not isinstance(exception, Stopped):
            return
        if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._report("stopped")
        elif not self._progressed:
            again = f"; go on from {trainer.ckpt_path}" if trainer.ckpt_path else ""
            self._report(f"stopped before anything was done{again}")
        else:
            self._save(trainer)
        for watchdog in (c for c in trainer.callbacks if isinstance(c, Watchdog)):  # type: ignore[attr-defined]
            watchdog.part(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self._random_state is not None:
            restore_random_state(self._random_state)
        path = os.path.join(self._folder, "last.ckpt")
        for callback in trainer.checkpoint_callbacks:
            if not (isinstance(callback, ModelCheckpoint) and callback.save_last):
                continue
            if str(callback.dirpath) == self._folder:
                path = callback.last_model_path or path
                callback.last_model_path = path  # which it may replace when the run goes on
        trainer.save_checkpoint(path, weights_only=False)
        self._report(f"stopped at step {trainer.global_step}; go on with ckpt_path={path}")

    def _report(self, message: str) -> None:
        if rank() == 0:
            sys.stderr.write(f"{message}\n")


def given_folder(trainer: Trainer) -> str | None:
    """The folder that a ``ModelCheckpoint`` was told to write to, before ``fit`` fills it in."""
    savers = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    return next((str(saver.dirpath) for saver in savers if saver.dirpath is not None), None)


def default_folder(trainer: Trainer) -> str:
    """Where a stopped run leaves its checkpoint otherwise; the next run finds it there."""
    return os.path.join(trainer.default_root_dir, "checkpoints")


def _name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def _say(message: str) -> None:
    """Print in a signal handler, where ``print`` might find its own lock taken."""
    who = f"process {rank()}: " if world_size() > 1 else ""
    os.write(2, f"\n{who}{message}\n".encode())
