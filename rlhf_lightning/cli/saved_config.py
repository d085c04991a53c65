"""The configuration of a run, beside its logs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from rlhf_lightning.cli.yaml_files import dump_yaml, parse_yaml, read_yaml
from rlhf_lightning.io.disk import cannot_write
from rlhf_lightning.io.secrets import redact, redacted_options


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` beside the logs, replacing the one of an earlier run.

    It holds every option, defaults too, but for secrets. Where a run goes on from a checkpoint, it
    first says which options are not those of that file. A run whose model, data or checkpoint is
    refused writes nothing.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the place, unless that is the working directory, and compare with what is there."""
        self._path = None
        if stage != "fit":  # or it would replace the record of how the model was trained
            return
        if not trainer.loggers and Path(trainer.default_root_dir).resolve() == Path.cwd():
            return
        self._path = Path(trainer.log_dir or "", self.config_filename)  # asks all processes
        config = self._plain()
        if trainer.is_global_zero and config.get("ckpt_path") and self._path.is_file():
            _report_changes(self._path, config)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the configuration."""
        if self._path is not None:
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: naming the file, if it cannot be written.
        """
        assert self._path is not None
        path, config = self._path, self._plain()
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(dump_yaml(config), encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise cannot_write(path, error, intact="An earlier one is intact.") from error

    def _plain(self) -> dict[str, Any]:
        """All options as plain values that may be saved."""
        text = self.parser.dump(self.config, skip_none=False, format="yaml")
        return redact(parse_yaml(text))


def _report_changes(earlier: Path, config: dict[str, Any]) -> None:
    before, now = _flat(read_yaml(earlier)), _flat(config)
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


def check_nothing_is_redacted(config: Namespace) -> None:
    """Refuse options whose value was left out when the configuration was saved.

    Raises:
        ValueError: naming the option.
    """
    for option in redacted_options(config.as_dict()):
        raise ValueError(
            f"{option}: its value was a secret, and was left out when this configuration was saved."
            " Give it again; best is the name of an environment variable, which is saved as it is"
        )
