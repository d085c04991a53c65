"""The argument parser of the Lightning commands: exact names, and errors that name the nearest."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

import rlhf_lightning
from rlhf_lightning.cli.messages import class_hint, explain, option_hint
from rlhf_lightning.cli.yaml_files import parse_yaml

DEBUG = "RLHF_LIGHTNING_DEBUG"
PARSER_MODE = "rlhf_lightning"


def import_all() -> dict[str, str]:
    """Import every public module of the package, so that short class names can be resolved.

    Returns:
        The package's public classes: short name to import path.
    """
    classes: dict[str, str] = {}
    prefix = f"{rlhf_lightning.__name__}."
    for info in pkgutil.walk_packages(rlhf_lightning.__path__, prefix):
        names = info.name.split(".")
        if "cli" in names or any(name.startswith("_") for name in names):
            continue
        for name, value in vars(import_module(info.name)).items():
            public = isinstance(value, type) and not name.startswith("_")
            if public and value.__module__ == info.name:
                classes[name] = f"{info.name}.{name}"
    return classes


def debugging() -> bool:
    """Whether the user asked for tracebacks of configuration errors."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def class_names() -> set[str]:
    """Short names that a configuration may use: this package's classes and Lightning's and torch's."""
    bases = (
        pl.LightningModule,
        pl.LightningDataModule,
        pl.Callback,
        Logger,
        Strategy,
        torch.optim.Optimizer,
        torch.optim.lr_scheduler.LRScheduler,
    )
    named = {cls.__name__ for base in bases for cls in _subclasses(base)}
    return {name for name in named if not name.startswith("_")} | set(import_all())


def _subclasses(base: type) -> Iterator[type]:
    yield base
    for cls in base.__subclasses__():
        yield from _subclasses(cls)


def load_config(text: str) -> Any:
    """The value of a configuration file, or of an option that is given as YAML.

    Short names of this package's classes become import paths: jsonargparse resolves them by itself
    where an option's type is a class, but not where it is any callable (a reward).
    """
    value = get_loader("yaml")(text)
    if isinstance(value, (dict, list)):
        parse_yaml(text)
        value = _with_import_paths(value, import_all())
    return value


def _with_import_paths(value: Any, classes: dict[str, str]) -> Any:
    if isinstance(value, dict):
        value = {key: _with_import_paths(item, classes) for key, item in value.items()}
        name = value.get("class_path")
        if isinstance(name, str):
            value["class_path"] = classes.get(name, name)
    elif isinstance(value, list):
        value = [_with_import_paths(item, classes) for item in value]
    return value


set_loader(PARSER_MODE, load_config, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """Takes no abbreviations and answers a mistake with one message."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Name the nearest valid option or class; exit with status 2 where the parser is the outermost."""
        if "Did you mean" not in message and "Known:" not in message:
            known = [action.dest for action in self._actions if action.dest != "help"]
            hint = option_hint(message, known) or class_hint(message, class_names())
            message = f"{message}. {hint}" if hint else message
        if not self.exit_on_error:
            super().error(message, ex)
        if debugging():
            super().error(message, ex)
        sys.stderr.write(f"error: {explain(message, ex)}\n")
        self.exit(2)
