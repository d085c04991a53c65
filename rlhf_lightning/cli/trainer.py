"""``fit``, ``validate``, ``test`` and ``predict``: Lightning's command line, with our classes."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from rlhf_lightning.cli.messages import root
from rlhf_lightning.cli.parser import (
    DEBUG,
    PARSER_MODE,
    Parser,
    debugging,
    expand_rewards,
    public_classes,
)
from rlhf_lightning.cli.quiet import quieten
from rlhf_lightning.cli.yaml_files import read_yaml
from rlhf_lightning.events import RolloutCallback
from rlhf_lightning.rewards import RewardError

TRAINER_DEFAULTS: dict[str, Any] = {
    # A phase has few optimizer steps; Lightning's interval of 50 would miss most of them.
    "log_every_n_steps": 1,
    "default_root_dir": "outputs",
}
_SPECIAL_CHECKPOINTS = ("last", "best", "hpc", "registry")
_REFUSALS = (ValueError, OSError, MisconfigurationException, ModuleNotFoundError)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` beside the logs, replacing the one of an earlier run.

    Where a run goes on from a checkpoint, it first says which options are not those of that file.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration, unless it would land in the working directory."""
        if stage != "fit":  # or it would replace the record of how the model was trained
            return
        if not trainer.loggers and Path(trainer.default_root_dir).resolve() == Path.cwd():
            return
        earlier = Path(trainer.log_dir or "") / self.config_filename
        if self.config.get("ckpt_path") and not self.already_saved and earlier.is_file():
            self._report_changes(earlier)
        super().setup(trainer, pl_module, stage)

    def _report_changes(self, earlier: Path) -> None:
        before = _flat(read_yaml(earlier))
        now = _flat(yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml")))
        changes = [
            f"  {key}: {before.get(key, 'unset')} -> {now.get(key, 'unset')}"
            for key in sorted({*before, *now} - {"ckpt_path"})
            if before.get(key) != now.get(key)
        ]
        if changes:
            listed = "\n".join(changes)
            rank_zero_info(f"Going on from a checkpoint with other options ({earlier}):\n{listed}")


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    items = enumerate(config) if isinstance(config, list) else config.items()
    flat: dict[str, Any] = {}
    for key, value in items:
        if isinstance(value, (dict, list)):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class ComputeStarted(RolloutCallback):
    """Remembers that checks are over and compute is being spent: later errors are crashes."""

    def __init__(self) -> None:
        self.started = False

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
            save_config_kwargs={"overwrite": True},
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
        self.config = parser.parse_args(args)

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


def run_trainer(arguments: Sequence[str]) -> RLHFCLI:
    """Run a Trainer command.

    Args:
        arguments: the command and its options.

    Raises:
        SystemExit: with status 2 and one message for a mistake in the options, or one that a
            constructor or a setup found before compute was spent.
    """
    quieten()
    compute = ComputeStarted()
    try:
        return RLHFCLI(arguments, callbacks=[compute])
    except SIGTERMException as error:  # Lightning's has no exit status, which would mean success
        raise SystemExit(128 + signal.SIGTERM) from error
    except RewardError as error:  # it names function and sample; the frames that matter are theirs
        if debugging():
            raise
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        sys.stderr.write(f"error: {error}\n(the traceback: {DEBUG}=1)\n")
        raise SystemExit(1) from error
    except (*_REFUSALS, TypeError) as error:
        cause = root(error)
        if debugging() or compute.started or not _is_refusal(cause):
            raise
        refuse(cause)


def refuse(error: BaseException) -> NoReturn:
    """Say what is wrong and exit with status 2."""
    rank = getattr(rank_zero_only, "rank", 0)
    who = f"error (process {rank})" if rank else "error"
    sys.stderr.write(f"{who}: {error}\n(the traceback: {DEBUG}=1)\n")
    raise SystemExit(2) from error


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
