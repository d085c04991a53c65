"""Options of callbacks on the command line, addressed by the name of their class.

jsonargparse gives ``--trainer.callbacks.x`` to the last callback of the list, whichever that is. So
it is taken only after the ``--trainer.callbacks+=Class`` that it belongs to; the callbacks of a
configuration file are addressed as ``--trainer.callbacks.ModelCheckpoint.x``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jsonargparse import Namespace

from rlhf_lightning.cli.messages import nearest
from rlhf_lightning.cli.yaml_files import dump_yaml, parse_yaml

_FLAG = "--trainer.callbacks"


class Addressed(NamedTuple):
    """An option of a callback that a configuration file lists: class, dotted option, value."""

    name: str
    option: str
    value: str


def take_addressed(arguments: Sequence[str]) -> tuple[list[str], list[Addressed]]:
    """Take out the options that name a callback's class.

    Args:
        arguments: a command line.

    Returns:
        The other arguments, and what was taken out.

    Raises:
        ValueError: on an option that could be any callback's, or one without a value.
    """
    kept: list[str] = []
    taken: list[Addressed] = []
    added = False
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        added = added or flag in (_FLAG, f"{_FLAG}+")
        option = flag.removeprefix(f"{_FLAG}.") if flag.startswith(f"{_FLAG}.") else ""
        if not option or option == "help":
            kept.append(argument)
        elif option[0].isupper():
            if not equals and not rest:
                raise ValueError(f"{flag}: give it a value")
            name, _, inner = option.partition(".")
            taken.append(Addressed(name, inner, value if equals else rest.pop(0)))
        elif added:
            kept.append(argument)
        else:
            raise ValueError(
                f"{flag}: which callback is meant? Name its class, as in"
                f" {_FLAG}.ModelCheckpoint.{option}"
            )
    return kept, taken


def with_addressed(callbacks: Any, addressed: Iterable[Addressed]) -> str:
    """The option that gives the Trainer the same callbacks with other values.

    Args:
        callbacks: those of the parsed configuration.
        addressed: the values.

    Raises:
        ValueError: if there is no such callback, or more than one.
    """
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    plain = [entry.as_dict() if isinstance(entry, Namespace) else entry for entry in listed]
    for name, option, value in addressed:
        names = [str(entry["class_path"]).rpartition(".")[2] for entry in plain]
        found = [entry for entry, other in zip(plain, names, strict=True) if other == name]
        if len(found) != 1 or not option:
            near = nearest(name, names)
            meant = f" Did you mean: {near}?" if near and near != name else ""
            raise ValueError(
                f"{_FLAG}.{name}{'.' if option else ''}{option}: the configuration has"
                f" {len(found)} callbacks {name} (it has: {', '.join(names) or 'none'}).{meant}"
            )
        place = found[0].setdefault("init_args", {}) or {}
        *outer, last = option.split(".")
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = parse_yaml(value)
    return f"{_FLAG}={dump_yaml(plain)}"
