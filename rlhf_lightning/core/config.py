"""Small option groups: dataclasses that may also be given as mappings."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

ConfigT = TypeVar("ConfigT")


def as_config(kind: type[ConfigT], value: ConfigT | Mapping[str, Any] | None, name: str) -> ConfigT:
    """An option group from what the user gave for it.

    Args:
        kind: the dataclass of the group.
        value: an instance, a mapping of its fields, or None for the defaults.
        name: the argument's name, for messages.

    Raises:
        TypeError: on an unknown field (naming the nearest one) or another kind of value.
    """
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} is a {type(value).__name__}; it must be a {kind.__name__} or a mapping of its"
            " fields"
        )
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has {known}"
            raise TypeError(f"{name} has no option {key!r}. {hint}")
    return kind(**value)


def check_choices(config: Any, name: str) -> None:
    """Refuse a value that a dataclass's ``Literal`` annotation does not list.

    Args:
        config: an instance of a dataclass.
        name: the argument's name, for messages.

    Raises:
        ValueError: naming the nearest choice.
    """
    for option, hint in get_type_hints(type(config)).items():
        kinds = [hint, *get_args(hint)]
        choices = [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
        value = getattr(config, option)
        if choices and value is not None and value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}.{option} is {value!r}; it must be one of {choices}.{meant}")


def as_primitives(value: Any) -> Any:
    """Dataclasses, mappings and tuples as plain dictionaries and lists, fit for a checkpoint."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_primitives(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_primitives(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_primitives(item) for item in value]
    return value
