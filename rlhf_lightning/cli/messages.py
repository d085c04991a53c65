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
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: --([^\s=+]+)")
_NO_SUCH_CLASS = re.compile(
    r"(?:Expected a dot import path string: (?P<name>\S+)|No module named '(?P<package>[^']+)'"
    r"|module '(?P<module>[^']+)' has no attribute '(?P<attribute>[^']+)')"
)
_MISSING = re.compile(r'Key "(?P<key>[^"]+)" is required|arguments are required: (?P<keys>[^\n]+)')
_GIVEN = re.compile(r"(?:Got value|Given value): (?P<value>.+)")
_WRAPPER = re.compile(r"Does not validate against any of the Union|Problem with given class_path")
_HINT = re.compile(r"Did you mean: .*|It has: .*")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name nearest to ``name``, empty if none is near."""
    near = difflib.get_close_matches(name, sorted(set(known)), n=1)
    return near[0] if near else ""


def hint(message: str, options: Iterable[str], classes: Iterable[str]) -> str:
    """``Did you mean: x?`` for a message about an unknown option or class; empty for others.

    Args:
        message: what a parser says.
        options: that parser's options, with dots.
        classes: names of classes that a configuration may use.
    """
    if option := _UNKNOWN_OPTION.match(message):
        group = f"{option['group']}." if option["group"] else ""
        return _option_hint(group + option["name"], list(options), "")
    if flag := _UNKNOWN_FLAG.match(message):
        return _option_hint(flag[1], list(options), "--")
    if unknown := _NO_SUCH_CLASS.search(message):
        name = unknown["name"] or unknown["attribute"] or ""
        near = nearest(name, classes)
        return f"Did you mean: {near}?" if near not in ("", name) else ""
    return ""


def _option_hint(name: str, options: list[str], dashes: str) -> str:
    """Follow the dots as far as they lead, then name what is nearest to the first wrong part."""
    parts = name.split(".")
    right = 0
    while right < len(parts) and _inside(options, parts[: right + 1]):
        right += 1
    wrong = parts[right] if right < len(parts) else parts[-1]
    known = _inside(options, parts[:right], children=True)
    near = nearest(wrong, known)
    if near:
        corrected = [*parts[:right], near, *parts[right + 1 :]] if dashes else [near]
        return f"Did you mean: {dashes}{'.'.join(corrected)}?"
    return f"It has: {', '.join(sorted(known))}" if known and not dashes else ""


def _inside(options: list[str], parts: list[str], children: bool = False) -> set[str]:
    """The options at or below a place, or the names of its direct children."""
    below = [option.split(".") for option in options]
    below = [option for option in below if option[: len(parts)] == parts]
    if children:
        return {option[len(parts)] for option in below if len(option) > len(parts)}
    return {".".join(option) for option in below}


def explain(message: str, error: BaseException | None) -> str:
    """What is wrong, where it is and what to do, in one or two sentences.

    Args:
        message: the outermost parser's message.
        error: the exception behind it.

    Returns:
        The explanation; the message itself where it is of no known kind.
    """
    where: list[str] = []
    owner = ""
    texts = [message, *(text for text in _chain(error) if text != message)]
    for text in texts:
        key = _KEY.match(text)
        if key is not None and not (where and where[-1] == key[1]):
            where.append(key[1])
            owner = ""
        if owned := _OWNER.match(text):
            owner = owned[1].rpartition(".")[2]
    found = next((hit[0] for text in reversed(texts) if (hit := _HINT.search(text))), "")
    for text in reversed(texts):
        cause = _cause(text, texts, owner)
        if cause is not None:
            place = f"{'.'.join(where)}: " if where else ""
            if where[-1:] == ["model"] and "/" in cause and not found:
                found = "A folder or hub name goes to model.model, beside the class of the module"
            return f"{place}{cause} {found}".rstrip()
    return message


def root(error: BaseException) -> BaseException:
    """The error behind those that say only that a value fits none of an option's types."""
    while _WRAPPER.match(str(error)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _chain(error: BaseException | None) -> Iterator[str]:
    """The texts of an exception and its causes, from the outside in."""
    while error is not None:
        yield str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        error = error.__cause__


def _cause(text: str, texts: list[str], owner: str) -> str | None:
    """The sentence for one text of the chain, None if it says nothing by itself."""
    of = f" of {owner}" if owner else ""
    if unknown := _UNKNOWN_OPTION.match(text):
        group = f"{unknown['group']}." if unknown["group"] else ""
        return f"there is no option {group}{unknown['name']}{of}."
    if unknown := _UNKNOWN_FLAG.match(text):
        return f"there is no option --{unknown[1]}."
    if unknown := _NO_SUCH_CLASS.search(text):
        dotted = f"{unknown['module']}.{unknown['attribute']}"
        name = unknown["name"] or unknown["package"] or dotted
        return f"there is no class or function {name!r} for it."
    if missing := _MISSING.search(text):
        keys = missing["key"] or re.sub(r"\b(?:fit|validate|test|predict)\.", "--", missing["keys"])
        return f"{keys}{of} must be given"
    if "Expected" in text and "\n" not in text:
        return _wrong_value(text, texts)
    if _KEY.match(text) and "\n" not in text:
        return _KEY.sub("", text).strip()
    return None


def _wrong_value(text: str, texts: list[str]) -> str:
    """``expected int, got 'a'.``, with the nearest choice where there are choices."""
    expected, _, value = _KEY.sub("", text).strip().partition(". Got value: ")
    expected = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", expected)
    expected = re.sub(r"^Expected (?:a |an )?", "", expected)
    if not value:
        given = next((hit for t in reversed(texts) if (hit := _GIVEN.search(t))), None)
        value = given["value"] if given is not None else ""
    choices = re.findall(r"'([^']*)'", expected) if "Literal" in expected else []
    if choices:
        expected = f"one of {', '.join(choices)}"
    near = nearest(value, choices)
    found = f", got {value!r}." if value else "."
    return f"expected {expected}{found}" + (f" Did you mean: {near}?" if near else "")
