"""YAML as this package reads it: plain data, floats like ``1e-6``, and no key twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

# YAML 1.1 takes 1e-6 for text, because it has no dot and the exponent of 1e6 no sign.
_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_FLOAT_TAG = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping (PyYAML keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, (dict, list)):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key in line {line} is no plain value; quote it if it is text"
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands in lines {seen[key]} and {line}"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text ``1e-6``, which the loader would take for a number."""


_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


def parse_yaml(text: str) -> Any:
    """The data in a YAML text.

    Raises:
        yaml.YAMLError: if it is no YAML, has a key twice in one mapping, or asks for objects.
    """
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: naming the file, if it holds no mapping.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this is no valid YAML: {_reason(error)}") from error
    if content is None:
        raise ValueError(f"{path}: the file is empty")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it must hold a mapping, not {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    """What is wrong and in which line, in one line of text."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        what = f"{error.problem}, {error.context}" if error.context else str(error.problem)
        return f"line {error.problem_mark.line + 1}: {what}"
    return str(error)


def dump_yaml(content: Any) -> str:
    """The YAML text of plain data, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
