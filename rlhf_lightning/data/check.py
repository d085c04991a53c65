"""What a data set is and what is wrong with it, without training on it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.completions import CATEGORY
from rlhf_lightning.data.chat import ChatOptions, ChatRenderer
from rlhf_lightning.data.filters import find_duplicates, is_empty
from rlhf_lightning.data.formats import (
    FORMATS,
    TRAINED,
    are_messages,
    check_format,
    row_format,
    uncommon_roles,
)
from rlhf_lightning.data.mixture import MAX_CATEGORIES
from rlhf_lightning.data.prompts import Row, encode_prompts
from rlhf_lightning.data.sequences import encode_sequences
from rlhf_lightning.data.tokens import check_text, name_rows, special_tokens, strings_in

# What control tokens look like, where no tokenizer says.
_LIKE_CONTROL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?s>|\[/?INST\]|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>"
)
_MAX_REFUSED = 50


@dataclass
class Lengths:
    """How long things are."""

    minimum: int
    median: int
    p95: int
    maximum: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """Of at least one."""
        ordered = sorted(lengths)
        last = len(ordered) - 1
        return cls(*(ordered[round(last * share)] for share in (0, 0.5, 0.95, 1)))


@dataclass
class Column:
    """What a column holds: how many values of each kind, and how long its texts are."""

    kinds: dict[str, int]
    characters: Lengths | None


@dataclass
class Finding:
    """Something that is so of some rows.

    Attributes:
        what: is so, after "3 rows: ".
        rows: places of the rows; none where it is so of the data set.
        is_problem: whether it should be mended, rather than known.
    """

    what: str
    rows: list[int]
    is_problem: bool = True

    def __str__(self) -> str:
        if not self.rows:
            return self.what
        several = "s" * (len(self.rows) > 1)
        return f"{len(self.rows)} row{several}: {self.what} ({name_rows(self.rows)})"


@dataclass
class DataReport:
    """What was found about a data set.

    Attributes:
        name: of the file or the source.
        rows: how many there are.
        format: TRL's name of the format, None where the columns fit none.
        conversational: whether its texts are messages.
        columns: by name.
        tokens: how many tokens the prompts, and the whole rows, have.
        categories: how many rows each category has.
        findings: problems and notes.
    """

    name: str
    rows: int
    format: str | None = None
    conversational: bool = False
    columns: dict[str, Column] = field(default_factory=dict)
    tokens: dict[str, Lengths] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """The findings that should be mended."""
        return [finding for finding in self.findings if finding.is_problem]

    @property
    def notes(self) -> list[Finding]:
        """The other findings."""
        return [finding for finding in self.findings if not finding.is_problem]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; rows are counted from 1, as in the messages."""
        plain = asdict(self)
        for finding in plain["findings"]:
            finding["rows"] = [place + 1 for place in finding["rows"]]
        return plain


@dataclass(frozen=True)
class Checks:
    """What a data set is checked against.

    Args:
        tokenizer: the model's; without one, tokens are not counted and templates not tried.
        chat: how conversations become text.
        context: the longest row in tokens.
        answer: a column that must hold an answer.
        unusable: finds answers that cannot be read, place of a row: why.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    chat: ChatOptions = field(default_factory=ChatOptions)
    context: int | None = None
    answer: str | None = None
    unusable: Callable[[Sequence[Mapping[str, Any]]], dict[int, str]] = lambda rows: {}


def check_rows(name: str, rows: Sequence[Row], checks: Checks | None = None) -> DataReport:
    """Look at every row.

    Args:
        name: of the data set, for the report.
        rows: its rows.
        checks: what they are checked against.
    """
    return _Inspection(name, rows, checks or Checks()).run()


class _Inspection:
    """One look at one data set."""

    def __init__(self, name: str, rows: Sequence[Row], checks: Checks) -> None:
        self.rows = rows
        self.checks = checks
        self.report = DataReport(name, len(rows))
        self.bad: set[int] = set()
        self._grouped: dict[str, Finding] = {}

    def run(self) -> DataReport:
        """Everything, the cheap before the dear."""
        report = self.report
        if not self.rows:
            return report
        formats = Counter(row_format(row) for row in self.rows)
        report.format = formats.most_common(1)[0][0]
        self._columns()
        self._content()
        for role, places in uncommon_roles(self.rows).items():
            self._find(f"a message has the uncommon role {role[:40]!r}", places, is_problem=False)
        self._repetitions()
        self._control_tokens()
        self._answers()
        self._categories()
        if self.checks.tokenizer is not None and report.format is not None:
            self._tokens()
        report.findings.sort(key=lambda finding: not finding.is_problem)
        return report

    def _find(self, what: str, rows: Sequence[int] = (), is_problem: bool = True) -> None:
        self.report.findings.append(Finding(what, list(rows), is_problem))

    def _refuse(self, place: int, what: str) -> None:
        """Something is wrong with a row; what differs only in numbers is told once."""
        self.bad.add(place)
        key = re.sub(r"\d+", "#", what)
        if key not in self._grouped:
            self._grouped[key] = Finding(what, [])
            self.report.findings.append(self._grouped[key])
        self._grouped[key].rows.append(place)

    def _columns(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row)
        for name in names:
            values = [row.get(name) for row in self.rows]
            kinds = Counter(_kind(value) for value in values)
            lengths = [n for value in values if (n := _characters(value)) is not None]
            characters = Lengths.of(lengths) if lengths else None
            self.report.columns[name] = Column(dict(kinds.most_common()), characters)

    def _content(self) -> None:
        """Each row by itself."""
        others, conversations = [], 0
        for place, row in enumerate(self.rows):
            name = row_format(row)
            try:
                for column, value in row.items():
                    for text in strings_in(value):
                        check_text(text, f"its {column}")
                if name != self.report.format:
                    others.append(place)
                elif name is not None:
                    conversations += check_format(row, name)
            except ValueError as error:
                self._refuse(place, _without_place(error))
        self.bad.update(others)
        self.report.conversational = 2 * conversations > len(self.rows)
        if self.report.format is None:
            self._find(
                "no column is called prompt, messages or text: training needs other names (columns)"
                " or a template",
                is_problem=False,
            )
        elif others:
            self._find(f"not {self.report.format}, as the other rows are", others)

    def _repetitions(self) -> None:
        whole = {k: _key(row) for k, row in enumerate(self.rows)}
        same = find_duplicates(whole, "drop", len(self.rows), "rows", "")
        if same:
            self._find("the same as an earlier row", same, is_problem=False)
        for name in {"id", "unique_id"} & set(self.report.columns):
            named = {
                k: _key(row[name]) for k, row in enumerate(self.rows) if not is_empty(row.get(name))
            }
            twice = find_duplicates(named, "drop", len(self.rows), "rows", "")
            if twice:
                self._find(f"the {name} of an earlier row", twice, is_problem=False)
        if "prompt" not in self.report.columns:
            return
        prompts = {k: _key(row.get("prompt")) for k, row in enumerate(self.rows)}
        again = find_duplicates(prompts, "drop", len(self.rows), "prompts", "")
        again = sorted(set(again) - set(same))
        if again:
            self._find("the prompt of an earlier row", again, is_problem=False)

    def _control_tokens(self) -> None:
        tokenizer = self.checks.tokenizer
        pattern, of = _LIKE_CONTROL, "what looks like a special token"
        if tokenizer is not None:
            spelled = sorted(special_tokens(tokenizer), key=len, reverse=True)
            pattern, of = re.compile("|".join(map(re.escape, spelled)) or "(?!)"), "a special token"
        columns = {name for _, needs in FORMATS for name in needs} & set(self.report.columns)
        found: dict[int, str] = {}
        for place, row in enumerate(self.rows):
            texts = (text for name in columns for text in strings_in(row.get(name)))
            hits = (hit for text in texts if (hit := pattern.search(text)))
            hit = next(hits, None)
            if hit is not None:
                found[place] = hit.group()
        if found:
            first = next(iter(found.values()))
            self._find(
                f"spell {of} ({first!r}); it is encoded as plain characters, unless"
                " data.chat.special_tokens says otherwise",
                list(found),
                is_problem=False,
            )

    def _answers(self) -> None:
        name = self.checks.answer
        if name is None:
            return
        if name not in self.report.columns:
            self._find(f"there is no column {name!r}; there are {list(self.report.columns)}")
            return
        missing: list[int] = []
        rest: list[int] = []
        for place, row in enumerate(self.rows):
            (missing if is_empty(row.get(name)) else rest).append(place)
        if missing:
            self._find(f"the answer (its column {name!r}) is missing", missing)
        why = self.checks.unusable([self.rows[k] for k in rest])
        if why:
            found = sorted(why)
            first = "" if len(found) == 1 else "of the first, "
            self._find(
                f"the answer cannot be read: {first}{why[found[0]]}", [rest[k] for k in found]
            )

    def _categories(self) -> None:
        if CATEGORY not in self.report.columns:
            return
        counts = Counter(str(row.get(CATEGORY)) for row in self.rows)
        self.report.categories = dict(counts.most_common(MAX_CATEGORIES))
        if len(counts) > MAX_CATEGORIES:
            self._find(
                f"the column {CATEGORY!r} has {len(counts)} values, more than {MAX_CATEGORIES}:"
                " there will be no figures by category",
                is_problem=False,
            )

    def _tokens(self) -> None:
        """Encode the rows that are well as training does."""
        assert self.checks.tokenizer is not None
        if self.report.conversational:
            try:
                ChatRenderer(self.checks.tokenizer, self.checks.chat).check()
            except ValueError as error:
                self._find(str(error))
                return
        good = [k for k in range(len(self.rows)) if k not in self.bad]
        lengths: dict[int, int] = {}
        if "prompt" in self.report.columns:
            prompts = self._encode(good, self._prompt_lengths)
            if prompts:
                self.report.tokens["prompt"] = Lengths.of([*prompts.values()])
            lengths = prompts
            good = [k for k in good if k in prompts]
        for part, make in TRAINED.get(self.report.format or "", ()):
            whole = self._encode(good, partial(self._row_lengths, make))
            if whole:
                self.report.tokens[part] = Lengths.of([*whole.values()])
            lengths = {k: max(n, lengths.get(k, 0)) for k, n in whole.items()}
        context = self.checks.context
        long = [k for k, n in sorted(lengths.items()) if context is not None and n > context]
        if long:
            self._find(f"longer than {context} tokens", long)

    def _prompt_lengths(self, rows: Sequence[Row]) -> list[int]:
        assert self.checks.tokenizer is not None
        encoded, _ = encode_prompts(rows, self.checks.tokenizer, chat=self.checks.chat)
        return [len(prompt.ids) for prompt in encoded]

    def _row_lengths(self, make: Callable[[Row], Row], rows: Sequence[Row]) -> list[int]:
        assert self.checks.tokenizer is not None
        made = [make(row) for row in rows]
        encoded, _ = encode_sequences(made, self.checks.tokenizer, chat=self.checks.chat)
        return [len(sequence.input_ids) for sequence in encoded]

    def _encode(
        self, places: list[int], lengths: Callable[[Sequence[Row]], list[int]]
    ) -> dict[int, int]:
        """Lengths of the rows that can be encoded; the others are halved until they are found."""
        found: dict[int, int] = {}
        pending, refused = [places] if places else [], 0
        while pending and refused < _MAX_REFUSED:
            some = pending.pop()
            try:
                found |= dict(zip(some, lengths([self.rows[k] for k in some]), strict=True))
            except ValueError as error:
                if len(some) == 1:
                    refused += 1
                    self._refuse(some[0], _without_place(error))
                else:
                    middle = len(some) // 2
                    pending += [some[middle:], some[:middle]]
        return dict(sorted(found.items()))


def _without_place(error: ValueError) -> str:
    """What is wrong, without the row's number, which is told apart."""
    return re.sub(r"^row( \d+)?(: |, )", "", str(error))


def _kind(value: Any) -> str:
    """What a value is, in the words of the report."""
    if isinstance(value, str):
        return "text" if value.strip() else "empty text"
    if isinstance(value, list):
        return "messages" if are_messages(value) else "list"
    names = {bool: "true or false", int: "whole number", float: "number", dict: "mapping"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _characters(value: Any) -> int | None:
    """How long a text is, or all texts of messages are."""
    if isinstance(value, str):
        return len(value)
    if not are_messages(value):
        return None
    contents = (message.get("content") for message in value if isinstance(message, dict))
    return sum(len(text) for text in contents if isinstance(text, str))


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
