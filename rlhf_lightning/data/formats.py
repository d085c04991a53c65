"""TRL's formats of data sets: what tells them apart, and what each asks of a row.

Source: TRL's documentation, "Dataset formats and types".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rlhf_lightning.data.chat import Conversation, check_messages
from rlhf_lightning.data.filters import is_empty
from rlhf_lightning.data.prompts import Row
from rlhf_lightning.data.sequences import parse_row
from rlhf_lightning.data.tokens import check_text, kind_of

FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected")),
    ("stepwise supervision", ("prompt", "completions", "labels")),
    ("unpaired preference", ("prompt", "completion", "label")),
    ("prompt-completion", ("prompt", "completion")),
    ("language modelling", ("messages",)),
    ("language modelling", ("text",)),
    ("prompt-only", ("prompt",)),
)
"""TRL's data set formats and the columns that tell them apart, the most telling first."""

COMMON_ROLES = frozenset({"assistant", "developer", "function", "system", "tool", "user"})
"""The roles of messages that chat templates know, most of them not all."""


def row_format(row: Mapping[str, Any]) -> str | None:
    """TRL's name of a row's format, None where its columns fit none.

    >>> row_format({"prompt": "a", "chosen": "b", "rejected": "c"})
    'preference'
    """
    has = {name for name, value in row.items() if value is not None}
    return next((name for name, needs in FORMATS if has.issuperset(needs)), None)


def are_messages(value: Any) -> bool:
    """Whether a value looks like a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and ("role" in value[0])
    )


def uncommon_roles(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Places of rows by a role of theirs that chat templates seldom know.

    Most templates render such a message as it is or drop it, without a word.

    >>> uncommon_roles([{"messages": [{"role": "asistant", "content": "Yes."}]}])
    {'asistant': [0]}
    """
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        messages = [m for value in row.values() if are_messages(value) for m in value]
        roles = {
            m["role"] for m in messages if isinstance(m, dict) and isinstance(m.get("role"), str)
        }
        for role in sorted(roles - COMMON_ROLES):
            found.setdefault(role, []).append(place)
    return found


def check_format(row: Row, name: str) -> bool:
    """Refuse a row that is malformed; whether it is a conversation.

    Args:
        row: a row.
        name: of its format.

    Raises:
        ValueError: saying what is wrong, behind ``"row: "``.
    """
    if name in ("prompt-completion", "language modelling", "unpaired preference"):
        if name == "unpaired preference" and not isinstance(row["label"], bool):
            raise ValueError(f"its label must be true or false, found {kind_of(row['label'])}")
        parsed = parse_row(row, "row")
        if isinstance(parsed[0], Conversation):
            said = [
                m for m in parsed[0].messages[int(parsed[1] or 0) :] if m["role"] == "assistant"
            ]
            if any(is_empty(m.get("content")) and not m.get("tool_calls") for m in said):
                raise ValueError("a message of the assistant is empty")
            return True
        if is_empty(parsed[0] if parsed[1] is None else parsed[1]):
            raise ValueError(
                "its text is empty" if parsed[1] is None else "its completion is empty"
            )
        return False
    conversational = False
    if row.get("prompt") is not None:
        conversational = _check_side(row, "prompt")
    if name == "preference":
        kinds = {conversational, *(_check_side(row, side) for side in ("chosen", "rejected"))}
        conversational = True in kinds
        if len(kinds) > 1 and row.get("prompt") is not None:
            raise ValueError("prompt, chosen and rejected must all be text, or all messages")
        if row["chosen"] == row["rejected"]:
            raise ValueError("its chosen and its rejected are the same")
    if name == "stepwise supervision":
        _check_steps(row)
    return conversational


def _check_side(row: Row, column: str) -> bool:
    """A text or a conversation, not an empty one; whether it is a conversation."""
    value = row[column]
    if isinstance(value, list):
        check_messages(value, f"its {column}")
        return True
    if is_empty(check_text(value, f"its {column}")):
        raise ValueError(f"its {column} is empty")
    return False


def _check_steps(row: Row) -> None:
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise ValueError("its completions and labels must be lists of the same length")
    for step in steps:
        if is_empty(check_text(step, "a step of its completions")):
            raise ValueError("a step of its completions is empty")
    if not all(isinstance(label, bool) for label in labels):
        raise ValueError("its labels must all be true or false")


def _side(name: str, row: Row) -> Row:
    """A row of preferences with one of its answers, as one of supervised training."""
    also = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}
    if row.get("prompt") is not None:
        return {"prompt": row["prompt"], "completion": row[name], **also}
    return {"text" if isinstance(row[name], str) else "messages": row[name], **also}


def _steps(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": "\n".join(row["completions"])}


TRAINED: dict[str, tuple[tuple[str, Callable[[Row], Row]], ...]] = {
    "prompt-completion": (("whole row", dict),),
    "language modelling": (("whole row", dict),),
    "unpaired preference": (("whole row", dict),),
    "stepwise supervision": (("whole row", _steps),),
    "preference": (
        ("with chosen", partial(_side, "chosen")),
        ("with rejected", partial(_side, "rejected")),
    ),
}
"""For each format, what a model may be trained on of a row: its name, and how it is made."""
