"""``fit``, ``validate``, ``test`` and ``predict``: Lightning's command line, with our classes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlhf_lightning.cli.arguments import DEBUG, debugging, refuse
from rlhf_lightning.cli.callback_options import take_addressed, with_addressed
from rlhf_lightning.cli.confidential import print_traceback
from rlhf_lightning.cli.messages import root
from rlhf_lightning.cli.parser import PARSER_MODE, Parser, expand_rewards, public_classes
from rlhf_lightning.cli.quiet import quieten
from rlhf_lightning.cli.saved_config import SaveConfig, check_nothing_is_redacted
from rlhf_lightning.cli.start import StartSummary, check_outputs
from rlhf_lightning.cli.yaml_files import read_yaml
from rlhf_lightning.core.graceful_stop import default_folder, given_folder
from rlhf_lightning.core.watchdog import Watchdog
from rlhf_lightning.events import RolloutCallback
from rlhf_lightning.io.secrets import redact_text
from rlhf_lightning.rewards import RewardError

TRAINER_DEFAULTS: dict[str, Any] = {
    # A phase has few optimizer steps; Lightning's interval of 50 would miss most of them.
    "log_every_n_steps": 1,
    "default_root_dir": "outputs",
    "enable_model_summary": False,  # StartSummary says what there is to say
}
_SPECIAL_CHECKPOINTS = ("last", "best", "hpc", "registry")
_REFUSALS = (ValueError, OSError, MisconfigurationException, ModuleNotFoundError)


class ComputeStarted(RolloutCallback):
    """Remembers that checks are over and compute is being spent: later errors are crashes."""

    def __init__(self) -> None:
        self.started = False
        self._watchdogs: list[Watchdog] = []

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remember who will know which process was the first to fail."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._watchdogs = [callback for callback in callbacks if isinstance(callback, Watchdog)]

    @property
    def blames_another(self) -> bool:
        """Whether another process says what has ended the run."""
        return any(watchdog.blames_another for watchdog in self._watchdogs)

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule, phase: int) -> None:
        """Rollouts come before the first batch."""
        self.started = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first batch."""
        self.started = True

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The first batch, unless it is of the sanity check: training data are read after that."""
        self.started = self.started or not trainer.sanity_checking

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The first batch."""
        self.started = True

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The first batch."""
        self.started = True


class NeedsCheckpoint(Callback):
    """Refuses ``--ckpt_path last`` where there is none, which Lightning passes over.

    A ``fit`` may start without one; an evaluation would be one of the weights before training.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :class:`NeedsCheckpoint`."""
        if trainer.ckpt_path is None:
            raise ValueError(
                "ckpt_path is 'last', and no ModelCheckpoint of this configuration has left one."
                " Give the path of a checkpoint, or leave ckpt_path out"
            )

    on_test_start = on_predict_start = on_validation_start


class RLHFCLI(LightningCLI):
    """Lightning's command line: modules and data modules by name, and flags that always win.

    Args:
        arguments: the command and its options.
        callbacks: added to the trainer's.
        check_only: parse and check the options, and do nothing else.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        callbacks: Sequence[Callback] = (),
        check_only: bool = False,
    ) -> None:
        self.check_only = check_only
        public_classes()
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": list(callbacks)},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": PARSER_MODE, "prog": "rlhf-lightning"},
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=expand_rewards(arguments),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse. Unlike Lightning's, without a warning that ``sys.argv`` has arguments as well."""
        arguments, addressed = take_addressed(args)
        for path in _config_files(arguments):
            read_yaml(path)  # jsonargparse does not say which file it cannot read
        self.config = parser.parse_args(arguments)
        if addressed:
            listed = self.config[self.config.subcommand].trainer.callbacks
            self.config = parser.parse_args([*arguments, with_addressed(listed, addressed)])
        check_nothing_is_redacted(self.config)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that are no options.

        ``weights_only`` is none: checkpoints are never unpickled.
        """
        commands = LightningCLI.subcommands()
        return {name: skipped | {"weights_only"} for name, skipped in commands.items()}

    def _parse_ckpt_path(self) -> None:
        """Leave the options as they were given.

        Lightning's own method puts the checkpoint's hyperparameters over them, without a word.
        """
        path = self.config[self.config.subcommand].get("ckpt_path")
        special = path and path.partition(":")[0] in _SPECIAL_CHECKPOINTS
        local = path and not special and "://" not in path
        if local and not Path(path).exists():
            raise FileNotFoundError(f"ckpt_path: there is no checkpoint {path!r}")

    def before_fit(self) -> None:
        """Refuse places that cannot be written, before loggers meet them.

        Also let ``last`` find what a stopped run has left where no folder for checkpoints is given.
        Lightning looks beside the logs then, whose folder is another one in every run.
        """
        if getattr(rank_zero_only, "rank", 0) == 0:
            check_outputs(self.trainer)
        options = self.config_init["fit"]
        left = Path(default_folder(self.trainer), "last.ckpt")
        if options.get("ckpt_path") == "last" and not given_folder(self.trainer) and left.is_file():
            options["ckpt_path"] = str(left)

    def before_validate(self) -> None:
        """Evaluate the weights that were asked for, or none."""
        if self.config[self.config.subcommand].get("ckpt_path"):
            self.trainer.callbacks.append(NeedsCheckpoint())  # type: ignore[attr-defined]

    before_test = before_predict = before_validate

    def _set_seed(self) -> None:
        if not self.check_only:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Build the module, the data module and the trainer."""
        if not self.check_only:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.check_only:
            super()._run_subcommand(subcommand)


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    """The files of ``--config FILE`` and ``--config=FILE`` that exist."""
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = flag.partition("=")
        path = value if equals else following
        if option in ("-c", "--config") and os.path.isfile(path):  # it may be YAML text as well
            yield Path(path)


def run_trainer(arguments: Sequence[str], callbacks: Sequence[Callback] = ()) -> RLHFCLI:
    """Run a Trainer command.

    Args:
        arguments: the command and its options.
        callbacks: added to the trainer's.

    Raises:
        SystemExit: with status 2 and one message for a mistake in the options, or one that a
            constructor or a setup found before compute was spent.
    """
    quieten()
    compute = ComputeStarted()
    try:
        return RLHFCLI(arguments, callbacks=[compute, StartSummary(), *callbacks])
    except SIGTERMException as error:  # Lightning's has no exit status, which would mean success
        raise SystemExit(error.code or 128 + signal.SIGTERM) from error
    except RewardError as error:  # it names function and sample; the frames that matter are theirs
        if debugging():
            raise
        if compute.blames_another:
            raise SystemExit(1) from error
        if error.__cause__ is not None:
            print_traceback(error.__cause__)
        sys.stderr.write(redact_text(f"error: {error}\n(the traceback: {DEBUG}=1)\n"))
        raise SystemExit(1) from error
    except (*_REFUSALS, TypeError) as error:
        cause = root(error)
        if debugging() or compute.started or not _is_refusal(cause):
            raise
        refuse(cause, getattr(rank_zero_only, "rank", 0))


def _is_refusal(error: BaseException) -> bool:
    """Whether it was raised on purpose: of TypeErrors, only those that this package raised."""
    if not isinstance(error, TypeError):
        return isinstance(error, _REFUSALS)
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(__file__).parents[1] in Path(raised_in).parents


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point of the four commands."""
    run_trainer([command, *arguments])
    return 0
