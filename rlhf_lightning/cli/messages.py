"""One clear sentence out of what jsonargparse says about a bad option or configuration.

jsonargparse tries every type that an option may have and reports all of it. The cause lies at the
end of the chain of exceptions; the keys and classes on the way there say where it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

_KEY = re.compile(r'Parser key "([^"]+)":')
_OWNER = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN_OPTION = re.compile(
    r"(?:Group '(?P<group>[^']+)' does not accept option|Subcommand '\w+' does not accept option"
    r"|Option) '(?P<name>[^']+)'(?: is not accepted)?"
)
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: (--?[^\s=]+)")
_MISSING = re.compile(r'(?:Key "(?P<key>[^"]+)" is required|arguments are required: (?P<keys>.+))')
_GIVEN = re.compile(r"(?:Got value|Given value): (?P<value>.+)")
_HINT = re.compile(r"(?:Did you mean|Known): .*")


def nearest(name: str, known: Iterable[str]) -> str:
    """``Did you mean: x?`` with the known name nearest to ``name``, or what is known."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean: {near[0]}?"
    return f"Known: {', '.join(known)}" if known else ""


def option_hint(message: str, known: Iterable[str]) -> str:
    """The nearest option for a message that complains of an unknown one; empty for other messages.

    Args:
        message: what the parser says.
        known: the options of that parser, with dots.
    """
    argument = _UNKNOWN_ARGUMENT.match(message)
    if argument is not None:
        flags = [f"--{name}" for name in known]
        return nearest(argument[1], flags) if difflib.get_close_matches(argument[1], flags) else ""
    option = _UNKNOWN_OPTION.match(message)
    if option is None:
        return ""
    name, prefix = option["name"], ""
    if option["group"]:
        prefix = f"{option['group']}."
    elif "." in name:
        prefix = name.rpartition(".")[0] + "."
        name = name.rpartition(".")[2]
    inside = [key[len(prefix) :] for key in known if key.startswith(prefix)]
    return nearest(name, {key.partition(".")[0] for key in inside or known})


def class_hint(message: str, known: Iterable[str]) -> str:
    """The nearest class name for a message about a name without dots that is no class."""
    unknown = _UNKNOWN_CLASS.search(message)
    if unknown is None or not difflib.get_close_matches(unknown[1], list(known), n=1):
        return ""
    return nearest(unknown[1], known)


def explain(message: str, error: BaseException | None) -> str:
    """What is wrong, where it is and what to do, in one or two sentences.

    Args:
        message: the parser's own message.
        error: the exception behind it.

    Returns:
        The explanation; the message itself where it cannot be made shorter.
    """
    where: list[str] = []
    owner = ""
    texts = [message, *(text for text in _chain(error) if text != message)]
    for text in texts:
        key = _KEY.match(text)
        if key is not None and not (where and where[-1].endswith(key[1])):
            where.append(key[1])
        owned = _OWNER.match(text)
        if owned is not None:
            owner = owned[1].rpartition(".")[2]
    cause = _cause(texts, owner)
    if cause is None:
        return message
    place = ".".join(where)
    return f"{place}: {cause}" if place else cause


def _chain(error: BaseException | None) -> Iterator[str]:
    """The texts of an exception and its causes, from the outside in."""
    while error is not None:
        yield error.args[0] if isinstance(error, KeyError) and error.args else str(error)
        error = error.__cause__


def _cause(texts: list[str], owner: str) -> str | None:
    """The sentence for the innermost text that is understood."""
    hint = next((found[0] for text in reversed(texts) if (found := _HINT.search(text))), "")
    for text in reversed(texts):
        if unknown := _UNKNOWN_OPTION.match(text):
            of = f" of {owner}" if owner and not unknown["group"] else ""
            group = f"{unknown['group']}." if unknown["group"] else ""
            return f"there is no option {group}{unknown['name']}{of}. {hint}".rstrip()
        if unknown := _UNKNOWN_CLASS.search(text):
            return f"there is no class or function {unknown[1]!r}. {hint}".rstrip()
        if unknown := _UNKNOWN_ARGUMENT.match(text):
            return f"there is no option {unknown[1]}. {hint}".rstrip()
        if missing := _MISSING.search(text):
            keys = missing["key"] or missing["keys"]
            of = f" of {owner}" if owner else ""
            return f"{keys}{of} is required and was not given"
        if "Expected" in text and "\n" not in text:
            return _wrong_value(texts, text)
    return None


def _wrong_value(texts: list[str], text: str) -> str:
    expected, _, value = text.partition(". Got value: ")
    expected = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", expected).replace("typing.", "")
    expected = expected[0].lower() + expected[1:]
    if not value:
        given = next((found for t in reversed(texts) if (found := _GIVEN.search(t))), None)
        value = given["value"] if given is not None else ""
    choices = re.findall(r"'([^']*)'", expected) if "Literal" in expected else []
    hint = nearest(value, choices) if difflib.get_close_matches(value, choices) else ""
    return f"{expected}, got {value}. {hint}".rstrip() if value else expected
